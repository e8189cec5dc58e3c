"""--cuda-graph-impl full_iteration: forward and backward of all micro-batches of a step are one CUDA graph, which the host launches at once.

A graph does the same work in the same memory each time. So all that changes from step to step is a tensor of its own, into which the
step's is copied: the micro-batches, the keys of everything random, the divisor, the weight of the auxiliary losses. Gradients, the loss
and the statistics of the router lie where the graph puts them, and are handed out after every replay. Norm, clip and update follow as ever.

    warm-up steps: as ever; kernels are compiled, buffers of the fused all-to-all are made
    first step after them: captured
    it and the next one: done in both ways, and compared - loss and every gradient; what a graph has kept of an earlier step would differ
    all others: replayed

It no longer holds when the fused all-to-all has got other buffers (a step that lacked room, an evaluation that needed more): then a step
goes as ever, and the one after it is captured and compared again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.kernels.fused.exchange import Exchange
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.dispatch import AllGatherDispatcher, LocalDispatcher, PaddedDispatcher
from megatron_moe.moe.dispatch.fused import FusedDispatcher
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.moe.module_experts import ModuleExperts
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.training.step import auxiliary_weight, keys_of, language_model_loss, one_by_one
from megatron_moe.utils.logging import logger

COMPARED_STEPS = 2  # the second has other tokens, keys and weights than those that were captured
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2  # in 32 and 16 bits, of the largest element: sums by atomics are in any order

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def capture_on_gpu(work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """(what does it again, its result): nothing is computed yet, and memory is the graph's own for as long as it lives."""
    graph = torch.cuda.CUDAGraph()
    # other threads may do what a capture must not: pin the next batch, look after NCCL
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


class StepInputs(NamedTuple):
    """All that a step's forward and backward know of the step."""

    microbatches: list[Batch]
    keys: list[Tensor]
    divisor: Tensor
    auxiliary_weight: Tensor  # float64, 0-dim; empty without MoE layers

    def tensors(self) -> Iterator[Tensor]:
        for batch in self.microbatches:
            yield from (t for t in batch if t is not None)
        yield from (*self.keys, self.divisor, self.auxiliary_weight)

    def copied(self) -> StepInputs:
        batches = [Batch(*(None if t is None else t.clone() for t in batch)) for batch in self.microbatches]
        return StepInputs(batches, [k.clone() for k in self.keys], self.divisor.clone(), self.auxiliary_weight.clone())


def inputs_of(
    model: GPT, microbatches: Sequence[Batch], divisor: Tensor, mesh: ParallelMesh, seed: int, iteration: int
) -> StepInputs:  # fmt: skip
    layers = moe_layers(model)  # of one configuration
    weight = auxiliary_weight(layers[0].config, microbatches, mesh, iteration) if layers else 0.0
    # filled on the device: a copy of a number would make the host wait
    weight_on_device = torch.full((), weight, dtype=torch.float64, device=divisor.device)
    return StepInputs(list(microbatches), keys_of(microbatches, seed, iteration), divisor, weight_on_device)


@dataclass
class Layer:
    """What a MoE layer shows of a step: it is computed in the graph's memory, and whoever evaluates in between resets it."""

    moe: MoELayer
    sums: Tensor | None
    sent_bytes: Any
    far_bytes: float
    batch_counts_E: Tensor | None

    def show(self) -> None:
        stats = self.moe.stats
        stats.sums, stats.sent_bytes, stats.far_bytes, self.moe.batch_counts_E = (
            self.sums, self.sent_bytes, self.far_bytes, self.batch_counts_E,
        )  # fmt: skip


class Captured:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, capture: Capture, model: GPT, inputs: StepInputs, mesh: ParallelMesh):
        assert all(p.grad is None for p in model.parameters()), "gradients of an earlier step"
        self.inputs = inputs.copied()
        for moe in moe_layers(model):
            moe.begin_step(self.inputs.auxiliary_weight)
        work = self.inputs
        self.replay_it, self.loss = capture(
            lambda: one_by_one(model, work.microbatches, work.keys, work.divisor, mesh, language_model_loss)
        )
        self.gradients = taken_gradients(model)
        self.layers = [Layer(m, m.stats.sums, m.stats.sent_bytes, m.stats.far_bytes, m.batch_counts_E) for m in moe_layers(model)]
        self.buffers = [(exchange, exchange._buffers) for exchange in exchanges_of(model)]

    def holds(self) -> bool:
        """Whether the memory that it works in is still there. (Parameters are changed in place.)"""
        return all(exchange._buffers is buffers for exchange, buffers in self.buffers)

    def replay(self, inputs: StepInputs) -> Tensor:
        for mine, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            assert mine.shape == given.shape, f"captured with {tuple(mine.shape)}, not {tuple(given.shape)}"
            mine.copy_(given)
        self.replay_it()
        for p, gradient in self.gradients:
            p.grad = gradient
        for layer in self.layers:
            layer.show()
        return self.loss.clone()  # which the caller sums in place


