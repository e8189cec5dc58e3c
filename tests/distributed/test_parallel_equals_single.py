"""Every layout trains the model that one process trains: loss, every gradient, norm, weights after five steps."""

from __future__ import annotations

import pytest
from distributed_pool import run_distributed

from distributed import attention_layouts, multi_token_layouts, parity, sequence_layouts
from distributed.precision_rows import PRECISION_LAYOUTS

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
QUICK = [  # model, world size, flags: always
    *(("pyramid", 2, f"--zero-stage {z}") for z in (0, 1, 2, 3)),
    *(("pyramid", 2, f"--zero-stage {z} --moe-expert-parallel-size 2") for z in (1, 3)),
    ("pyramid", 2, "--zero-stage 1 --tensor-model-parallel-size 2"),
    ("pyramid", 2, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"),
    *(("pyramid", 4, f"--zero-stage {z} --moe-expert-parallel-size 2") for z in (0, 3)),  # fewer local experts than edp ranks
    ("pyramid", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("pyramid", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("pyramid", 4, "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("modern", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),
    ("noisy", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("fp8", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("rates", 2, "--zero-stage 0 --moe-expert-parallel-size 2"),
    ("student", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("student", 2, "--zero-stage 2 --tensor-model-parallel-size 2"),
    ("hash", 2, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"),
    *((policy, 2, "--zero-stage 1 --moe-expert-parallel-size 2") for policy in ("drawn", "expert_choice", "sinkhorn")),
    ("deepseek", 4, "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("dropping", 2, f"--zero-stage 1 --moe-expert-parallel-size 2 {PADDED}"),
    ("shared", 2, "--zero-stage 2 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("shared", 2, "--zero-stage 3 --moe-expert-parallel-size 2 --moe-token-dispatcher alltoall --tensor-model-parallel-size 2"),
    ("latent", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("modules", 2, "--zero-stage 0 --tensor-model-parallel-size 2"),
    ("modules", 4, "--zero-stage 1 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    ("losses", 2, "--zero-stage 2 --moe-expert-parallel-size 2"),
    ("losses", 4, "--zero-stage 1 --moe-expert-parallel-size 4 --recompute-granularity full"),
]
MATRIX = [  # the other pairs and triples: with --full
    ("losses", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),  # slices end within a sequence
    *(("pyramid", 1, f"--zero-stage {z}") for z in (0, 3)),
    *(("pyramid", 2, f"--zero-stage {z} --moe-expert-parallel-size 2") for z in (0, 2)),
    ("pyramid", 2, "--zero-stage 1 --moe-expert-parallel-size 2 --moe-token-dispatcher allgather"),
    *(("pyramid", 2, f"--zero-stage {z} --tensor-model-parallel-size 2") for z in (0, 2, 3)),
    *(("pyramid", 4, f"--zero-stage {z} --moe-expert-parallel-size 4") for z in (0, 1, 3)),  # degrees 2 and 4
    *(("pyramid", 4, f"--zero-stage {z} --tensor-model-parallel-size 2 --moe-expert-parallel-size 4") for z in (0, 2)),
    ("pyramid", 4, "--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"),
    ("pyramid", 4, f"--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full {PADDED}"),
    ("modern", 2, "--zero-stage 3 --moe-expert-parallel-size 2"),
    ("modern", 4, "--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity selective"),
    ("noisy", 2, "--zero-stage 1 --tensor-model-parallel-size 2"),
    ("rates", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("student", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),
    ("student", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("dropping", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("dropping", 4, "--zero-stage 3 --moe-expert-parallel-size 4"),
    ("dropping", 4, f"--zero-stage 3 --moe-expert-parallel-size 2 --recompute-granularity full {PADDED}"),
    *((policy, 2, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2") for policy in ("deepseek", "zipf")),
    ("expert_choice", 2, "--zero-stage 2 --moe-expert-parallel-size 2 --moe-token-dispatcher alltoall"),
    *((policy, 4, "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full") for policy in ("drawn", "expert_choice")),
    ("shared", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("latent", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("latent", 4, f"--zero-stage 2 --tensor-model-parallel-size 4 --moe-expert-parallel-size 2 {PADDED}"),
    ("modules", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --recompute-granularity full"),
    ("modules", 4, f"--zero-stage 3 --moe-expert-parallel-size 4 {PADDED}"),
    ("losses", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"),
]
EP2, TP2, ETP2 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2", "--expert-tensor-parallel-size 2"
FULL, ALLTOALL, ALLGATHER = "--recompute-granularity full", "--moe-token-dispatcher alltoall", "--moe-token-dispatcher allgather"
NODES2 = "--moe-token-dispatcher hierarchical --moe-node-size 2"
EXPERT_LAYOUTS = [
    # experts cut over ranks that are data ranks, tensor-parallel ranks, or both
    ("pyramid", 2, f"--zero-stage 3 {ETP2}"),
    ("pyramid", 2, f"--zero-stage 0 {TP2} --enable-expert-tensor-parallelism {ALLTOALL} {FULL}"),
    ("modern", 2, f"--zero-stage 1 {ETP2} {ALLTOALL}"),
    ("dropping", 2, f"--zero-stage 1 {ETP2} {PADDED}"),
    ("pyramid", 4, f"--zero-stage 3 {EP2} {ETP2} {ALLTOALL}"),
    ("pyramid", 4, f"--zero-stage 0 {TP2} {EP2} {ETP2} {ALLGATHER} {FULL}"),
    ("latent", 4, f"--zero-stage 1 {EP2} {ETP2} {ALLTOALL} --moe-overlap-chunks 2"),
    ("shared", 4, f"--zero-stage 3 --tensor-model-parallel-size 4 {EP2} {ETP2} {FULL}"),
    ("dropping", 4, f"--zero-stage 3 {EP2} {ETP2} {PADDED} {FULL}"),
    ("dropping", 4, f"--zero-stage 2 {EP2} {ETP2} {ALLGATHER}"),
    ("noisy", 4, f"--zero-stage 1 {TP2} --expert-tensor-parallel-size 4"),
    ("deepseek", 4, f"--zero-stage 3 {ETP2} {ALLTOALL} {FULL}"),  # slices of sharded experts: edp 2
    ("student", 4, f"--zero-stage 3 {TP2} {EP2} --enable-expert-tensor-parallelism"),
    ("losses", 4, f"--zero-stage 2 {TP2} {EP2} {ETP2} {PADDED}"),
    ("pyramid", 8, f"--zero-stage 3 {TP2} --moe-expert-parallel-size 4 {ETP2} {ALLTOALL}"),  # degrees 2 and 4
    # two stages; the layer with two experts is on one node
    ("pyramid", 4, f"--zero-stage 3 --moe-expert-parallel-size 4 {NODES2} {FULL}"),
    ("dropping", 4, f"--zero-stage 1 --moe-expert-parallel-size 4 {NODES2}"),
    ("modern", 4, f"--zero-stage 2 {TP2} --moe-expert-parallel-size 4 {NODES2}"),
    ("modern", 4, "--zero-stage 1 --moe-expert-parallel-size 4 --moe-node-size 2"),  # auto takes two legs
    ("latent", 4, f"--zero-stage 0 --moe-expert-parallel-size 4 {NODES2} --moe-overlap-chunks 2"),
    ("pyramid", 8, f"--zero-stage 1 {TP2} --moe-expert-parallel-size 8 {NODES2}"),
    (
        "pyramid",
        8,
        f"--zero-stage 3 {TP2} --moe-expert-parallel-size 4 {ETP2} --moe-token-dispatcher hierarchical --moe-node-size 4 {FULL}",
    ),
    # parts that do not divide
    ("pyramid", 2, f"--zero-stage 3 {EP2} --moe-overlap-chunks 4 {FULL}"),  # 30 tokens
    ("noisy", 2, f"--zero-stage 1 {TP2} {EP2} --moe-overlap-chunks 2"),  # 15
    ("modules", 2, f"--zero-stage 0 {EP2} --moe-overlap-chunks 3"),
    ("dropping", 4, "--zero-stage 2 --moe-expert-parallel-size 4 --moe-overlap-chunks 3"),
    ("modern", 4, f"--zero-stage 3 --tensor-model-parallel-size 4 {EP2} --moe-overlap-chunks 3"),  # 8 or 6
]
SP2, CP2 = f"{TP2} --sequence-parallel {parity.DIVISIBLE}", f"--context-parallel-size 2 {parity.DIVISIBLE}"
CROSS_LAYOUTS = [  # where the parts meet
    ("pyramid", 4, f"--zero-stage 1 {PP2} {SP2} {EP2}"),
    ("pyramid", 4, f"--zero-stage 3 {SP2} {EP2} {ETP2} --cross-entropy-loss-chunk-size 24"),
    ("modern", 4, f"--zero-stage 3 {PP2} {CP2} {EP2} {RECOMPUTE}"),
    ("losses", 4, f"--zero-stage 2 {TP2} {CP2} {ETP2} --cross-entropy-loss-chunk-size 7"),
    ("deep", 4, f"--zero-stage 0 {INTERLEAVED} {ETP2} --cross-entropy-loss-chunk-size 24"),
    ("noisy", 2, f"{PP2} {parity.DIVISIBLE} {parity.DOCUMENTS}"),  # every stage masks by document
    ("muon", 4, f"--zero-stage 2 {PP2} {EP2}"),
    ("muon", 4, f"--zero-stage 3 {SP2} {EP2}"),
    ("noisy", 4, f"--zero-stage 1 {SP2} {EP2} --moe-overlap-chunks 2 {FULL}"),
    ("deep", 8, f"--zero-stage 3 {PP2} {SP2} --context-parallel-size 2 --moe-expert-parallel-size 4"),
    ("pyramid", 8, f"--zero-stage 3 {PP2} {EP2} --num-distributed-optimizer-instances 2 {FULL}"),
    ("shared", 8, f"--zero-stage 1 {SP2} --context-parallel-size 2 {EP2} {ETP2} {ALLTOALL}"),
]
for further in (EXPERT_LAYOUTS, PRECISION_LAYOUTS, PIPELINE_LAYOUTS, sequence_layouts.LAYOUTS, CROSS_LAYOUTS, multi_token_layouts.LAYOUTS):
    QUICK += [row for row in further[::8] if row[1] < 8]
    MATRIX += [row for row in further if row not in QUICK]
QUICK += attention_layouts.QUICK
MATRIX += attention_layouts.MATRIX
LAYOUTS = QUICK + MATRIX
FAST = [
    ("pyramid", 4, f"--zero-stage 3 {TP2} {EP2} {ETP2} {ALLTOALL} --moe-overlap-chunks 2"),
    ("latent", 4, f"--zero-stage 1 --moe-expert-parallel-size 4 {NODES2}"),
    *sequence_layouts.FAST,
    ("pyramid", 2, "--zero-stage 1 --moe-expert-parallel-size 2"),
    ("pyramid", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("modern", 4, "--zero-stage 2 --moe-expert-parallel-size 4"),
    ("shared", 4, f"--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 {PADDED}"),
    ("latent", 4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4"),
    ("deep", 4, f"--zero-stage 2 {INTERLEAVED} {EP2}"),
]


DEEPSPEED_TABLE = {  # combinations of DeepSpeed-MoE's tutorial, by its letters: docs/parallelism.md has them with their flags
    "E": ("pyramid", 2, f"--zero-stage 0 {EP2}"),
    "E+D": ("pyramid", 4, f"--zero-stage 0 {EP2}"),
    "E+Z": ("pyramid", 4, f"--zero-stage 2 {EP2}"),
    "E+D+M": ("pyramid", 4, f"--zero-stage 0 {TP2} {EP2}"),
    "E+D+Z": ("pyramid", 4, f"--zero-stage 2 {EP2} --num-distributed-optimizer-instances 2"),
    "E+Z-Off+M": ("pyramid", 4, f"--zero-stage 2 {TP2} {EP2} --cpu-optimizer"),
}

ROWS = [*QUICK, *(pytest.param(*row, marks=pytest.mark.matrix) for row in MATRIX)]


@pytest.mark.parametrize(("model", "world", "flags"), ROWS, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_layout_equals_one_process_in_float64(model, world, flags):
    found = run_distributed(parity.layout, world, model, f"{parity.FP64} {flags}")[0]
    parity.check(found, parity.expected(model, world, flags), 1e-10)


@pytest.mark.parametrize(("model", "world", "flags"), DEEPSPEED_TABLE.values(), ids=DEEPSPEED_TABLE.keys())
def test_row_of_the_deepspeed_table_equals_one_process(model, world, flags):
    test_layout_equals_one_process_in_float64(model, world, flags)


FAST_ROWS = [row if i % 2 else pytest.param(*row, marks=pytest.mark.matrix) for i, row in enumerate(FAST)]


@pytest.mark.parametrize(("model", "world", "flags"), FAST_ROWS, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_layout_equals_one_process_in_float32_with_fast_kernels(model, world, flags):
    found = run_distributed(parity.layout, world, model, f"{parity.FP32} {flags}")[0]
    parity.check(found, parity.expected(model, world, flags, parity.FP32), 1e-5)
