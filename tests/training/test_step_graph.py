"""A step as one graph is the step: replayed from a tape, where there is no GPU, and captured where there is one."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed
from host_syncs import HostSyncs

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.moe.layer import moe_layers
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training import graphed
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.graphed import StepGraph
from megatron_moe.training.room import build_room
from megatron_moe.training.step import train_step
from tests.distributed import parity
from tests.training.taped import Tape, TapedKernels, memory_stays, taped

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2 --moe-token-dispatcher allgather"
SMALL = (
    "--num-layers 2 --num-experts 1 4 --hidden-size 16 --num-attention-heads 2 --seq-length 5 --moe-expert-parallel-size 2 --optimizer sgd"
)
fused = pytest.mark.skipif(
    not sys.platform.startswith("linux") or importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
STEPS, WARMUP = 7, 2  # as ever, as ever, captured and compared, compared, replayed three times


def steps(model_name: str, flags: str, with_graph: bool, factor: float | None = None, skewed: bool = False) -> dict:
    """Losses, norms, routing and weights of a few steps of two micro-batches each, with an evaluation in between. `factor`: over the
    fused all-to-all, with so much room for an even share of rows. `skewed`: before step 5 all tokens come to want the same experts."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = (build_parallel_model if factor is None else fused_model(factor))(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    optimizer, tapes = build_optimizer(model, c.optimizer), []
    for exchange in graphed.exchanges_of(model):
        exchange.kernels = TapedKernels(exchange.kernels, tapes)
    graph = StepGraph(WARMUP, 1e-9, partial(taped, tapes=tapes)) if with_graph else None
    room, out, waits = build_room(model, torch.device("cpu")), {}, []
    for i in range(STEPS):
        batches = parity.microbatches(i, mesh.rank("dp"), mesh.size("dp"), 2, c)
        assert len(batches) > 1
        if skewed and i == 5:
            with torch.no_grad():
                for moe in moe_layers(model):
                    moe.gate.weight.zero_()
        with memory_stays(), HostSyncs() as syncs:
            done = train_step(model, optimizer, batches, mesh, parity.learning_rate(i), 0.5, parity.SEED, i, room=room, graph=graph)
        waits.append([s for s in syncs.seen if "room.py" not in s and "exchange.py" not in s])
        out |= {f"loss {i}": done.lm_loss.clone(), f"norm {i}": done.grad_norm.clone()}
        for moe in moe_layers(model):
            out[f"routing {i} {moe.layer}"] = moe.stats.vector(torch.device("cpu")).clone()
            out[f"bytes {i} {moe.layer}"] = torch.tensor([float(moe.stats.sent_bytes), moe.stats.far_bytes], dtype=torch.float64)
        if i == 5:
            with memory_stays():
                evaluate(model, batches, mesh, torch.device("cpu"))
    out |= {name: parity.whole(t).clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    known = [*model.parameters(), *model.buffers()] + (list(graph.captured.inputs.tensors()) if graph and graph.captured else [])
    return {"out": out, "waits": waits, "captures": len(tapes), "repeats": room.repeats if room else 0,
            "outside": strange(tapes[-1], known) if tapes else []}  # fmt: skip


def fused_model(factor: float):
    from megatron_moe.kernels.fused import exchange
    from tests.distributed.fused_ranks import with_kernels

    exchange.ROUND_UP = 1  # few rows would always fit; these ranks run nothing else
    return with_kernels("static", factor)


def strange(tape: Tape, known: list[torch.Tensor]) -> list[tuple]:
    """What the tape reads of memory that is neither its own nor the model's nor an input's: who says that it will still be there?"""
    there = {getattr(t, "_local_tensor", t).untyped_storage().data_ptr() for t in known}
    return [tuple(t.shape) for where, t in tape.outside.items() if where not in there]


def check(world: int, *args, interpret: bool = False) -> list[dict]:
    """The same operations on the same numbers: the same bits, or nearly."""
    plain, replayed = (run_distributed(steps, world, *args[:2], g, *args[2:], interpret=interpret) for g in (False, True))
    for one, other in zip(plain, replayed):
        assert one["out"].keys() == other["out"].keys()
        for name, expected in one["out"].items():
            torch.testing.assert_close(
                other["out"][name], expected, rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert one["repeats"] == other["repeats"]
    return replayed


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("noisy", "--moe-loss-warmup-iters 6"),  # every dropout, jitter, a weight that grows
        pytest.param("losses", "--recompute-granularity full", marks=pytest.mark.matrix),  # counts of the step so far
        pytest.param("deepseek", "", marks=pytest.mark.matrix),  # a bias that moves behind the graph
        pytest.param("ahead", "", marks=pytest.mark.matrix),
        pytest.param("drawn", parity.DOCUMENTS, marks=pytest.mark.matrix),
        pytest.param("dropping", "--moe-pad-expert-input-to-capacity", marks=pytest.mark.matrix),
    ],
)
def test_steps_from_a_tape_are_the_steps(model, flags):
    (found,) = check(1, model, f"{parity.FP32} {flags}")
    assert found["captures"] == 1 and found["outside"] == []
    assert not any(found["waits"][WARMUP + 2 :])


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("noisy", f"{EP} --zero-stage 1"),
        pytest.param("losses", f"{EP} --zero-stage 2 --recompute-granularity selective", marks=pytest.mark.matrix),
        pytest.param("dropping", f"{EP} --zero-stage 0 --tensor-model-parallel-size 2", marks=pytest.mark.matrix),
        pytest.param("shared", f"{EP} --zero-stage 2 --bf16 --moe-ffn-hidden-size 32", marks=pytest.mark.matrix),
    ],
)
def test_layouts_that_do_not_wait_are_replayed_too(model, flags):
    for found in check(2, model, f"{parity.FP32} {flags}"):
        assert found["captures"] == 1 and not any(found["waits"][WARMUP + 2 :])


