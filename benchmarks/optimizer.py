"""AdamW of the product over a plain pass that reads and writes the same bytes, for a usual model and for one of many small tensors

A step of AdamW reads gradient, weight and both moments, and writes weight and moments: 28 bytes an element in float32. The floor does no
more than that, by three of torch's operations over flat tensors: m += 0 g, p *= 1, v *= 1. Clipping, reported apart, reads gradients for their
norm, then reads and writes them: its floor is sum(g) and g *= 1. Floors are flat and have no tensor boundaries; everything else takes the
parameters as the model has them. A turn is several steps in one process, in which all of them take turns.

Before anything is timed, one step of ours and of each of torch's AdamWs from the same state have to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, System, Times, interleave, paired_ratio, table
from benchmarks.product import Training, one_rank
from benchmarks.step import FLAGS
from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.clip import clip_gradients, gradient_norm
from megatron_moe.optimizer.groups import build_optimizer, weight_decay_groups

PEERS: dict[str, str] = {}

# 64 layers of norms with biases, small matrices, routers, and experts with biases: two and a half million weights in 1200 tensors
SMALL = (
    "--num-layers 64 --hidden-size 32 --ffn-hidden-size 64 --num-experts 8 --vocab-size 512 --seq-length 64 --micro-batch-size 1 "
    "--num-attention-heads 4 --expert-interval 1 --topk 2 --disable-moe-token-dropping --disable-moe-top2-2nd-expert-sampling "
    "--hidden-dropout 0 --attention-dropout 0 --mock-data --num-workers 0 --train-iters 1000 --lr 1e-3"
)
QUICK = SMALL.replace("--num-layers 64", "--num-layers 2")
CASES = {"model of the step": (FLAGS["mixtral"], 4), "many small tensors": (SMALL, 30)}  # flags, steps of a turn
QUICK_CASES = {"many small tensors": (QUICK, 1)}
THREADS = (1, 2)
ROUNDS = 9
BYTES = "the same bytes"
OURS, FOREACH, LOOP = "ours", "torch foreach", "torch, tensor by tensor"
CLIP_BYTES, OUR_CLIP, TORCH_CLIP = "the same bytes, clip", "ours, clip", "torch clip_grad_norm_"


def run(options: Options) -> Report:
    cases = QUICK_CASES if options.quick else CASES
    report = Report(
        "optimizer", {"rounds": options.rounds_or(ROUNDS), "threads": THREADS} | {name: flags for name, (flags, _) in cases.items()}
    )
    for name, (flags, steps) in cases.items():
        with one_rank(flags) as (world, mesh):
            training = Training(flags, world, mesh)
            measure(report, name, training.model, training.config.optimizer, steps, options)
    return report


def measure(report: Report, case: str, model: nn.Module, config: OptimizerConfig, steps: int, options: Options) -> None:
    """All systems over the parameters of one model, with each number of threads."""
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    optimizers = optimizers_of(model, config)
    check_equal({name: after_a_step(parameters, optimizer) for name, optimizer in optimizers.items()})
    elements = sum(p.numel() for p in parameters)
    work: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    work |= floors(elements)
    work[OUR_CLIP] = lambda: clip_gradients(parameters, gradient_norm(parameters, 1), 1e6)
    work[TORCH_CLIP] = lambda: nn.utils.clip_grad_norm_(parameters, 1e6, foreach=True)
    systems = [System(name, partial(repeat, function, steps)) for name, function in work.items()]
    size = f"{len(parameters)} tensors, {elements:,} elements"
    for threads in THREADS:
        with threads_of(threads):
            samples = interleave(systems, options.rounds_or(ROUNDS))
        samples = {name: [Times(t.wall / steps, t.cpu / steps) for t in turns] for name, turns in samples.items()}
        key = f"{case}, {threads} thread{'s' if threads > 1 else ''}"
        report.samples[key] = samples
        report.figures[key] = ratios = {name: ratios_of(samples, name) for name in samples}
        report.tables.append(f"{key}: {size}; milliseconds of a step\n" + lines_of(samples, ratios))


def optimizers_of(model: nn.Module, config: OptimizerConfig) -> dict[str, torch.optim.Optimizer]:
    """Ours, and torch's with the same groups and settings."""
    settings = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    made = {OURS: build_optimizer(model, config)}
    for name, is_foreach in ((FOREACH, True), (LOOP, False)):
        made[name] = torch.optim.AdamW(weight_decay_groups(model, config.weight_decay), foreach=is_foreach, **settings)
    return made


def after_a_step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a step makes of the parameters, which get back what they were."""
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    after = [p.detach().clone() for p in parameters]
    for p, b in zip(parameters, before):
        p.detach().copy_(b)
    return after


def check_equal(found: dict[str, list[Tensor]]) -> None:
    for name, tensors in found.items():
        for a, b in zip(tensors, found[OURS]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text: f"{name} and {OURS} make other steps: {text}")


def floors(elements: int) -> dict[str, Callable[[], object]]:
    p, m, v, g = torch.randn(4, elements).unbind(0)

    def step() -> None:
        m.add_(g, alpha=0.0)
        p.mul_(1.0)
        v.mul_(1.0)

    def clip() -> None:
        g.sum()
        g.mul_(1.0)

    return {BYTES: step, CLIP_BYTES: clip}


def repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base_of(name: str) -> str:
    return CLIP_BYTES if name in (CLIP_BYTES, OUR_CLIP, TORCH_CLIP) else BYTES


def ratios_of(samples: dict[str, list[Times]], name: str) -> dict[str, Any]:
    return {clock: paired_ratio(samples, name, base_of(name), clock)._asdict() for clock in Times._fields}


def lines_of(samples: dict[str, list[Times]], ratios: dict[str, Any]) -> str:
    rows = []
    for name in (BYTES, OURS, FOREACH, LOOP, CLIP_BYTES, OUR_CLIP, TORCH_CLIP):
        least = [f"{1e3 * min(getattr(t, clock) for t in samples[name]):.2f}" for clock in ("cpu", "wall")]
        over = [f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in (ratios[name]["cpu"], ratios[name]["wall"])]
        rows.append([name, *least, *over])
    return table(["", "cpu, least", "wall, least", "cpu over its bytes", "wall over its bytes"], rows)
