"""Auxiliary losses against loops over tokens, sequences and micro-batches: values, gradients, and how shares add up."""
# T tokens, E experts, K experts per token, S sequences

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_moe_layer import EXACT, E, T, build, gradients, tokens

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.losses import auxiliary_losses
from megatron_moe.moe.policies.base import Choice
from megatron_moe.moe.tokens import Reducer, TokenInfo

# ---------------------------------------------------------------- the oracle: the formulas of the papers, token by token


def shares_of(rows: list[list[int]], experts: int) -> list[float]:
    """f_e: the share of these tokens' choices that fell on e; -1 is no choice."""
    chosen = [e for row in rows for e in row if e >= 0]
    return [chosen.count(e) / max(len(chosen), 1) for e in range(experts)]


def balance(shares: list[float], probs) -> float:
    """E sum_e f_e p_te, summed over tokens."""
    return len(shares) * sum(f * row[e] for row in probs for e, f in enumerate(shares))


def oracle(config, logits, probs, ids, first_choices_only, used, length, counts_before=None):
    """Sums over the tokens: balance, z, sequence, global batch."""
    experts = len(probs[0]) if len(probs) else config.num_experts[0]
    used = used or [True] * len(ids)
    rows = [row if u else [-1] * len(row) for row, u in zip(ids, used)]
    of_used = [[p * u for p in row] for row, u in zip(probs, used)]
    firsts = [row[:1] for row in rows] if first_choices_only else rows
    micro = balance([f * sum(used) / max(len(used), 1) for f in shares_of(firsts, experts)], probs)
    z = sum(u * math.log(sum(math.exp(v) for v in row)) ** 2 for row, u in zip(logits, used))
    sequence = sum(balance(shares_of(rows[s : s + length], experts), of_used[s : s + length]) for s in range(0, len(rows), length))
    counts = [b + sum(row.count(e) for row in rows) for e, b in enumerate(counts_before or [0] * experts)]
    batch = balance([n / max(sum(counts), 1) for n in counts], of_used)
    return micro, z, sequence, batch


def choice_of(logits, k, first_choices_only=False):
    probs = logits.softmax(-1)
    return Choice(probs.detach().topk(k, dim=-1).indices, probs, probs, first_choices_only=first_choices_only)


COEFFICIENTS = {"moe_loss_coeff": 0.3, "moe_router_z_loss_coeff": 0.2, "moe_seq_loss_coeff": 0.5, "moe_global_loss_coeff": 0.7}


