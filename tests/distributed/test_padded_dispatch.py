"""Rows padded to the capacity: the buffer of DeepSpeed, the same results as without padding, one capacity for the whole group."""
# P ranks, E experts, C capacity

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity, test_dispatchers
from megatron_moe.config.moe import MoEConfig
from megatron_moe.data.batch import Batch
from megatron_moe.moe.dispatch import Limits, LocalDispatcher, PaddedDispatcher, build_dispatcher
from megatron_moe.moe.layer import MoELayer
from megatron_moe.mpu.mesh import build_mesh
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.expert import GroupReducer
from megatron_moe.training.evaluate import evaluate

pytestmark = pytest.mark.distributed

EXPERTS, HIDDEN = test_dispatchers.EXPERTS, test_dispatchers.HIDDEN


def kept(ids: torch.Tensor, capacity: int | None) -> torch.Tensor:
    """The first `capacity` assignments of each expert, by loops."""
    places = [0] * EXPERTS
    out = ids.clone()
    for t, row in enumerate(ids.tolist()):
        for c, e in enumerate(row):
            if e >= 0 and capacity is not None and places[e] >= capacity:
                out[t, c] = -1
            elif e >= 0:
                places[e] += 1
    return out


def buffers(counts: tuple[int, ...], k: int, capacity: int) -> torch.Tensor:
    """[E, P, C, D] by loops: slot after slot in the order of tokens, zeros where there is nobody."""
    out = torch.zeros(EXPERTS, len(counts), capacity, HIDDEN, dtype=torch.float64)
    for rank in range(len(counts)):
        x, ids, _ = test_dispatchers.tokens_of(rank, counts, k)
        places = [0] * EXPERTS
        for t, row in enumerate(ids.tolist()):
            for e in row:
                if e >= 0 and places[e] < capacity:
                    out[e, rank, places[e]] = x[t].detach()
                    places[e] += 1
    return out


def largest_load(counts: tuple[int, ...], k: int) -> int:
    ids = [test_dispatchers.tokens_of(rank, counts, k)[1].flatten().tolist() for rank in range(len(counts))]
    return max(row.count(e) for row in ids for e in range(EXPERTS))


