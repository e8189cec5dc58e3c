"""--compile: the same training, in graphs without a break, and the same graphs whatever the router does.

aot_eager traces, partitions and guards as inductor does, and then runs torch's own operators: all but the code generation.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from distributed_pool import close_pools, run_distributed
from torch._dynamo.utils import counters
from training import runs

from distributed import parity
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.compile import apply_compile, of_any_rows
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2"
TP = "--tensor-model-parallel-size 2"
ETP = "--expert-tensor-parallel-size 2"


def compiling(backend: str):
    """As --compile does it, with another backend; nothing left of the graphs before."""
    torch._dynamo.reset()
    counters.clear()
    return mock.patch("megatron_moe.parallel.apply.apply_compile", functools.partial(apply_compile, backend=backend))


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------- the same numbers


def compiled_layout(backend: str, model: str, flags: str) -> dict[str, torch.Tensor] | None:
    with compiling(backend):
        result = parity.layout(model, f"{flags} --compile")
    assert graphs() > 0
    return result


COMPILED = [
    ("dropping", 2, f"{EP} --zero-stage 3"),
    ("noisy", 2, f"{TP} {EP} --recompute-granularity selective"),
    ("losses", 2, f"{TP} {EP} --recompute-granularity full"),
    ("modules", 2, f"{EP} --zero-stage 3"),
    ("shared", 2, f"{EP} --zero-stage 1"),  # the shared expert beside rows that travel
]
MORE_COMPILED = [  # with --full
    ("shared", 2, f"{EP} --zero-stage 3 --moe-pad-expert-input-to-capacity"),
    ("latent", 2, f"{TP} {EP} --recompute-granularity full"),
    ("modern", 2, f"{TP} {EP} --zero-stage 2 --moe-token-dispatcher allgather --recompute-granularity full"),
    ("student", 2, f"{TP} {EP}"),
    (
        "pyramid",
        2,
        f"{EP} --zero-stage 3 --cross-entropy-loss-chunk-size 24 --recompute-granularity selective --recompute-modules moe mlp",
    ),
    ("modern", 2, f"{TP} {EP} --zero-stage 1 --cross-entropy-loss-chunk-size 24"),
    ("pyramid", 2, f"{ETP} --zero-stage 3 --recompute-granularity full"),
    ("dropping", 2, f"{ETP} --zero-stage 0 --moe-token-dispatcher alltoall"),
    ("shared", 2, f"{TP} {EP} --zero-stage 2 --moe-overlap-chunks 3 --recompute-granularity full"),
    ("noisy", 2, f"{TP} {EP} --sequence-parallel --recompute-granularity selective {parity.DIVISIBLE}"),
    ("modern", 2, f"{TP} --sequence-parallel --recompute-granularity full {parity.DIVISIBLE}"),
    ("losses", 2, f"--context-parallel-size 2 {EP} --recompute-granularity full {parity.DIVISIBLE}"),
    ("noisy", 2, f"--context-parallel-size 2 --zero-stage 3 {parity.DIVISIBLE} {parity.DOCUMENTS}"),
    ("pyramid", 4, "--tensor-model-parallel-size 4 --zero-stage 3"),  # heads that are shared
    ("noisy", 2, "--pipeline-model-parallel-size 2 --recompute-granularity full"),
    ("latent_heads", 2, f"{TP} {EP} --recompute-granularity full"),
    ("qk_hidden", 2, f"{TP} --sequence-parallel {parity.DIVISIBLE}"),
    ("modern", 4, f"--pipeline-model-parallel-size 2 {EP} --zero-stage 3"),
    ("ahead", 2, f"{TP} {EP} --sequence-parallel --recompute-granularity full --cross-entropy-loss-chunk-size 24 {parity.DIVISIBLE}"),
    ("ahead_untied", 2, f"--pipeline-model-parallel-size 2 {parity.DOCUMENTS}"),
]


@pytest.mark.parametrize(
    ("model", "world", "flags"),
    [*COMPILED, *(pytest.param(*row, marks=pytest.mark.matrix) for row in MORE_COMPILED)],
    ids=lambda v: str(v).replace("--", "").replace(" ", "_"),
)
def test_a_compiled_layout_equals_one_process_in_float64(model, world, flags):
    found = run_distributed(compiled_layout, world, "aot_eager", model, f"{parity.FP64} {flags}")[0]
    parity.check(found, parity.expected(model, world, flags), 1e-10)


@pytest.mark.matrix
@pytest.mark.slow
def test_a_compiled_layout_equals_one_process_in_float32_with_inductor():
    """The model with every dropout: the counter hash as generated C++ draws the same bits."""
    flags = f"{parity.FP32} {TP} {EP} --zero-stage 3"
    # In processes of its own, as a run is: in workers that have seen the meshes of a hundred layouts torch 2.13 leaves a slice of a
    # mesh in the graph ("device_mesh._get_submesh is not an OpOverload").
    close_pools()
    found = run_distributed(compiled_layout, 2, "inductor", "noisy", flags, timeout=280)[0]
    parity.check(found, parity.reference("noisy", parity.FP32), 1e-5)


def trained(backend: str | None, flags: str) -> dict:
    if backend is None:
        return runs.train_here(flags)
    with compiling(backend):
        return runs.train_here(f"{flags} --compile") | {"graphs": graphs()}


def test_a_whole_run_with_evaluations_ends_at_the_same_weights_under_the_same_names():
    flags = f"{runs.FP64} --mock-data --train-iters 5 --eval-interval 2"
    plain, compiled = (run_distributed(trained, 1, backend, flags)[0] for backend in (None, "aot_eager"))
    assert compiled["graphs"] > 0
    assert compiled["tensors"].keys() == plain["tensors"].keys()
    for name, tensor in plain["tensors"].items():
        torch.testing.assert_close(compiled["tensors"][name], tensor, rtol=0, atol=1e-10, msg=name)


# ---------------------------------------------------------------- the same graphs


def noting_rows(forward, rows: list[int]):
    def noted(x, *rest):
        rows.append(len(x))
        return forward(x, *rest)

    return noted


def graphs_over_steps(model_name: str, flags: str) -> tuple[list[int], list[int]]:
    """Graphs after the first step, the first evaluation, and 20 more steps with evaluations; rows of this rank's experts."""
    c = parity.config(model_name, f"{flags} --compile")
    mesh = build_parallel_mesh(c, "cpu")
    with compiling("aot_eager"):
        model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    optimizer, rows, found = torch.optim.SGD(model.parameters(), lr=0.1), [], []
    for moe in moe_layers(model):  # not a hook: of several parts in one call each counts
        moe.experts.forward = noting_rows(moe.experts.forward, rows)
    for i in range(22):
        batches = parity.microbatches(i, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
        if i == 9:
            with torch.no_grad():  # equal scores: every token to the first experts, and nothing to the last ones
                for moe in moe_layers(model):
                    moe.gate.weight.zero_()
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, i)
        optimizer.step()
        optimizer.zero_grad()
        if i == 0:
            found.append(graphs())
        if i % 5 == 1:
            evaluate(model, batches, mesh, torch.device("cpu"))
        if i == 1:
            found.append(graphs())
    return [*found, graphs()], rows


