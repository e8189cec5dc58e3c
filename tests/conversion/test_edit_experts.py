"""Edited experts: what each is made of, what follows (router, bias, moments), and when the logits stay."""

from __future__ import annotations

import functools

import pytest
import torch

from conversion.small import save_small
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion import native
from megatron_moe.conversion.convert import convert
from megatron_moe.conversion.edit import (
    EditedSource,
    Expert,
    closest,
    duplicated,
    edited_run,
    extended,
    kept,
    least_loaded,
    merged,
    pruned,
    similarities,
)
from megatron_moe.conversion.expert_load import measured, read_text, recorded
from megatron_moe.conversion.fit import run_of, tensors_to_write
from megatron_moe.conversion.source import Selection
from megatron_moe.metrics.writers import JsonlWriter
from megatron_moe.model.plain import build_plain

FP64 = {"params_dtype": "float64", "moe_kernels": "reference"}
PLAIN = {"num_experts": (4,), "mlp_type": "standard", "topk": 2, "moe_top2_2nd_expert_sampling": False, **FP64}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
W1, GATE = "layers.2.moe.experts.w1", "layers.2.moe.gate.weight"


class InMemory:
    """A `Source` that is read once, and whose numbers a test may change."""

    has_checksums = True

    def __init__(self, source):
        self.path, self.iteration, self.meta, self.tensors = source.path, source.iteration, source.meta, source.tensors
        self.numbers = dict(source.read(list(source.tensors)))

    def read(self, names):
        yield from ((name, self.numbers[name].clone()) for name in names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of these settings, as it is read from its directory."""

    @functools.cache
    def opened(settings):
        return native.open_source(save_small(tmp_path_factory.mktemp("runs") / "run", **(PLAIN | dict(settings))))

    return lambda **values: InMemory(opened(tuple(sorted(values.items()))))


def edited(source, edits, topk=None, seed=1):
    run, _ = edited_run(run_of(source), edits, topk)
    result = EditedSource(source, run, edits, seed, "test")
    tensors_to_write(result, with_optimizer=True)  # exactly what the configuration asks for
    return result


def tensor(source, name):
    ((_, t),) = source.read([name])
    return t


def outputs(source):
    run = run_of(source)
    model = build_plain(run, source.meta["vocab_size"]).to_empty(device="cpu").eval()
    tokens = torch.randint(source.meta["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(2))
    logits, _ = read_text(model, source, tokens)
    return logits, measured(model)


# ---------------------------------------------------------------- plans


def test_plans_by_hand():
    assert pruned(4, [1, 3]) == kept([0, 2])
    assert least_loaded([0.4, 0.1, 0.3, 0.2], 2) == [1, 3] and least_loaded([0.5, 0.5, 0.0], 5) == []
    assert least_loaded([0.25] * 4, 3) == [3], "of equal ones the higher goes"
    assert [str(e) for e in duplicated(3, [2, 0], 0.1)] == ["0", "1", "2", "2", "0"]
    assert [e.noise for e in duplicated(3, [2], 0.1)] == [0, 0, 0, 0.1]
    assert [str(e) for e in extended(2, 2)] == ["0", "1", "new", "new"]
    assert merged(4, [[3, 0]], [0.3, 0.2, 0.4, 0.1]) == (Expert(((0, 0.3 / 0.4), (3, 0.1 / 0.4))), *kept([1, 2]))
    assert merged(3, [[1, 2]], None)[1].parts == ((1, 0.5), (2, 0.5))
    assert merged(3, [[1, 2]], [1.0, 0.0, 0.0])[1].parts == ((1, 0.5), (2, 0.5)), "nobody came to either"


def test_the_most_similar_become_one():
    similar = torch.tensor([[1, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.8], [0.9, 0.3, 1, 0.7], [0.2, 0.8, 0.7, 1]])
    assert closest(similar, 3) == [[0, 2]]
    assert closest(similar, 2) == [[0, 2], [1, 3]]
    assert closest(similar, 4) == []
    assert closest(similar, 1) == [[0, 2, 1, 3]]
    # 1 and 2 first; then 0 is 0.5 from them on the mean, and 3 is 0.6
    assert closest(torch.tensor([[1, 0.9, 0.1, 0.5], [0.9, 1, 0.95, 0.6], [0.1, 0.95, 1, 0.6], [0.5, 0.6, 0.6, 1]]), 2) == [[1, 2, 3]]


def test_similarity_is_the_cosine_of_all_matrices(saved):
    source = saved(swiglu=True)
    stacks = [tensor(source, f"model.layers.1.moe.experts.{n}") for n in ("w1", "w_gate", "w2")]
    flat = torch.cat([s.flatten(1) for s in stacks], dim=1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert torch.allclose(similarities(source, 1), expected, atol=1e-12)


# ---------------------------------------------------------------- tensors


def test_everything_with_a_row_per_expert_follows_and_nothing_else_moves(saved):
    source = saved(moe_router_enable_expert_bias=True)
    after = edited(source, {2: pruned(4, [1])})
    changed = [name for name in source.tensors if source.tensors[name] != after.tensors[name]]
    assert {n.removeprefix("model.").removeprefix("optimizer.exp_avg.").removeprefix("optimizer.exp_avg_sq.") for n in changed} == {
        *(f"layers.2.moe.experts.{n}" for n in ("w1", "w2", "b1", "b2")), GATE, "layers.2.moe.gate.expert_bias",
    }  # fmt: skip
    assert len(changed) == 6 + 2 * 5  # parameters, their two moments; the bias of the router has none
    for name in source.tensors:
        before, now = tensor(source, name), tensor(after, name)
        assert torch.equal(now, before[[0, 2, 3]] if name in changed else before), name


def test_merged_and_new_experts_and_their_moments(saved):
    source = saved(init_method_std=0.1)
    after = edited(source, {2: merged(4, [[0, 2]], [0.3, 0.1, 0.1, 0.5]) + (Expert(),)})
    for name in (f"model.{W1}", f"model.{GATE}", f"optimizer.exp_avg.{W1}", f"optimizer.exp_avg_sq.{GATE}"):
        before, now = tensor(source, name), tensor(after, name)
        assert torch.allclose(now[0], 0.75 * before[0] + 0.25 * before[2], rtol=1e-12)
        assert torch.equal(now[1:3], before[[1, 3]])
    assert torch.equal(tensor(after, f"optimizer.exp_avg.{W1}")[3], torch.zeros(16, 24, dtype=torch.float64))
    assert torch.allclose(tensor(after, f"optimizer.exp_avg_sq.{W1}")[3], tensor(source, f"optimizer.exp_avg_sq.{W1}").mean(0))
    assert float(tensor(after, f"model.{W1}")[3].std()) == pytest.approx(0.1, rel=0.15)
    assert float(tensor(after, "model.layers.2.moe.experts.w2")[3].std()) == pytest.approx(0.1 / 2, rel=0.15)  # 2 layers
    assert torch.equal(tensor(after, f"optimizer.step.{W1}"), tensor(source, f"optimizer.step.{W1}"))


def test_copies_and_their_noise(saved):
    source = saved()
    after = edited(source, {2: duplicated(4, [1], 0.1)})
    for name in (W1, GATE):
        before, now = tensor(source, f"model.{name}"), tensor(after, f"model.{name}")
        assert torch.equal(now[:4], before)
        assert float((now[4] - before[1]).std() / before.std()) == pytest.approx(0.1, rel=0.4 if name == GATE else 0.15)
    for name in (f"optimizer.exp_avg.{W1}", "model.layers.2.moe.experts.b1"):
        assert torch.equal(tensor(after, name)[4], tensor(source, name)[1]), "neither moments nor biases"
    assert torch.equal(tensor(after, f"model.{W1}"), tensor(edited(source, {2: duplicated(4, [1], 0.1)}), f"model.{W1}"))
    assert not torch.equal(tensor(after, f"model.{W1}"), tensor(edited(source, {2: duplicated(4, [1], 0.1)}, seed=2), f"model.{W1}"))


def test_pruning_copies_gives_back_every_bit(saved):
    source = saved()
    there = edited(source, {1: duplicated(4, [0, 3], 0.1), 2: extended(4, 1)})
    back = edited(there, {1: pruned(6, [4, 5]), 2: pruned(5, [4])})
    assert back.tensors == source.tensors and back.meta["architecture"] == source.meta["architecture"]
    assert [name for name in source.tensors if not torch.equal(tensor(source, name), tensor(back, name))] == []
    assert [e["experts"] for e in back.meta["edits"]] == [
        {"1": ["0", "1", "2", "3", "0", "3"], "2": ["0", "1", "2", "3", "new"]}, {"1": ["0", "1", "2", "3"], "2": ["0", "1", "2", "3"]},
    ]  # fmt: skip


# ---------------------------------------------------------------- the logits


def test_an_expert_that_nobody_chose_can_go(saved):
    """Weights are shares of the chosen ones, so the others do not count."""
    for values in (SIGMOID, {"moe_router_enable_expert_bias": True}):
        source = saved(moe_router_normalize="chosen", **values)
        source.numbers["model.layers.1.moe.gate.expert_bias"] = torch.tensor([0.0, -9.0, 0.0, 0.0])
        before, loads = outputs(source)
        assert loads[1][1] == 0 and sum(n > 0 for n in loads[1]) == 3
        after, _ = outputs(edited(source, {1: pruned(4, [1])}))
        assert float((before - after).abs().max()) < 1e-12
        other, _ = outputs(edited(source, {1: pruned(4, [0])}))
        assert float((before - other).abs().max()) > 1e-3


def test_a_copy_without_noise_changes_nothing_for_raw_sigmoid_scores_of_one_expert(saved):
    source = saved(topk=1, moe_router_score_function="sigmoid")
    before, _ = outputs(source)
    after, _ = outputs(edited(source, {1: duplicated(4, [0, 1, 2], 0.0)}))
    assert float((before - after).abs().max()) < 1e-12


def test_twice_the_experts_and_twice_the_k_are_the_same_model(saved):
    source = saved(moe_router_normalize="chosen")
    before, _ = outputs(source)
    everything = duplicated(4, [0, 1, 2, 3], 0.0)
    after, _ = outputs(edited(source, {1: everything, 2: everything}, topk=4))
    assert float((before - after).abs().max()) < 1e-12
    halved, _ = outputs(edited(source, {1: everything, 2: everything}))
    assert float((before - halved).abs().max()) > 1e-3, "with the old k a token takes one expert twice"


def test_merging_equal_experts_changes_nothing(saved):
    source = saved(topk=1, moe_router_score_function="sigmoid")
    twice = edited(source, {1: duplicated(4, [2], 0.0)})
    back = edited(twice, {1: merged(5, closest(similarities(twice, 1), 4), None)})
    assert [str(e) for e in back.edits[1]] == ["0", "1", "2+4", "3"]
    assert float((outputs(back)[0] - outputs(source)[0]).abs().max()) < 1e-12


# ---------------------------------------------------------------- the configuration


def test_layers_with_different_numbers_are_a_pyramid(saved):
    source = saved()
    after = edited(source, {2: pruned(4, [0])})
    assert after.run.moe.num_experts == (4, 3) and after.meta["architecture"]["experts_per_layer"] == [4, 3]
    assert edited(after, {1: pruned(4, [0])}).run.moe.num_experts == (3,)


def test_dense_layers_stay_in_the_list():
    run = run_with(num_layers=6, expert_interval=2, num_experts=(4, 1, 8))
    assert edited_run(run, {6: pruned(8, [0, 1])})[0].moe.num_experts == (4, 1, 6)
    late = run_with(num_layers=4, expert_interval=1, num_experts=(4,), moe_first_k_dense_replace=2)
    assert edited_run(late, {4: extended(4, 4)})[0].moe.num_experts == (4, 8)


def run_with(**values):
    return RunConfig.from_values({"hidden_size": 16, "num_attention_heads": 2, "topk": 2} | values)


def test_an_expert_parallel_degree_that_no_longer_divides_is_lowered_and_said():
    run = run_with(num_layers=2, expert_interval=1, num_experts=(8,), moe_expert_parallel_size=8)
    after, (note,) = edited_run(run, {1: pruned(8, [0, 1]), 2: pruned(8, [0, 1])})
    assert after.moe.moe_expert_parallel_size == 2
    assert "was 8" in note and "2 is written" in note and "1, 2, 3, 6" in note
    assert edited_run(run, {1: extended(8, 8)})[1] == []


def test_what_cannot_be_is_refused():
    run = run_with(num_layers=2, expert_interval=1, num_experts=(4,))
    with pytest.raises(ConfigError, match="at least two, and of these fewer would be left: layer 1"):
        edited_run(run, {1: pruned(4, [0, 1, 2])})
    with pytest.raises(ConfigError, match=r"--topk \(3\) cannot exceed"):
        edited_run(run, {1: pruned(4, [0, 1])}, topk=3)
    with pytest.raises(ConfigError, match="all words change experts"):
        edited_run(run_with(num_layers=2, expert_interval=1, num_experts=(4,), moe_router_policy="hash"), {1: pruned(4, [0])})


# ---------------------------------------------------------------- the load


def test_recorded_loads_are_those_of_this_history_and_these_experts(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for iteration, share, count in [(1, 0.9, 2), (2, 0.7, 2), (3, 0.1, 2), (4, 0.5, 3)]:
        loads = [share, *[(1 - share) / (count - 1)] * (count - 1)]
        writer.write({"event": "train", "iteration": iteration, "moe": [{"layer": 2, "expert_load": loads}]})
    writer.write({"event": "load", "iteration": 2})
    writer.write({"event": "train", "iteration": 3, "moe": [{"layer": 2, "expert_load": [0.5, 0.5]}]})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    loads, steps = recorded(path, 3, {2: 2})
    assert steps == 3 and loads[2] == pytest.approx([0.7, 0.3])
    assert recorded(path, 1, {2: 2})[0][2] == pytest.approx([0.9, 0.1])
    assert recorded(path, 9, {2: 4}) is None and recorded(tmp_path / "no", 9, {2: 2}) is None


def test_a_written_edit_is_a_checkpoint_as_any_other(saved, tmp_path):
    after = edited(saved(), {2: pruned(4, [1])})
    convert(Selection(after, tensors_to_write(after, True)), tmp_path / "new", native.write, native.open_source, lambda _: [])
    stored = torch.empty(3, 16, 24, dtype=torch.float64)
    load_tensors(tmp_path / "new" / "iter_0000010", {f"model.{W1}": stored}, complete=())
    assert torch.equal(stored, tensor(after, f"model.{W1}"))