def through(counts: tuple[int, ...], k: int, capacity: int | None) -> dict:
    """As in test_dispatchers, with padding; and the same tokens through one process without any."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, ids, weights = test_dispatchers.tokens_of(rank, counts, k)
    dispatcher = PaddedDispatcher(EXPERTS, dist.group.WORLD)
    ids = kept(ids, capacity)
    plan = dispatcher.plan(ids, Limits(False, capacity, max(counts)))
    rows, offsets, row_weights, plan = dispatcher.dispatch(x, ids, weights, plan)
    scaled = test_dispatchers.fake_experts(rows, offsets, row_weights, rank * EXPERTS // ranks)
    y = dispatcher.combine(scaled, plan)
    (y.square().sum() + y.sum()).backward()
    return {"rows": rows.detach(), "offsets": offsets, "weights": row_weights.detach(), "y": y.detach(), "dx": x.grad, "dw": weights.grad}


def expected_of(rank: int, counts: tuple[int, ...], k: int, capacity: int | None) -> dict:
    x, ids, weights = test_dispatchers.tokens_of(rank, counts, k)
    dispatcher, ids = LocalDispatcher(EXPERTS), kept(ids, capacity)
    rows, offsets, row_weights, plan = dispatcher.dispatch(x, ids, weights)
    y = dispatcher.combine(test_dispatchers.fake_experts(rows, offsets, row_weights, 0), plan)
    (y.square().sum() + y.sum()).backward()
    return {"y": y.detach(), "dx": x.grad, "dw": weights.grad}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("spread", list(test_dispatchers.TOKENS))
@pytest.mark.parametrize("capacity", [None, 2, 100], ids=["largest load", "2", "more than there are tokens"])
@pytest.mark.parametrize("k", [1, 3])
def test_rows_are_the_padded_buffer_and_results_those_without_padding(world, spread, capacity, k):
    counts = test_dispatchers.TOKENS[spread][:world]
    found = run_distributed(through, world, counts, k, capacity)
    each = largest_load(counts, k) if capacity is None else min(capacity, max(counts))
    here = EXPERTS // world
    buffer_EPCD = buffers(counts, k, each)
    for rank, f in enumerate(found):
        assert f["offsets"].tolist() == [world * each * (e + 1) for e in range(here)]
        assert torch.equal(f["rows"], buffer_EPCD[rank * here : (rank + 1) * here].flatten(0, 2))
        assert not f["weights"][~f["rows"].any(1)].any()
        expected = expected_of(rank, counts, k, capacity)
        for name in ("y", "dx", "dw"):
            torch.testing.assert_close(f[name], expected[name], rtol=0, atol=1e-14, msg=name)


def test_nothing_is_asked_of_a_group_of_one():
    dispatcher = build_dispatcher("auto", EXPERTS, 1, None, pad=True)
    ids = torch.tensor([[2], [0], [-1], [2]])
    assert dispatcher.name == "padded"
    assert dispatcher.plan(ids, Limits(False, 3, 4)).slot_R.tolist() == [1, 4, 4, 4, 4, 4, 0, 3, 4, 4, 4, 4]  # 4: a zero row
    assert dispatcher.plan(ids).capacity == 2  # without a capacity, the largest load


# ---------------------------------------------------------------- unequal batches


def evaluated(counts: tuple[int, ...], dropping: bool, pad: bool) -> dict:
    """A layer in evaluation, with `counts[rank]` tokens here and other numbers elsewhere."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = build_mesh("cpu", 1, [ranks], 1)
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=(EXPERTS,), topk=2, moe_token_dropping=dropping, moe_eval_capacity_factor=0.5, moe_min_capacity=1,
                    moe_pad_expert_input_to_capacity=pad)  # fmt: skip
    layer = MoELayer(1, EXPERTS, HIDDEN, 8, moe).double().eval()
    with torch.no_grad():
        layer.gate.weight.mul_(20)
    group = mesh.expert_group(ranks)
    here, first = EXPERTS // ranks, rank * EXPERTS // ranks
    for name, p in list(layer.experts.named_parameters()):
        layer.experts.register_parameter(name, torch.nn.Parameter(p.detach()[first : first + here]))
    layer.dispatcher = build_dispatcher("alltoall", EXPERTS, 2, group, pad=pad)
    layer.reducer = GroupReducer([mesh.group("tp")], [mesh.group("dp")], group, "cpu")
    x, _, _ = test_dispatchers.tokens_of(rank, counts, 2)
    capacities = []
    plan = layer.dispatcher.plan
    layer.dispatcher.plan = lambda ids, limits: capacities.append(limits.capacity) or plan(ids, limits)
    y = layer(x)
    y.sum().backward()
    return {"y": y.detach(), "capacity": capacities, "dx": x.grad}


@pytest.mark.parametrize("dropping", [True, False], ids=["dropping", "dropless"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_unequal_tokens_and_with_none_agree_on_the_capacity(world, dropping):
    counts = test_dispatchers.TOKENS["unequal"][:world]
    assert 0 in counts
    padded, plain = (run_distributed(evaluated, world, counts, dropping, pad, timeout=60) for pad in (True, False))
    assert len({str(f["capacity"]) for f in padded}) == 1
    assert padded[0]["capacity"] == ([-(-max(counts) // 4)] if dropping else [None])  # ceil(tokens / 4 experts x 0.5 x 2)
    for f, p in zip(padded, plain):
        torch.testing.assert_close(f["y"], p["y"], rtol=0, atol=1e-12)
        torch.testing.assert_close(f["dx"], p["dx"], rtol=0, atol=1e-12)


def losses_of_evaluations(flags: str, model: str) -> float:
    c = parity.config(model, flags)
    mesh = build_parallel_mesh(c, "cpu")
    built = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(built)
    whole = parity.microbatches(0, 0, 1, 4)[0]
    mine = [slice(0, 1), slice(1, 3)][dist.get_rank()] if mesh.size("dp") == 2 else slice(0, 3)
    batch = Batch(*(None if t is None else t[mine] for t in whole))
    return evaluate(built, [batch], mesh, torch.device("cpu")).lm_loss


def test_a_model_evaluates_unequal_batches_padded():
    flags = f"{parity.FP64} --moe-expert-parallel-size 2 --moe-pad-expert-input-to-capacity"
    losses = run_distributed(losses_of_evaluations, 2, flags, "pyramid", timeout=100)
    whole = run_distributed(losses_of_evaluations, 1, parity.FP64, "pyramid")[0]
    assert losses == pytest.approx([whole, whole], abs=1e-10)