@pytest.mark.parametrize(
    ("model", "flags", "in_training", "in_evaluation"),
    [
        # embed, attend, feed_forward, normalise, jittered, decide, experts, finish, losses; evaluation has no jitter
        pytest.param("noisy", f"{EP} --recompute-granularity full", 9, 8, marks=pytest.mark.matrix),
        ("dropping", f"{TP} {EP} --recompute-granularity selective", 8, 8),
        # 2 and 8 experts: two graphs of decide and of the experts; the dense branch, in the gap of the exchange, is one of its own
        pytest.param("pyramid", f"{EP} --moe-token-dispatcher alltoall --zero-stage 3 --bf16", 11, 11, marks=pytest.mark.matrix),
        # whatever a part has of the rows
        ("noisy", f"{EP} --moe-overlap-chunks 2 --recompute-granularity full", 9, 8),
    ],
    ids=["noisy", "dropping", "pyramid", "parts"],
)
def test_twenty_steps_of_varying_routing_make_no_further_graph(model, flags, in_training, in_evaluation):
    results = run_distributed(graphs_over_steps, 2, model, flags)
    for (first, evaluated, last), _ in results:
        assert (first, evaluated - first) == (in_training, in_evaluation)
        assert last == evaluated
    all_rows = [rows for _, rows in results]
    assert len({n for rows in all_rows for n in rows}) > 5  # the routing did vary
    assert model == "pyramid" or 0 in all_rows[1]


@pytest.mark.parametrize(
    ("model", "in_training", "sizes"),
    [
        ("noisy", 9, range(6, 100)),  # the largest load changes from step to step, and the number of rows with it
        ("dropping", 8, [2]),  # one number in training, another one in evaluation
    ],
)
def test_rows_padded_to_the_capacity_make_no_further_graph(model, in_training, sizes):
    flags = f"{EP} --recompute-granularity full --moe-pad-expert-input-to-capacity"
    for (first, evaluated, last), rows in run_distributed(graphs_over_steps, 2, model, flags):
        assert (first, evaluated - first, last) == (in_training, 8, evaluated)
        assert len(set(rows)) in sizes


@pytest.mark.parametrize("activation", ["gelu", "squared_relu", "swiglu"])
def test_any_number_of_rows_is_computed_by_one_graph(activation):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    experts = Experts(3, 8, 12, activation).double()
    forward = of_any_rows(torch.compile(experts.forward, fullgraph=True, dynamic=False, backend="aot_eager"))
    for rows in ([2, 0, 3], [0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 9]):
        offsets = torch.tensor(rows).cumsum(0).to(torch.int32)
        results = []
        for f in (forward, experts):
            x = torch.randn(sum(rows), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            weights = torch.linspace(0.1, 1, sum(rows), dtype=torch.float64).requires_grad_()
            y = f(x, offsets, weights, False)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weights, *experts.parameters()))))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert graphs() == 1


def _breaking(*_):
    torch._dynamo.graph_break()


def test_a_graph_break_in_a_region_is_an_error():
    from megatron_moe.moe import layer

    torch._dynamo.reset()
    model = build_plain()
    apply_compile(model, "aot_eager")
    with mock.patch.object(layer, "count_assignments", _breaking), pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])


def test_layers_of_many_sizes_each_have_their_graphs():
    """More sizes than torch's default limit of graphs for one function allows, in training and evaluation together."""
    torch._dynamo.reset()
    counters.clear()
    model = build_plain("--num-layers 6 --expert-interval 1 --num-experts 2 3 4 5 6 7 --topk 2")
    apply_compile(model, "aot_eager")
    tokens, positions = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    for _ in range(2):
        model(tokens, positions, tokens).sum().backward()
        with torch.no_grad():
            model.eval()(tokens, positions, tokens)
        model.train()
    assert graphs() == 2 * (6 * 2 + 5)  # decide and experts of each layer; embed, attend, normalise, finish, losses


def build_plain(flags: str = ""):
    from megatron_moe.model.gpt import GPT

    c = parity.config("pyramid", f"{flags} --mlp-type standard")
    return GPT(c.model, c.moe, parity.VOCAB)
