"""Whole training runs inside a worker of the pool: what pretrain_gpt_moe.py does between parsing and the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe import mpu
from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.data.indexed_dataset import IndexedDatasetWriter
from megatron_moe.training import pretrain
from megatron_moe.training.distributed import World
from megatron_moe.training.preflight import prepare
from megatron_moe.training.pretrain import set_up, train

SMALL = (
    "--num-layers 3 --expert-interval 1 --num-experts 1 2 4 --mlp-type residual --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-warmup-iters 3 --lr-decay-style cosine "
    "--hidden-dropout 0.1 --attention-dropout 0 --eval-iters 2 --eval-interval 7 --log-interval 1 --num-workers 0"
)
FP64 = "--params-dtype float64 --moe-kernels reference"


def write_text(prefix: Path, documents: int = 40, vocab_size: int = 64) -> Path:
    """A small indexed dataset: 40 documents of 5 to 40 tokens, a few epochs of which make a test."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(generator.integers(0, vocab_size, generator.integers(5, 41)))
    return prefix


def train_here(flags: str, small: str = SMALL) -> dict:
    """Run to its end on the ranks of this pool; returns its progress and every tensor as a whole."""
    parsed = parse_args(f"{small} {flags}".split())
    check_to_train(parsed, dist.get_world_size())
    prepared = prepare(parsed.run, dist.get_world_size())
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    try:
        run = set_up(prepared, world, ["test"])
        train(run)
        run.close()
        state = model_state(run.model) | optimizer_state(run.model, run.optimizer)
        tensors = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
        return {"tensors": {n: t.detach().clone() for n, t in tensors.items()}, "progress": run.progress}
    finally:
        mpu.set_default_mesh(None)


def read_here(flags: str) -> dict:
    """The same run, looked at from its data: beside `progress` what the model was given, one {sample id: tokens} per step.

    Of this rank alone, and training only: whoever calls puts the ranks together.
    """
    steps, original = [], pretrain.train_step

    def train_step(model, optimizer, microbatches, *rest):
        texts = [torch.cat([b.tokens, b.labels[:, -1:]], 1).tolist() for b in microbatches]
        pairs = [(i, text) for b, rows in zip(microbatches, texts) for i, text in zip(b.sample_ids.tolist(), rows)]
        assert len(dict(pairs)) == len(pairs), f"a sample came twice: {[i for i, _ in pairs]}"
        steps.append(dict(pairs))
        return original(model, optimizer, microbatches, *rest)

    pretrain.train_step = train_step
    try:
        return {"progress": train_here(flags)["progress"], "steps": steps}
    finally:
        pretrain.train_step = original
