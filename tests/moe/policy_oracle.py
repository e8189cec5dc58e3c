"""Every routing policy as loops over tokens and experts, and the layer around it as one expert after the other."""

from __future__ import annotations

import math

import gate_oracle
import torch
import torch.nn.functional as F

from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import Purpose, gumbel, layer_keys, layer_offset, mix, stream, uniform


def largest(values, k):
    """Places of the k largest, the first at ties."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def choose(layer: MoELayer, logits, tokens: TokenInfo) -> list[list[int]]:
    """The experts of each token in the order of the policy; -1: none. Scores are torch's: another softmax may round a tie apart."""
    c = layer.config
    scores = (logits.softmax(1) if c.moe_router_score_function == "softmax" else logits.sigmoid()).tolist()
    chosen = CHOOSE[c.moe_router_policy](layer, logits.tolist(), scores, tokens)
    if tokens.used_T is not None:
        chosen = [row if used else [-1] * len(row) for row, used in zip(chosen, tokens.used_T.tolist())]
    return chosen


def topk(layer, rows, scores, tokens):
    c, E = layer.config, layer.num_experts
    bias = [0.0] * E if layer.gate.expert_bias is None else layer.gate.expert_bias.tolist()
    noise = None
    if c.draws_choices and layer.training and tokens.keys_T is not None:
        noise = gumbel(tokens.keys_T, stream(layer.layer, Purpose.GATE_SAMPLING), E).tolist()
    ids = []
    for t, row in enumerate(rows):
        ranks = [s + b for s, b in zip(scores[t], bias)]
        if c.moe_router_num_groups is not None:
            size, per_group = E // c.moe_router_num_groups, c.moe_router_group_best or c.topk // c.moe_router_group_topk
            groups = [ranks[g * size : (g + 1) * size] for g in range(c.moe_router_num_groups)]
            open_groups = largest([sum(sorted(g)[-per_group:]) for g in groups], c.moe_router_group_topk)
            ranks = [r if e // size in open_groups else -math.inf for e, r in enumerate(ranks)]
        chosen = largest(ranks, c.topk)
        if noise is not None:
            first = [] if c.topk == 1 else chosen[:1]
            noisy = [-math.inf if e in first else v + n for e, (v, n) in enumerate(zip(row, noise[t]))]
            chosen = first + largest(noisy, 1)
        ids.append(chosen)
    return ids


def expert_choice(layer, rows, scores, tokens):
    c, E, T = layer.config, layer.num_experts, len(rows)
    if not layer.training:
        return [largest(row, c.topk) for row in scores]
    most = tokens.most_tokens if tokens.most_tokens is not None else T
    capacity = gate_oracle.capacity(most, E, c.moe_train_capacity_factor, c.topk, c.moe_min_capacity)
    used = [True] * T if tokens.used_T is None else tokens.used_T.tolist()
    ids = [[-1] * E for _ in rows]
    for e in range(E):
        column = [scores[t][e] if used[t] else -1.0 for t in range(T)]
        for t in largest(column, capacity):
            ids[t][e] = e
    return ids


def dealt(number, key, E, k):
    """The order in which the experts take the run of E numbers that this one is in."""
    draws = uniform(mix(torch.tensor(number // E) ^ key), Purpose.ASSIGNMENT, E).tolist()
    order = sorted(range(E), key=lambda e: (draws[e], e))
    return [order[(number + j) % E] for j in range(k)]


def key_of(layer, seed=0):
    return mix(torch.tensor(layer_offset(layer.layer)) ^ seed)


def hashed(layer, rows, scores, tokens):
    key = key_of(layer, layer.config.moe_router_hash_seed)
    return [dealt(word, key, layer.num_experts, layer.config.topk) for word in tokens.ids_T.tolist()]


def sinkhorn(layer, rows, scores, tokens):
    """The plan itself: rows and columns of exp(logits) scaled in turn."""
    k, E = layer.config.topk, layer.num_experts
    if not layer.training:
        return [largest(row, k) for row in rows]
    plan = [[math.exp(v) for v in row] for row in rows]
    used = range(len(rows)) if tokens.used_T is None else [t for t, used in enumerate(tokens.used_T.tolist()) if used]
    for _ in range(layer.config.moe_router_sinkhorn_iterations):
        plan = [[v / sum(row) for v in row] for row in plan]
        totals = [sum(plan[t][e] for t in used) or 1.0 for e in range(E)]
        plan = [[v / total for v, total in zip(row, totals)] for row in plan]
    # of equal entries, those of larger logits
    return [largest([math.log(v) + 1e-4 * logit for v, logit in zip(*both)], k) for both in zip(plan, rows)]


def places_of(tokens, rows):
    return list(range(len(rows))) if tokens.places_T is None else tokens.places_T.tolist()


def balanced(layer, rows, scores, tokens):
    return [dealt(place, key_of(layer), layer.num_experts, layer.config.topk) for place in places_of(tokens, rows)]


def zipf(layer, rows, scores, tokens):
    c, E, key = layer.config, layer.num_experts, key_of(layer)
    keys = mix(torch.tensor(places_of(tokens, rows), dtype=torch.int64) ^ key)
    if layer.training and tokens.keys_T is not None:
        keys = layer_keys(tokens.keys_T, layer.layer)
    noise = gumbel(keys, Purpose.ASSIGNMENT, E).tolist()
    share = [-c.moe_router_zipf_exponent * math.log(dealt(e, key, E, 1)[0] + 1) for e in range(E)]
    return [largest([s + n for s, n in zip(share, row)], c.topk) for row in noise]


CHOOSE = {"topk": topk, "expert_choice": expert_choice, "hash": hashed, "sinkhorn": sinkhorn, "balanced": balanced, "zipf": zipf}


# ---------------------------------------------------------------- the layer around it


def scores_TE(layer: MoELayer, logits):
    """What gate weights are taken from, differentiable."""
    c = layer.config
    if c.moe_router_policy == "hash":
        return torch.full_like(logits, 1 / c.topk)
    is_sigmoid = c.moe_router_score_function == "sigmoid" or (c.moe_router_policy == "sinkhorn" and c.topk == 1)
    return 1 / (1 + torch.exp(-logits)) if is_sigmoid else torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)


def one_expert(layer: MoELayer, e: int, x):
    """fc1, activation, fc2 of expert e."""
    w = layer.experts
    return F.gelu(x @ w.w1[e] + w.b1[e]) @ w.w2[e] + w.b2[e]


def looped(layer: MoELayer, x, tokens: TokenInfo):
    """Output of a dropless layer (or of expert choice) by loops, with the choices."""
    c = layer.config
    logits = x @ layer.gate.weight.t()
    scores, ids = scores_TE(layer, logits), choose(layer, logits.detach(), tokens)
    rows = []
    for t, chosen in enumerate(ids):
        experts = [e for e in chosen if e >= 0]
        total = sum(scores[t, e] for e in experts) if c.normalize != "none" and experts else 1.0
        parts = [c.moe_router_topk_scaling_factor * scores[t, e] / total * one_expert(layer, e, x[t]) for e in experts]
        rows.append(sum(parts, torch.zeros_like(x[t])))
    return (torch.stack(rows) if rows else x * 0), ids
