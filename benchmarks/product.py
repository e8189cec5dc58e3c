"""A training run of the product, on one rank in this process or on several, that a benchmark drives step by step.

Flags, meshes, model, optimizer, schedule, data and `train_step` are those of pretrain_gpt_moe.py; what is left out is the
loop around them (logging, checkpoints, signals), which is not what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.data.batch import Batch, make_batch
from megatron_moe.data.loader import build_datasets, build_loader
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.schedule import build_schedule
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.distributed import World, init_distributed
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.preflight import Prepared, prepare
from megatron_moe.training.step import StepResult, train_step
from megatron_moe.utils.groups import end_groups


@contextlib.contextmanager
def one_rank(flags: str, ranks: int = 1) -> Iterator[tuple[World, ParallelMesh]]:
    """The process group and the meshes of a world of one - or of so many, in an environment as torchrun makes it. One pair serves every
    run of a process: a dense run needs no other mesh than one with experts, and torch remembers meshes by their ranks."""
    config = prepared(flags, ranks).run
    world = init_distributed(config.parallel)
    try:
        yield world, build_parallel_mesh(config, world.device.type)
    finally:
        end_groups()


def prepared(flags: str, ranks: int = 1) -> Prepared:
    parsed = parse_args(flags.split())
    check_to_train(parsed, ranks)
    return prepare(parsed.run, ranks)


class Training:
    """One run: `step()` as often as wanted, `evaluate()` in between."""

    def __init__(self, flags: str, world: World, mesh: ParallelMesh):
        ranks = world.size
        self.prepared, self.world, self.mesh = prepared(flags, ranks), world, mesh
        self.config = c = self.prepared.run
        self.model = build_parallel_model(c, self.prepared.vocab_size, mesh, world.device)
        self.optimizer = build_optimizer(self.model, c.optimizer)
        self.batch_size = c.global_batch_size(ranks)
        self.schedule = build_schedule(c.optimizer, c.pace(ranks), c.train_iterations(ranks))
        self.datasets = build_datasets(c.data, c.training.seq_length, c.training.seed, self.prepared.vocab_size)
        self.collate = partial(make_batch, eod=self.prepared.eod)
        part = mesh.rank("dp"), mesh.size("dp")
        self.num_microbatches = c.num_microbatches(ranks)
        self.batches = iter(
            build_loader(
                self.datasets.train, 0, c.training.micro_batch_size, *part, self.num_microbatches, c.data.num_workers, self.collate
            )
        )
        self.iteration = 0

    def next_batches(self) -> list[Batch]:
        """Micro-batches of one step."""
        return [next(self.batches).to(self.world.device) for _ in range(self.num_microbatches)]

    def step(self, microbatches: list[Batch] | None = None) -> StepResult:
        c, samples = self.config, (self.iteration + 1) * self.batch_size
        rate = self.schedule.at(self.iteration + 1, samples, samples * c.training.seq_length)
        result = train_step(
            self.model, self.optimizer, microbatches or self.next_batches(), self.mesh, rate, c.optimizer.clip_grad, c.training.seed,
            self.iteration,
        )  # fmt: skip
        self.iteration += 1
        return result

    def evaluate(self, batches: int) -> float:
        """Loss on the first batches of the validation split, in nats."""
        c = self.config
        loader = build_loader(self.datasets.valid, 0, c.training.micro_batch_size, 0, 1, 1, 0, self.collate, num_steps=batches)
        result = evaluate(self.model, loader, self.mesh, self.world.device)
        assert result is not None
        return result.lm_loss