@st.composite
def cases(draw):
    """Sequences of any length, also none; one expert or more; skewed scores, so that experts are idle; padding."""
    sequences, length = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    logits = torch.randn(
        sequences * length, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    logits[:, 0] += draw(st.sampled_from([0.0, 20.0]))
    used = draw(st.none() | st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    return sequences, length, k, logits, used, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_loss_equals_its_loop(case):
    sequences, length, k, logits, used, first_choices_only = case
    experts = logits.shape[1]
    choice = choice_of(logits, k, first_choices_only)
    probs = choice.probs_TE.tolist()
    before = list(range(experts))
    micro, z, sequence, batch = oracle(
        MoEConfig(num_experts=(experts,), topk=k), logits.tolist(), probs, choice.ids_TK.tolist(), first_choices_only, used, length, before
    )
    info = TokenInfo(used_T=None if used is None else torch.tensor(used, dtype=torch.bool), num_sequences=sequences, sequence_length=length)
    if used is not None:  # as the layer does
        choice.ids_TK = torch.where(info.used_T[:, None], choice.ids_TK, -1)
    found = {}
    for name, coefficient in COEFFICIENTS.items():
        alone = MoEConfig(num_experts=(experts,), topk=k, **(dict.fromkeys(COEFFICIENTS, 0.0) | {name: coefficient}))
        counts_E = torch.tensor(before) if name == "moe_global_loss_coeff" else None
        found[name] = auxiliary_losses(alone, logits, choice, info, Reducer(), counts_E)
    for name, expected in zip(COEFFICIENTS, (micro, z, sequence, batch)):
        assert float(found[name].total) == pytest.approx(COEFFICIENTS[name] * expected, rel=1e-12, abs=1e-12), name
    assert float(found["moe_loss_coeff"].balance) == pytest.approx(micro, rel=1e-12, abs=1e-12)
    counts = [b + (choice.ids_TK == e).sum().item() for e, b in enumerate(before)]
    assert found["moe_global_loss_coeff"].batch_counts_E.tolist() == counts
    together = MoEConfig(num_experts=(experts,), topk=k, **COEFFICIENTS)
    total = auxiliary_losses(together, logits, choice, info, Reducer(), torch.tensor(before)).total
    torch.testing.assert_close(total, sum(f.total for f in found.values()), **EXACT)


class PartReducer(Reducer):
    """Of a part of the tokens: what the parts sum up to was worked out beforehand, in the order in which it is asked for."""

    def __init__(self, wholes):
        self.wholes = iter(wholes)

    def over_microbatch(self, counts):
        return next(self.wholes)


class Noting(Reducer):
    def __init__(self):
        self.asked = []

    def over_microbatch(self, counts):
        self.asked.append(counts)
        return counts


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 4))
def test_parts_of_a_microbatch_add_up_to_it_wherever_it_is_cut(case, ranks):
    """As tensor parallelism cuts it: equal slices, the last ones shorter or empty, within a sequence or between two."""
    sequences, length, k, logits, used, first_choices_only = case
    experts, total = logits.shape[1], len(logits)
    config = MoEConfig(num_experts=(experts,), topk=k, **COEFFICIENTS)
    info = TokenInfo(used_T=None if used is None else torch.tensor(used, dtype=torch.bool), num_sequences=sequences, sequence_length=length)
    each = -(-total // ranks)
    bounds = [slice(min(r * each, total), min((r + 1) * each, total)) for r in range(ranks)]

    def losses(part, reducer):
        of_part = info.of(part, None, logits)
        choice = choice_of(logits[part], k, first_choices_only)
        if used is not None:
            choice.ids_TK = torch.where(of_part.used_T[:, None], choice.ids_TK, -1)
        return auxiliary_losses(config, logits[part], choice, of_part, reducer, None)

    notes = [Noting() for _ in bounds]
    for part, note in zip(bounds, notes):
        losses(part, note)
    wholes = [torch.stack(counts).sum(0) for counts in zip(*(note.asked for note in notes))]
    parts = [losses(part, PartReducer(wholes)).total for part in bounds]
    torch.testing.assert_close(sum(parts), losses(slice(0, total), Reducer()).total, rtol=0, atol=1e-9)


def test_the_gradient_of_every_loss_is_that_of_its_formula():
    """Written out again in tensors with a graph: shares are constants, probabilities are not."""
    layer, x = build(topk=3, moe_token_dropping=False, **COEFFICIENTS), tokens()
    length, layer.loss_weight = 8, 1 / 100
    layer(x, TokenInfo(num_sequences=T // length, sequence_length=length))  # a micro-batch before, which the global batch counts
    assert layer.batch_counts_E.sum() == 3 * T
    y = layer(x, TokenInfo(num_sequences=T // length, sequence_length=length))
    logits = x @ layer.gate.weight.t()
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(3).indices, 1.0).detach()
    whole = (chosen.mean(0) / 3 * probs.mean(0)).sum() * E * T
    by_sequence = sum((c.mean(0) / 3 * p.sum(0)).sum() * E for c, p in zip(chosen.split(length), probs.split(length)))
    z = logits.logsumexp(-1).square().sum()
    c = COEFFICIENTS
    # the same micro-batch twice has the same shares: so the global batch's are those of the micro-batch
    expected = (
        (c["moe_loss_coeff"] + c["moe_global_loss_coeff"]) * whole
        + c["moe_seq_loss_coeff"] * by_sequence
        + c["moe_router_z_loss_coeff"] * z
    ) / 100
    got, want = gradients(layer, x, 0.0 * y.sum()), torch.autograd.grad(expected, [x, layer.gate.weight])
    torch.testing.assert_close(got["x"], want[0], **EXACT)
    torch.testing.assert_close(got["gate.weight"], want[1], **EXACT)


# ---------------------------------------------------------------- what they mean


def test_a_batch_balanced_as_a_whole_and_not_in_its_sequences_is_seen_by_the_sequence_loss_alone():
    """Worked example: two sequences of two tokens, two experts; each sequence has its own expert."""
    logits = torch.tensor([[9.0, 0], [9, 0], [0, 9], [0, 9]], dtype=torch.float64)
    info = TokenInfo(num_sequences=2, sequence_length=2)
    config = dict.fromkeys(COEFFICIENTS, 0.0)

    def value(name):
        alone = MoEConfig(num_experts=(2,), **config | {name: 1.0})
        return float(auxiliary_losses(alone, logits, choice_of(logits, 1), info, Reducer(), None).total / 4)

    assert value("moe_loss_coeff") == pytest.approx(1.0)  # balanced
    assert value("moe_seq_loss_coeff") == pytest.approx(2.0, abs=1e-3)  # the worst that there is


def test_the_global_batch_forgives_a_microbatch_that_the_others_make_up_for():
    layer, x = build(topk=1, moe_token_dropping=False, moe_global_loss_coeff=1.0), tokens()
    layer.loss_weight = 1.0
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = torch.tensor([9.0, 0, 0, 0])  # every token with x_0 > 0 to expert 0
        x[:, 0] = 5.0
    layer.batch_counts_E = torch.tensor([0, T, T, T])
    alone = gradients(layer, x, 0.0 * layer(x).sum())["gate.weight"]
    assert layer.batch_counts_E.tolist() == [T] * E
    assert alone.abs().max() < 1e-12  # equal shares: the sum over probabilities is constant


def test_evaluation_neither_counts_nor_asks_other_ranks():
    layer, x = build(topk=1, moe_token_dropping=False, moe_global_loss_coeff=1.0), tokens()
    layer.begin_step(0.1)
    layer(x)
    assert layer.batch_counts_E.sum() == T
    layer.eval()
    layer.reducer.over_batch = None  # nobody may be asked: ranks may evaluate unequal numbers of micro-batches
    layer(x)
    assert layer.batch_counts_E is None


def test_a_step_begins_without_the_counts_of_the_step_before():
    layer = build(topk=1, moe_token_dropping=False, moe_global_loss_coeff=1.0)
    for _ in range(2):
        layer.begin_step(0.1)
        layer(tokens())
        layer(tokens(seed=2))
        assert layer.batch_counts_E.sum() == 2 * T


def test_no_loss_counts_after_dropping():
    """An expert that is full would look balanced."""
    layers = [build(topk=2, moe_train_capacity_factor=f, moe_rts=False, **COEFFICIENTS) for f in (0.25, 4.0)]
    x, found = tokens(), []
    for layer in layers:
        layer.loss_weight = 1.0
        found.append(gradients(layer, x, 0.0 * layer(x).sum())["gate.weight"])
    torch.testing.assert_close(*found, **EXACT)
