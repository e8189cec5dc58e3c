"""DeepSpeed-MoE's gating as loops over tokens and experts, for the tests: slow, and plain enough to check by eye."""

import math
from fractions import Fraction

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe import routing
from megatron_moe.moe.policies.topk import TopK, drawn
from megatron_moe.moe.tokens import TokenInfo


def capacity(tokens, experts, factor, k, minimum):
    """Smallest integer c with c >= tokens / experts * factor * k, found by counting."""
    wanted = Fraction(tokens) / experts * Fraction(str(factor)) * k
    c = 0
    while c < wanted:
        c += 1
    return c if c > minimum else minimum


def softmax(row):
    highest = max(row)
    exps = [math.exp(v - highest) for v in row]
    return [e / sum(exps) for e in exps]


def choose(probs, k):
    """The k largest of each row, the lower expert first at ties."""
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in probs]


def keep(ids, capacity, order, priority=None):
    """ids with -1 for the dropped. Every assignment queues at its expert; the first `capacity` of a queue stay."""
    tokens, k = len(ids), len(ids[0]) if ids else 0
    if order == "position" and k == 2:
        arrivals = [(t, c) for c in range(k) for t in range(tokens)]  # all first choices, then all second ones
    else:
        arrivals = [(t, c) for t in range(tokens) for c in range(k)]
    if order != "position":
        arrivals.sort(key=lambda a: -priority[a[0]][a[1]])  # stable: earlier tokens first at ties
    kept, taken = [[-1] * k for _ in ids], {}
    for t, c in arrivals:
        e = ids[t][c]
        if taken.get(e, 0) < capacity:
            kept[t][c] = e
        taken[e] = taken.get(e, 0) + 1
    return kept


def weights(probs, ids):
    """Raw probability for one choice, else shares of what survived."""
    rows = []
    for row, chosen in zip(probs, ids):
        raw = [row[e] if e >= 0 else 0.0 for e in chosen]
        total = sum(raw)
        rows.append(raw if len(raw) == 1 or total == 0 else [w / total for w in raw])
    return rows


def counts(ids, experts):
    n = [0] * experts
    for row in ids:
        for e in row:
            if e >= 0:
                n[e] += 1
    return n


def balance(probs, ids, experts):
    """E * sum_e (share of the assignments of e) * (mean probability of e)."""
    n, tokens = counts(ids, experts), len(probs)
    return experts * sum(n[e] / sum(n) * sum(row[e] for row in probs) / tokens for e in range(experts))


# ---------------------------------------------------------------- ours, called as the tests above think of it


def choose_experts(logits_TE, k, noise_TE=None):
    """Probabilities and choices of the default policy; with noise, those of its drawing."""
    config = MoEConfig(num_experts=(logits_TE.shape[1],), topk=k)
    choice = TopK(config)(logits_TE, TokenInfo(), None, None, True)
    return choice.probs_TE, choice.ids_TK if noise_TE is None else drawn(logits_TE.detach(), k, noise_TE)


def combine_weights(probs_TE, kept_TK):
    """DeepSpeed's rule: the raw probability of one choice, else shares of what survived."""
    return routing.combine_weights(probs_TE, kept_TK, kept_TK, "none" if kept_TK.shape[1] == 1 else "survivors")