class StepGraph:
    """In place of `forward_backward`, for steps of one shape. `capture`: tests have one of their own."""

    def __init__(self, warmup_steps: int, tolerance: float = TOLERANCE, capture: Capture = capture_on_gpu):
        assert warmup_steps >= 1, warmup_steps
        self.as_ever, self.tolerance, self.capture = warmup_steps, tolerance, capture
        self.captured: Captured | None = None
        self.to_compare = 0

    def __call__(
        self, eager: Callable[[], Tensor], model: GPT, microbatches: Sequence[Batch], divisor: Tensor, mesh: ParallelMesh, seed: int,
        iteration: int,
    ) -> Tensor:  # fmt: skip
        """`eager`: the same without a graph. Returns what that does, and leaves the same gradients and statistics."""
        if self.captured is not None and not self.captured.holds():
            logger.info("step %d: the buffers of the fused all-to-all are others, so the CUDA graph is made anew", iteration + 1)
            self.captured, self.as_ever = None, 1
        if self.as_ever:
            self.as_ever -= 1
            return eager()
        inputs = inputs_of(model, microbatches, divisor, mesh, seed, iteration)
        if self.captured is None:
            self.captured, self.to_compare = Captured(self.capture, model, inputs, mesh), COMPARED_STEPS
        if not self.to_compare:
            return self.captured.replay(inputs)
        self.to_compare -= 1
        loss = eager()
        expected = taken_gradients(model)
        if not self.captured.holds():  # eager work has just made room: nothing to compare with
            give_gradients(expected)
            return loss
        replayed = self.captured.replay(inputs)
        refuse_difference(first_difference(model, replayed, loss, expected, self.tolerance), iteration, loss.device)
        return replayed


def taken_gradients(model: nn.Module) -> list[tuple[nn.Parameter, Tensor | None]]:
    """From the parameters, which have none then."""
    taken = [(p, p.grad) for p in model.parameters()]
    for p, _ in taken:
        p.grad = None
    return taken


def give_gradients(gradients: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    for p, gradient in gradients:
        p.grad = gradient


def first_difference(
    model: nn.Module, loss: Tensor, expected_loss: Tensor, expected: list[tuple[nn.Parameter, Tensor | None]], tolerance: float
) -> str | None:
    """What is not the same after a replay; the host waits. A gradient may differ by `tolerance` of its largest element - or, where all of it
    has cancelled out, of a thousandth of the largest of all."""
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [("the loss", loss, expected_loss)]
    for p, wanted in expected:
        if (p.grad is None) != (wanted is None):
            return f"the gradient of {names[id(p)]} is {'missing' if p.grad is None else 'there'}"
        if wanted is not None and _local(wanted).numel():
            pairs.append((f"the gradient of {names[id(p)]}", _local(p.grad), _local(wanted)))
    sizes = [float(wanted.abs().max()) for _, _, wanted in pairs]
    least = max(sizes[1:], default=0.0) * 1e-3
    for (name, found, wanted), size in zip(pairs, sizes):
        by = float((found - wanted).abs().max()) / (max(size, least) or 1.0)
        if not by <= tolerance:  # nor NaN
            return f"{name} differs by {by:.3g} of its largest element, and {tolerance:g} may be rounding"
    return None


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def refuse_difference(difference: str | None, iteration: int, device: torch.device) -> None:
    """Collective: all ranks raise RuntimeError where one has a difference."""
    differing = torch.tensor(int(difference is not None), device=device)
    if dist.is_initialized():
        dist.all_reduce(differing)
    if int(differing):
        raise RuntimeError(
            f"--cuda-graph-impl full_iteration: in step {iteration + 1} the graph does not compute what the step does: "
            f"{difference or 'on another rank, which says what'}; run without it, and report this"
        )


# ---------------------------------------------------------------- where there can be one


def exchanges_of(model: GPT) -> list[Exchange]:
    found = {id(d.exchange): d.exchange for moe in moe_layers(model) if isinstance(d := moe.dispatcher, FusedDispatcher)}
    return list(found.values())


def build_step_graph(run: RunConfig, model: GPT | PipelinedGPT) -> StepGraph | None:
    """Raises ConfigError where a layer waits for the device, which nobody knows before dispatchers are chosen."""
    if run.training.cuda_graph_impl == "none":
        return None
    if problems := list(waiting_layers(model)):
        raise ConfigError(problems)
    return StepGraph(run.training.cuda_graph_warmup_steps, HALF_TOLERANCE if run.training.half else TOLERANCE)


def waiting_layers(model: GPT | PipelinedGPT) -> Iterator[str]:
    for moe in moe_layers(model):
        if (why := _why_it_waits(moe)) is not None:
            yield (
                f"--cuda-graph-impl full_iteration: layer {moe.layer}, whose rows travel by {moe.dispatcher.name}, {why}, and nothing waits in a "
                "CUDA graph; take --moe-token-dispatcher fused (--moe-fused-capacity static or worst) or allgather, or leave the graph out"
            )


def _why_it_waits(moe: MoELayer) -> str | None:
    d = moe.dispatcher
    if isinstance(moe.experts, ModuleExperts):
        return "reads on the host where the rows of its experts end"
    if isinstance(d, FusedDispatcher):
        return "asks how many rows come (--moe-fused-capacity exact)" if d.exchange.policy == "exact" else None
    if isinstance(d, PaddedDispatcher):
        return None if moe.config.moe_token_dropping else "asks for the largest load"
    # LocalDispatcher is the base of all; what is not one of these two by itself, tells its sizes to the host
    return None if type(d) in (LocalDispatcher, AllGatherDispatcher) else "asks how many rows go where"


def graph_gpu_problems() -> Iterator[str]:
    """Of this machine."""
    what = "--cuda-graph-impl full_iteration"
    if not torch.cuda.is_available():
        yield f"{what} needs an NVIDIA GPU, and torch sees none here; leave it out"
    elif torch.cuda.get_device_capability() < (9, 0):
        major, minor = torch.cuda.get_device_capability()
        yield (
            f"{what} needs compute capability 9.0 or newer, and this GPU has {major}.{minor}: there torch's grouped products read the sizes of "
            "experts on the host, which no graph can; leave it out"
        )
