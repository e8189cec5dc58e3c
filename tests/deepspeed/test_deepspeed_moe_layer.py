"""deepspeed.moe.layer.MoE in one process: what it computes, DeepSpeed's names in its state dict, its arguments, its randomness."""
# T tokens, D hidden, E experts

from __future__ import annotations

import copy
import inspect
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from moe import gate_oracle as oracle
from named_gradients import named_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.utils import groups
from megatron_moe.moe.layer import MoELayer
from megatron_moe.utils.random import Purpose, drawn_keys, uniform

T, D, E = 24, 6, 4
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _no_degree_of_another_test():
    groups.initialize(1)
    yield
    groups.initialize(1)


class FeedForward(nn.Module):
    def __init__(self, width=D):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def build(k=1, expert=None, experts=E, **options) -> MoE:
    """In float64, every expert with weights of its own."""
    torch.manual_seed(0)
    moe = MoE(D, FeedForward() if expert is None else expert, experts, k=k, **{"min_capacity": 0} | options).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.7)
    return moe


def tokens(*shape, seed=1):
    return torch.randn(*(shape or (T,)), D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


# ---------------------------------------------------------------- what it computes


class PlainMoE(nn.Module):
    """A ModuleList and loops over tokens, its modules called as DeepSpeed calls its own: it loads what MoE saves."""

    def __init__(self, k: int, use_residual: bool = False):
        super().__init__()
        self.k = k
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate, self.deepspeed_moe.experts = nn.Module(), nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(D, E, bias=False)
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList([FeedForward() for _ in range(E)])
        if use_residual:
            self.mlp, self.coefficient = FeedForward(), nn.Linear(D, 2)
        self.double()

    def forward(self, x, capacity=None, order="position"):
        x_TD = x.reshape(-1, D)
        probs_TE = F.softmax(self.deepspeed_moe.gate.wg(x_TD), dim=-1)
        ids = oracle.choose(probs_TE.tolist(), self.k)
        priority = [[row[e] for e in chosen] for row, chosen in zip(probs_TE.tolist(), ids)]
        kept = ids if capacity is None else oracle.keep(ids, capacity, order, priority)
        rows = []
        for x_D, probs_E, chosen in zip(x_TD, probs_TE, kept):
            here = [e for e in chosen if e >= 0]
            total = sum(probs_E[e] for e in here) if self.k > 1 else 1.0
            rows.append(
                sum((probs_E[e] / total * self.deepspeed_moe.experts.deepspeed_experts[e](x_D) for e in here), torch.zeros_like(x_D))
            )
        y = torch.stack(rows).view_as(x)
        if hasattr(self, "mlp"):
            c = F.softmax(self.coefficient(x), dim=-1)
            y = y * c[..., 0:1] + self.mlp(x) * c[..., 1:2]
        counted = [row[:1] for row in ids] if self.k == 2 else ids  # GShard balances first choices
        n_E = torch.tensor(oracle.counts(counted, E), dtype=torch.float64)
        return y, E * (n_E / n_E.sum() * probs_TE.mean(0)).sum(), torch.tensor(oracle.counts(ids, E))


CASES = {
    "all": {"drop_tokens": False},
    "position": {"capacity_factor": 0.5, "use_rts": False},
    "evaluation": {"capacity_factor": 9.0, "eval_capacity_factor": 0.5},  # which draws nothing
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("use_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_output_loss_counts_and_gradients_equal_plain_modules_called_token_by_token(k, use_residual, case):
    moe = build(k, use_residual=use_residual, top2_2nd_expert_sampling=False, **CASES[case]).train(case != "evaluation")
    plain = PlainMoE(k, use_residual)
    plain.load_state_dict(moe.state_dict())
    x, x_plain = tokens(2, T // 2), tokens(2, T // 2)
    y, l_aux, exp_counts = moe(x)
    capacity = None if case == "all" else oracle.capacity(T, E, 0.5, k, 0)
    y_plain, l_plain, counts = plain(x_plain, capacity, "probs" if k > 2 else "position")
    torch.testing.assert_close(y, y_plain, **EXACT)
    torch.testing.assert_close(l_aux, l_plain, **EXACT)
    assert torch.equal(exp_counts, counts)
    assert (exp_counts.dtype, exp_counts.requires_grad, l_aux.shape) == (torch.int64, False, ())
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    for model, given, out, loss in ((moe, x, y, l_aux), (plain, x_plain, y_plain, l_plain)):
        ((out * upstream).sum() + 3 * loss).backward()
        torch.testing.assert_close(given.grad, x.grad, **EXACT)
        assert all(p.grad is not None for p in model.parameters())
    grads = named_gradients(moe)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")


# DeepSpeed's gating functions gave these (the reference notes, section 2.2)
LOGITS = torch.tensor([[2, 1, 0], [1.5, 1, 0], [3, 0, 1], [0, 2, 1], [1, 0.5, 0], [2.5, 2, 0]], dtype=torch.float64)


def gate_weights(k, training=True, **options):
    """What of each token comes out, where gate and experts are the identity: the sum of its weights. And loss and counts."""
    expert = nn.Linear(3, 3, bias=False)
    nn.init.eye_(expert.weight)
    moe = MoE(3, expert, 3, k=k, min_capacity=0, top2_2nd_expert_sampling=False, **options).double().train(training)
    nn.init.eye_(moe.core.gate.weight)
    y, l_aux, counts = moe(LOGITS)
    share_T = (y * LOGITS).sum(1) / LOGITS.square().sum(1)
    torch.testing.assert_close(y, share_T[:, None] * LOGITS, **EXACT)
    return share_T.tolist(), l_aux.item(), counts.tolist()


def test_golden_vectors_of_top1():
    share_T, l_aux, counts = gate_weights(1, drop_tokens=False)
    assert share_T == pytest.approx([0.665241, 0.546549, 0.843795, 0.665241, 0.506480, 0.592201], abs=1e-6)
    assert (l_aux, counts) == (pytest.approx(1.514279, abs=1e-6), [5, 1, 0])
    share_T, l_aux, counts = gate_weights(1, use_rts=False)  # C = 2
    assert share_T == pytest.approx([0.665241, 0.546549, 0, 0.665241, 0, 0], abs=1e-6)
    assert (l_aux, counts) == (pytest.approx(1.514279, abs=1e-6), [5, 1, 0])


def test_golden_vectors_of_top2():
    assert gate_weights(2) == (pytest.approx([1, 1, 1, 1, 1, 0]), pytest.approx(1.514279, abs=1e-6), [5, 5, 2])  # C = 4
    assert gate_weights(2, capacity_factor=0.5)[0] == pytest.approx([1, 1, 1, 1, 0, 0])  # C = 2; of most, one choice has all the weight


def test_top3_of_three_is_balanced_and_keeps_the_most_probable():
    share_T, l_aux, counts = gate_weights(3, drop_tokens=False)
    assert (share_T, l_aux, counts) == (pytest.approx([1] * 6), pytest.approx(1.0), [6, 6, 6])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 2, 3), ()])
def test_any_leading_dims_and_a_token_alone(shape):
    y, _, counts = build(2)(tokens(*shape) if shape else tokens(1)[0])
    assert y.shape == (*shape, D)
    assert counts.sum() == 2 * (torch.zeros(shape).numel() if shape else 1)


def test_no_tokens_at_all():
    moe = build(1)
    y, l_aux, counts = moe(torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D)
    assert (l_aux.item(), counts.tolist()) == (0.0, [0] * E)
    (y.sum() + l_aux).backward()
    assert all(p.grad is not None for p in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input_and_the_gate_computes_in_float32(dtype):
    moe = build(2, use_residual=True).to(dtype)
    y, l_aux, _ = moe(tokens().to(dtype))
    assert (y.dtype, l_aux.dtype) == (dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, l_aux, _ = moe.float()(tokens().float())
    assert (y.dtype, l_aux.dtype) == (torch.float32, torch.float32)


def test_one_expert_and_capacity_above_the_number_of_tokens():
    moe = build(1, experts=1)
    y, l_aux, counts = moe(tokens(3))
    assert (l_aux.item(), counts.tolist()) == (1.0, [3])
    torch.testing.assert_close(build(1, min_capacity=100)(tokens(3))[0], build(1, drop_tokens=False)(tokens(3))[0], **EXACT)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_tokens_that_are_not_used_go_nowhere_and_count_in_the_means(k, kind):
    used = torch.arange(T) % 3 != 0
    moe = build(k, drop_tokens=False, top2_2nd_expert_sampling=False)
    y, l_aux, counts = moe(tokens(2, T // 2), used.view(2, -1).to(kind))
    assert not y.reshape(T, D)[~used].any()
    assert y.reshape(T, D)[used].any(1).all()
    assert counts.sum() == k * used.sum()
    of_used = moe.eval()(tokens()[used])
    torch.testing.assert_close(y.reshape(T, D)[used], of_used[0], **EXACT)
    if k == 1:  # DeepSpeed's formula, both means over all tokens
        probs = F.softmax(tokens() @ moe.core.gate.weight.t(), dim=-1)
        torch.testing.assert_close(l_aux, E * (probs.mean(0) * counts / T).sum(), **EXACT)


# ---------------------------------------------------------------- names


def keys(use_residual=False, prefix=""):
    names = [f"deepspeed_moe.experts.deepspeed_experts.{e}.{fc}.{n}" for e in range(E) for fc in ("fc1", "fc2") for n in ("weight", "bias")]
    names += ["deepspeed_moe.gate.wg.weight"]
    if use_residual:
        names += [f"mlp.{fc}.{n}" for fc in ("fc1", "fc2") for n in ("weight", "bias")] + ["coefficient.weight", "coefficient.bias"]
    return {prefix + name for name in names}


@pytest.mark.parametrize("use_residual", [False, True], ids=["", "residual"])
def test_state_dict_has_deepspeeds_names_and_named_parameters_ours(use_residual):
    moe = build(use_residual=use_residual)
    state = moe.state_dict()
    assert state.keys() == keys(use_residual)
    assert nn.Sequential(nn.Linear(2, D), moe).state_dict().keys() == {"0.weight", "0.bias"} | keys(use_residual, "1.")
    assert {n for n, _ in moe.named_parameters()} >= {"core.gate.weight", "core.experts.stack.fc1.weight"}
    for e in range(E):
        assert torch.equal(state[f"deepspeed_moe.experts.deepspeed_experts.{e}.fc1.bias"], moe.core.experts.stack.fc1.bias[e])
    assert not any(t.requires_grad for t in state.values())
    assert all(t.requires_grad for t in moe.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_load_state_dict_is_the_inverse(prefix, through_a_file):
    first, second = build(use_residual=True), build(use_residual=True)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    a, b = (m if not prefix else nn.Sequential(m) for m in (first, second))
    state = a.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    given = dict(state)
    missing, unexpected = b.load_state_dict(state)
    assert (missing, unexpected) == ([], [])
    assert list(state) == list(given)  # the caller's dict stays what it was
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), name


def test_our_own_names_are_loaded_too():
    moe = build()
    ours = {name: torch.full_like(p, 0.5) for name, p in moe.named_parameters()}
    moe.load_state_dict(ours)
    assert all((p == 0.5).all() for p in moe.parameters())


def test_what_is_missing_or_too_much_is_named_as_deepspeed_names_it():
    model = nn.Sequential(build())
    state, before = model.state_dict(), copy.deepcopy(model)
    gone = ["0.deepspeed_moe.gate.wg.weight", "0.deepspeed_moe.experts.deepspeed_experts.2.fc1.bias"]
    state = {name: t + 1 for name, t in state.items() if name not in gone} | {
        "0.deepspeed_moe.experts.deepspeed_experts.4.fc1.bias": torch.zeros(10), "0.extra": torch.zeros(1)
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0.deepspeed_moe.*Unexpected key.*deepspeed_experts.4.fc1.bias") as error:
        copy.deepcopy(model).load_state_dict(state)
    assert "core" not in str(error.value)
    found = model.load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == sorted(gone)
    assert sorted(found.unexpected_keys) == ["0.deepspeed_moe.experts.deepspeed_experts.4.fc1.bias", "0.extra"]
    old, new = before[0].core, model[0].core
    assert torch.equal(new.gate.weight, old.gate.weight)
    expected = old.experts.stack.fc1.bias + 1
    expected[2] -= 1  # stays as it was
    torch.testing.assert_close(new.experts.stack.fc1.bias, expected)


def test_an_expert_of_another_shape_is_refused_by_name():
    moe, other = build(), build()
    state = moe.state_dict() | {"deepspeed_moe.experts.deepspeed_experts.3.fc1.bias": torch.zeros(11)}
    with pytest.raises(RuntimeError, match=r"deepspeed_experts.3.fc1.bias is \[11\], and an expert here has \[10\]"):
        other.load_state_dict(state)


def test_loading_changes_the_dtype_and_not_the_parameters():
    moe = build(use_residual=True)
    before = list(moe.parameters())
    moe.load_state_dict({name: t.half() for name, t in build(use_residual=True).state_dict().items()})
    assert all(p is q and p.dtype == torch.float64 for p, q in zip(moe.parameters(), before))


def test_loading_by_assignment_also_from_the_meta_device():
    full = build(use_residual=True)
    with torch.device("meta"):
        empty = MoE(D, FeedForward(), E, use_residual=True)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not any(p.is_meta for p in empty.parameters())
    torch.testing.assert_close(empty.eval()(tokens())[0], full.eval()(tokens())[0], **EXACT)
    assert_marked(empty)


# ---------------------------------------------------------------- initial weights, marks, copies


def test_experts_start_as_copies_of_the_module_and_residual_keeps_the_module_itself():
    expert = FeedForward()
    state = copy.deepcopy(expert.state_dict())
    moe = MoE(D, expert, E, use_residual=True)
    for name, p in state.items():
        assert all(torch.equal(q, p) for q in moe.core.experts.stack.get_parameter(name)), name
        assert torch.equal(expert.get_parameter(name), p)
    assert moe.mlp is expert
    assert not any(p.data_ptr() == q.data_ptr() for p in expert.parameters() for q in moe.core.parameters())


def test_experts_draw_weights_of_their_own_when_asked_to():
    torch.manual_seed(3)
    expert = FeedForward()
    before = copy.deepcopy(expert.state_dict())
    moe = MoE(D, expert, E, identical_experts=False)
    weights = [*moe.core.experts.stack.fc1.weight, expert.fc1.weight]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert all(0.8 / D**0.5 < w.abs().max() <= 1 / D**0.5 for w in weights)  # as nn.Linear draws
    assert all(torch.equal(before[n], p) for n, p in expert.named_parameters())
    other = MoE(D, expert, E, identical_experts=False)
    assert not torch.equal(moe.core.experts.stack.fc1.weight, other.core.experts.stack.fc1.weight)


def test_weights_of_their_own_need_modules_that_can_draw_them():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ValueError, match=r"reset_parameters .* 1 \(Scale\) has none"):
        MoE(D, nn.Sequential(nn.Linear(D, D), Scale()), E, identical_experts=False)
    MoE(D, nn.Sequential(nn.Linear(D, D), Scale()), E)


def assert_marked(moe: MoE, name="ep_size_1"):
    marks = {n: (getattr(p, "allreduce", True), getattr(p, "group_name", None)) for n, p in moe.named_parameters()}
    assert marks == {n: (False, name) if n.startswith("core.experts.") else (True, None) for n in marks}


def test_marks_of_expert_parameters_survive_copies_and_new_memory():
    moe = build(use_residual=True)
    assert_marked(moe)
    assert_marked(copy.deepcopy(moe))
    assert_marked(moe.to(torch.float32))
    assert_marked(nn.Sequential(moe).to_empty(device="meta")[0])
    file = io.BytesIO()
    torch.save(build(), file)
    file.seek(0)
    assert_marked(torch.load(file, weights_only=False))


def test_a_copy_has_a_state_of_its_own():
    moe = build()
    twin = copy.deepcopy(moe)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(moe.state_dict())
    torch.testing.assert_close(twin.eval()(tokens())[0], moe.eval()(tokens())[0], **EXACT)


def test_the_core_is_the_products_own_layer():
    moe = build()
    assert isinstance(moe.core, MoELayer)
    assert (moe.num_local_experts, moe.expert_group_name) == (E, "ep_size_1")


# ---------------------------------------------------------------- randomness

NOISY = {
    "random token selection": {"k": 1, "capacity_factor": 0.5},
    "second expert": {"k": 2, "drop_tokens": False},
    "RSample": {"k": 1, "noisy_gate_policy": "RSample", "drop_tokens": False},
    "Jitter": {"k": 3, "noisy_gate_policy": "Jitter", "drop_tokens": False},
}


@pytest.mark.parametrize("noise", list(NOISY))
def test_noise_is_torchs_seed_in_training_and_nothing_in_evaluation(noise):
    moe = build(**NOISY[noise])
    torch.manual_seed(4)
    first, second = moe(tokens())[0], moe(tokens())[0]
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(moe(tokens())[0], first)
    assert torch.equal(moe(tokens())[0], second)
    moe.eval()
    before = torch.get_rng_state()
    assert torch.equal(moe(tokens())[0], moe(tokens())[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{"k": 1, "drop_tokens": False}, {"k": 1, "use_rts": False}, {"k": 4}, {"k": 2, "top2_2nd_expert_sampling": False}]
)
def test_nothing_is_drawn_where_nothing_is_random(options):
    moe, before = build(**options), torch.get_rng_state()
    moe(tokens())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_token_selection_keeps_the_tokens_with_the_highest_draws():
    moe = build(1, capacity_factor=0.5)
    torch.manual_seed(6)
    draws_T = uniform(drawn_keys(T, torch.device("cpu")), Purpose.TOKEN_SELECTION, 1)[:, 0]
    torch.manual_seed(6)
    y = moe(tokens())[0]
    capacity = oracle.capacity(T, E, 0.5, 1, 0)
    chosen_T = (tokens() @ moe.core.gate.weight.t()).argmax(1)
    for e in range(E):
        mine = (chosen_T == e).nonzero()[:, 0]
        expected = mine[draws_T[mine].argsort(descending=True)][:capacity]
        assert set(mine[y[mine].any(1)].tolist()) == set(expected.tolist())


def test_data_ranks_draw_other_numbers_after_the_same_seed():
    keys = []
    for rank in (0, 0, 1):
        torch.manual_seed(7)
        keys.append(drawn_keys(50, torch.device("cpu"), rank))
    assert torch.equal(keys[0], keys[1])
    assert len(set(keys[0].tolist()) | set(keys[2].tolist())) == 100
    u = uniform(torch.cat(keys[1:]), Purpose.GATE_JITTER, 40)
    assert u.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("noise", [*NOISY, "dropout"])
def test_recomputation_replays_the_noise(noise, use_reentrant):
    options = NOISY.get(noise) or {"k": 2, "expert": nn.Sequential(FeedForward(), nn.Dropout(0.3)), "output_dropout_prob": 0.2}
    moe, results = build(**options), []
    for run in (lambda moe, x: moe(x), partial(checkpoint, use_reentrant=use_reentrant)):
        moe.zero_grad()
        torch.manual_seed(8)
        x = tokens()
        y, l_aux, _ = run(moe, x)
        (y.square().sum() + l_aux).backward()
        results.append([y, l_aux, x.grad, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_dropout_inside_of_experts_and_of_the_output():
    expert = nn.Sequential(FeedForward(), nn.Dropout(0.5))
    moe = build(2, expert, drop_tokens=False, top2_2nd_expert_sampling=False)
    y, again = moe(tokens())[0], moe(tokens())[0]
    assert not torch.equal(y, again)
    assert torch.equal(moe.eval()(tokens())[0], moe(tokens())[0])
    moe = build(1, drop_tokens=False, output_dropout_prob=0.4)
    torch.manual_seed(9)
    y = moe(tokens(500))[0]
    plain = moe.eval()(tokens(500))[0]
    kept = y != 0
    torch.testing.assert_close(y[kept], plain[kept] / 0.6, **EXACT)
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.05)


def test_building_a_layer_takes_from_the_generator_what_deepspeeds_takes():
    """Its gate is an nn.Linear, and so is the coefficient; nothing else draws, not even an expert with dropout."""
    expert = nn.Sequential(FeedForward(), nn.Dropout(0.5))
    torch.manual_seed(10)
    moe = MoE(D, expert, E, use_residual=True)
    after = torch.get_rng_state()
    torch.manual_seed(10)
    gate, coefficient = nn.Linear(D, E, bias=False), nn.Linear(D, 2)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(moe.core.gate.weight, gate.weight)
    assert torch.equal(moe.coefficient.bias, coefficient.bias)


# ---------------------------------------------------------------- arguments


def test_arguments_and_defaults_are_deepspeeds():
    found = {n: p.default for n, p in inspect.signature(MoE).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    empty = inspect.Parameter.empty
    assert list(found.items()) == list({
        "hidden_size": empty, "expert": empty, "num_experts": 1, "ep_size": 1, "k": 1, "capacity_factor": 1.0, "eval_capacity_factor": 1.0,
        "min_capacity": 4, "use_residual": False, "noisy_gate_policy": None, "drop_tokens": True, "use_rts": True, "use_tutel": False,
        "enable_expert_tensor_parallelism": False, "top2_2nd_expert_sampling": True,
    }.items())  # fmt: skip


def test_the_degree_is_the_arguments_or_that_of_groups_initialize():
    expert = FeedForward()
    assert MoE(D, expert, 8).ep_size == 1
    assert MoE(D, expert, 8, ep_size=2).ep_size == 2
    groups.initialize(ep_size=4)
    assert [MoE(D, expert, 8, **given).ep_size for given in ({}, {"ep_size": None}, {"ep_size": 1}, {"ep_size": 2})] == [4, 4, 4, 2]
    moe = MoE(D, expert, 8)
    assert (moe.num_local_experts, moe.expert_group_name) == (2, "ep_size_4")
    assert_marked(moe, "ep_size_4")
    torch.testing.assert_close(moe.eval()(tokens().float())[2].sum(), torch.tensor(T))  # one process has all of them


class BiasBeside(FeedForward):
    def forward(self, x):
        return self.fc2(self.fc1(x)), self.fc2.bias


REFUSED = {
    "experts": ({"num_experts": 8, "ep_size": 3}, r"num_experts \(8\) must be divisible by ep_size \(3\); use ep_size 1, 2, 4, 8"),
    "k": ({"num_experts": 4, "k": 5}, r"k \(5\) cannot exceed num_experts \(4\)"),
    "no k": ({"k": 0}, "k must be a whole number of at least 1, not 0"),
    "degree": ({"ep_size": 0}, "ep_size must be a whole number of at least 1, not 0"),
    "a list of experts": ({"num_experts": [4, 8]}, r"num_experts must be a whole number of at least 1, not \[4, 8\]"),
    "width": ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, not 0"),
    "minimum": ({"min_capacity": -1}, "min_capacity must be a whole number of at least 0, not -1"),
    "capacity": ({"capacity_factor": 0}, "^MoE: capacity_factor must be above 0"),
    "evaluation capacity": ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor must be above 0 and finite.*drop_tokens=False"),
    "noise": ({"noisy_gate_policy": "jitter"}, "noisy_gate_policy must be None, 'None', 'Jitter' or 'RSample', not 'jitter'"),
    "RSample": (
        {"noisy_gate_policy": "RSample", "k": 2, "num_experts": 4},
        "'RSample' draws the expert of k = 1, and has no effect with k = 2",
    ),
    "tutel": ({"use_tutel": True}, "use_tutel=True"),
    "tensor parallel": ({"enable_expert_tensor_parallelism": True}, "enable_expert_tensor_parallelism=True.*cannot be cut"),
    "output dropout": ({"output_dropout_prob": 1.0}, "output_dropout_prob must be at least 0 and below 1, not 1.0"),
    "no module": ({"expert": FeedForward}, "expert must be an nn.Module, not <class"),
    "another width": ({"expert": nn.Linear(D, D + 1)}, r"Linear must return rows .*\[2, 6\] became \[2, 7\]"),
    "batch norm": ({"expert": nn.BatchNorm1d(D)}, "BatchNorm1d has buffers or batch norms"),
    "a bias beside": ({"expert": BiasBeside()}, "may return its output, or .output, None., not a tuple of 2"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_an_argument_that_cannot_be_is_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MoE(**{"hidden_size": D, "expert": FeedForward()} | options)


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ValueError, match=r"(?s)num_experts \(8\).*use_tutel=True"):
        MoE(D, FeedForward(), 8, 3, use_tutel=True)


def test_the_order_of_arguments_of_old_deepspeed_is_refused():
    with pytest.raises(ValueError, match=r"expert must be an nn\.Module, not 0\.1.*DeepSpeed 0\.4"):
        MoE(D, 0.1, FeedForward())


def test_inputs_that_do_not_fit_are_refused():
    moe = build()
    with pytest.raises(ValueError, match=r"hidden_size \(6\), not that of \[3, 7\]"):
        moe(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"each of the 24 tokens.*its shape is \[23\]"):
        moe(tokens(), torch.ones(23))
    with pytest.raises(ValueError, match="use_data_before_expert_parallelism is not built"):
        moe.set_deepspeed_parallelism(True)


def test_none_as_a_word_is_no_noise():
    assert not build(1, noisy_gate_policy="None", drop_tokens=False).draws