@pytest.mark.matrix
@fused
def test_the_fused_all_to_all_is_replayed_without_a_wait():
    for found in check(2, "noisy", SMALL, 4.0, interpret=True):
        assert (found["captures"], found["repeats"]) == (1, 0) and not any(found["waits"][WARMUP + 2 :])


@pytest.mark.matrix
@fused
def test_a_step_that_lacked_room_is_done_again_and_the_graph_is_made_anew():
    for found in check(2, "noisy", SMALL, 1.7, True, interpret=True):
        assert found["captures"] == 2 and found["repeats"] > 0


# ---------------------------------------------------------------- what must not be


def with_fault(fault: str) -> str:
    """What a run says whose graph keeps something of the step that was captured."""
    names = {"keys": "keys", "tokens": "microbatches", "auxiliary weight": "auxiliary_weight"}
    original = graphed.Captured.replay

    def replay(self, inputs):
        kept = {names[fault]: getattr(self.inputs, names[fault])} if fault in names else {}
        result = original(self, inputs._replace(**kept))
        if fault == "gradients":
            for p, gradient in self.gradients:
                p.grad = None if gradient is None else gradient * 2
        return result

    with mock.patch.object(graphed.Captured, "replay", replay):
        try:
            steps("noisy", f"{parity.FP32} --moe-loss-warmup-iters 6", True)
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("fault", "step"),
    [("keys", 4), ("gradients", 3), pytest.param("tokens", 4, marks=pytest.mark.matrix), pytest.param("auxiliary weight", 4, marks=pytest.mark.matrix)],
)  # fmt: skip
def test_a_graph_that_computes_something_else_ends_the_run(fault, step):
    (said,) = run_distributed(with_fault, 1, fault)
    assert f"in step {step} the graph does not compute what the step does" in said and "run without it" in said


TINY = ["--preset", "tiny", "--mock-data", "--cuda-graph-impl", "full_iteration"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("", "use --bf16"),
        ("--bf16 --hidden-size 36 --num-attention-heads 2", "(36 and"),
        ("--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size is 2"),
        ("--zero-stage 3", "--zero-stage 3"),
        ("--fp16", "--fp16"),
        ("--rampup-batch-size 2 2 8", "--rampup-batch-size"),
        ("--curriculum-learning --curriculum-min-difficulty 8 --curriculum-total-step 4", "--curriculum-learning"),
        ("--moe-kernels reference", "--moe-kernels reference"),
        ("--cpu-offloading", "--cpu-offloading"),
        ("--context-parallel-size 2 --cp-comm-type p2p", "--cp-comm-type p2p"),
        ("--moe-expert-parallel-size 2 --moe-token-dispatcher alltoall", "--moe-token-dispatcher alltoall"),
        ("--moe-expert-parallel-size 2 --moe-token-dispatcher fused --moe-fused-capacity exact", "--moe-fused-capacity exact"),
    ],
)
def test_what_no_graph_can_hold_is_refused(flags, word):
    with pytest.raises(ConfigError) as error:
        parse_args([*TINY, *flags.split()])
    assert any("--cuda-graph-impl full_iteration" in p and word in p for p in error.value.problems), error.value.problems


def refused_dispatch(model_name: str, flags: str) -> list[str]:
    c = parity.config(model_name, flags)
    model = build_parallel_model(c, parity.VOCAB, build_parallel_mesh(c, "cpu"), torch.device("cpu"), parity.FACTORIES.get(model_name))
    return list(graphed.waiting_layers(model))


@pytest.mark.parametrize(
    ("world", "model", "flags", "said"),
    [
        (2, "noisy", "--moe-expert-parallel-size 2 --moe-token-dispatcher alltoall", "asks how many rows go where"),
        (1, "modules", "", "reads on the host"),
        (1, "losses", "--moe-pad-expert-input-to-capacity", "asks for the largest load"),
        (1, "dropping", "--moe-pad-expert-input-to-capacity", None),
        (2, "noisy", EP, None),
    ],
)
def test_a_layer_whose_dispatcher_waits_is_named(world, model, flags, said):
    for problems in run_distributed(refused_dispatch, world, model, flags):
        assert len(problems) == (2 if said else 0)
        assert all(said in p and "layer" in p for p in problems)


def test_without_a_gpu_it_is_refused():
    with mock.patch("torch.cuda.is_available", return_value=False):
        (problem,) = graphed.graph_gpu_problems()
    assert "needs an NVIDIA GPU" in problem


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs an NVIDIA GPU of compute capability 9 or newer",
)
def test_on_a_gpu_replayed_steps_are_the_steps(tmp_path):
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        losses = []
        for graph in (None, StepGraph(WARMUP, graphed.HALF_TOLERANCE)):
            c, device = parity.config("noisy", "--bf16"), torch.device("cuda", 0)
            mesh = build_parallel_mesh(c, "cuda")
            model = build_parallel_model(c, parity.VOCAB, mesh, device)
            optimizer = build_optimizer(model, c.optimizer)
            for i in range(STEPS):
                batches = [b.to(device) for b in parity.microbatches(i, 0, 1, 2, c)]
                losses.append(train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, i, graph=graph).lm_loss)
        torch.testing.assert_close(torch.stack(losses[:STEPS]), torch.stack(losses[STEPS:]), rtol=2e-2, atol=0)
    finally:
        dist.destroy_process_group()
