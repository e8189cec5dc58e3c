"""Every layout trains the model that one process trains: loss, every gradient, norm, weights after four steps."""

from __future__ import annotations

import pytest
from distributed_pool import run_distributed

from distributed import parity

pytestmark = pytest.mark.distributed

PADDED = "--moe-pad-expert-input-to-capacity"
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"  # of four layers: two stages on each rank
ZERO_BUBBLE = "--pipeline-schedule zero-bubble"
EP2, TP2, RECOMPUTE = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2", "--recompute-granularity full"
PIPELINE_LAYOUTS = [
    ("pyramid", 2, PP2),  # stages of one rank, without FSDP; layers 2 + 1, tied embeddings
    ("deep", 2, INTERLEAVED),
    ("deep", 2, f"{PP2} --enable-zbh1-pipeline"),
    ("deep", 2, f"{INTERLEAVED} {ZERO_BUBBLE} --recompute-granularity full"),
    ("deep", 2, f"{PP2} --pipeline-schedule gpipe --decoder-first-pipeline-num-layers 1"),
    ("deep", 4, f"--zero-stage 1 {PP4}"),  # stages in the middle
    ("pyramid", 4, f"--zero-stage 3 {PP2} {EP2}"),
    ("deep", 4, f"--zero-stage 0 {PP2} {EP2}"),
    ("deep", 4, f"--zero-stage 3 {INTERLEAVED} {EP2} {RECOMPUTE}"),
    ("deep", 4, f"--zero-stage 0 {INTERLEAVED} {ZERO_BUBBLE} {EP2}"),
    ("deep", 4, f"--zero-stage 2 {PP2} {ZERO_BUBBLE} {EP2} {RECOMPUTE}"),
    ("deep", 4, f"--zero-stage 1 {INTERLEAVED} {ZERO_BUBBLE} {TP2} {EP2}"),
    ("late", 4, f"--zero-stage 1 {PP2} {EP2}"),  # a stage without experts; untied
    ("late", 4, f"--zero-stage 2 {INTERLEAVED} {ZERO_BUBBLE} {TP2}"),
    ("modern", 4, f"--zero-stage 1 {PP2} {TP2} {EP2} --recompute-granularity selective"),
    ("noisy", 4, f"--zero-stage 3 {PP2} {TP2} {EP2} {RECOMPUTE}"),
    ("noisy", 4, f"--zero-stage 1 {PP2} {ZERO_BUBBLE} {EP2} {RECOMPUTE}"),
    ("losses", 4, f"--zero-stage 2 {PP2} {EP2}"),
    ("losses", 4, f"--zero-stage 1 {PP2} {ZERO_BUBBLE} {TP2} {EP2}"),
    ("deepseek", 4, f"--zero-stage 1 {PP2} {EP2} {RECOMPUTE}"),  # a bias that moves by the counts of the stage
    ("hash", 4, f"--zero-stage 1 {PP2} {TP2} {EP2}"),  # the words, on stages that embed none
    ("dropping", 4, f"--zero-stage 1 {PP2} {EP2} {PADDED}"),
    ("shared", 4, f"--zero-stage 2 {PP2} {ZERO_BUBBLE} {TP2}"),
    ("modules", 4, f"--zero-stage 3 {PP2} {EP2} --moe-token-dispatcher allgather"),
    ("deep", 8, f"--zero-stage 3 {PP2} {TP2} --moe-expert-parallel-size 4"),  # degrees 2 and 4
    ("deep", 8, f"--zero-stage 2 {INTERLEAVED} --moe-expert-parallel-size 4 {RECOMPUTE}"),  # one micro-batch for four stages
    ("deep", 8, f"--zero-stage 1 {PP4} {ZERO_BUBBLE} {EP2}"),
]
LAYOUTS = [  # model, world size, flags
    *(("pyramid", 1, f"--zero-stage {z}") for z in (0, 3)),
    *(("pyramid", 2, f"--zero-stage {z}") for z in (0, 1, 2, 3)),
    *(("pyramid", 2, f"--zero-stage {z} --moe-expert-parallel-size 2") for z in (0, 1, 2, 3)),
    ("pyramid", 2, "--zero-stage 1 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    *(("pyramid", 2, f"--zero-stage {z} --tensor-model-parallel-size 2") for z in (0, 1, 2, 3)),
    ("pyramid", 2, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"),
    *(("pyramid", 4, f"--zero-stage {z} --moe-expert-parallel-size 4") for z in (0, 1, 3)),  # degrees 2 and 4
    *(("pyramid", 4, f"--zero-stage {z} --moe-expert-parallel-size 2") for z in (0, 3)),  # fewer local experts than edp ranks
    *(("pyramid", 4, f"--zero-stage {z} --tensor-model-parallel-size 2 --moe-expert-parallel-size 4") for z in (0, 2, 3)),
    ("pyramid", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("pyramid", 4, "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("pyramid", 4, "--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("modern", 2, "--zero-stage 3 --moe-expert-parallel-size 2"),
    ("modern", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),
    ("modern", 4, "--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity selective"),
    ("noisy", 2, "--zero-stage 1 --tensor-model-parallel-size 2"),
    ("noisy", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("rates", 2, "--zero-stage 0 --moe-expert-parallel-size 2"),
    ("rates", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("student", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("student", 2, "--zero-stage 2 --tensor-model-parallel-size 2"),
    ("student", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),
    ("student", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("dropping", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("dropping", 4, "--zero-stage 3 --moe-expert-parallel-size 4"),
    *((policy, 2, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2") for policy in ("deepseek", "hash", "zipf")),
    *((policy, 2, "--zero-stage 1 --moe-expert-parallel-size 2") for policy in ("drawn", "expert_choice", "sinkhorn")),
    ("expert_choice", 2, "--zero-stage 2 --moe-expert-parallel-size 2 --moe-token-dispatcher alltoall"),
    *(
        (policy, 4, "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full")
        for policy in ("deepseek", "drawn", "expert_choice")
    ),
    ("dropping", 2, f"--zero-stage 1 --moe-expert-parallel-size 2 {PADDED}"),
    ("dropping", 4, f"--zero-stage 3 --moe-expert-parallel-size 2 --recompute-granularity full {PADDED}"),
    ("pyramid", 4, f"--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full {PADDED}"),
    ("shared", 2, "--zero-stage 2 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("shared", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("latent", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("latent", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("latent", 4, f"--zero-stage 2 --tensor-model-parallel-size 4 --moe-expert-parallel-size 2 {PADDED}"),
    ("modules", 2, "--zero-stage 0 --tensor-model-parallel-size 2"),
    ("modules", 4, "--zero-stage 1 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("modules", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("modules", 4, f"--zero-stage 3 --moe-expert-parallel-size 4 {PADDED}"),
    ("losses", 2, "--zero-stage 2 --moe-expert-parallel-size 2"),
    ("losses", 4, "--zero-stage 1 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("losses", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"),
    ("losses", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),  # slices end within a sequence
    *PIPELINE_LAYOUTS,
]
FAST = [
    ("pyramid", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("pyramid", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("modern", 4, "--zero-stage 2 --moe-expert-parallel-size 4"),
    ("shared", 4, f"--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 {PADDED}"),
    ("latent", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("deep", 4, f"--zero-stage 2 {INTERLEAVED} {EP2}"),
]


@pytest.mark.parametrize(("model", "world", "flags"), LAYOUTS, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_layout_equals_one_process_in_float64(model, world, flags):
    found = run_distributed(parity.layout, world, model, f"{parity.FP64} {flags}")[0]
    parity.check(found, parity.expected(model, world, flags), 1e-10)


@pytest.mark.parametrize(("model", "world", "flags"), FAST, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_layout_equals_one_process_in_float32_with_fast_kernels(model, world, flags):
    found = run_distributed(parity.layout, world, model, f"{parity.FP32} {flags}")[0]
    parity.check(found, parity.reference(model, parity.FP32), 1e-5)
