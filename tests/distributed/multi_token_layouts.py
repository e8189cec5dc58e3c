"""Rows of `test_parallel_equals_single` with multi-token prediction."""

from __future__ import annotations

from distributed import parity

TP2, PP2, SP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--sequence-parallel"
EP2, EP4, CP2 = "--moe-expert-parallel-size 2", "--moe-expert-parallel-size 4", "--context-parallel-size 2"
FULL, EVEN, DOCUMENTS = "--recompute-granularity full", parity.DIVISIBLE, parity.DOCUMENTS
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"  # of four layers

LAYOUTS = [  # model, world size, flags; the first and every eighth always
    ("ahead", 2, f"--zero-stage 3 {TP2} {SP} {EP2} {FULL} {EVEN}"),
    ("ahead", 4, f"--zero-stage 1 {TP2} {SP} {EP4} {EVEN}"),
    ("ahead_untied", 2, f"--zero-stage 2 {EP2} {DOCUMENTS}"),
    ("ahead", 2, f"--zero-stage 1 {TP2} {EP2} --moe-token-dispatcher allgather"),
    ("ahead_student", 2, f"--zero-stage 1 {EP2}"),
    ("ahead", 4, f"--zero-stage 0 {TP2} {EP2} --expert-tensor-parallel-size 2 --cross-entropy-loss-chunk-size 24"),
    # sequences cut over ranks: what lies ahead is on another one
    ("ahead", 2, f"--zero-stage 1 {CP2} {EP2} {EVEN} {DOCUMENTS}"),
    ("ahead", 4, f"--zero-stage 3 {CP2} {TP2} {SP} {EP4} {FULL} {EVEN}"),
    # pipelines: the vectors of tokens are on two stages, tied or not
    ("ahead_untied", 4, f"--zero-stage 1 {PP2} {EP2} {DOCUMENTS}"),
    ("ahead", 2, PP2),
    ("ahead_untied", 2, f"{PP2} --pipeline-schedule gpipe"),
    ("ahead_untied", 4, f"--zero-stage 3 {PP2} {TP2} {EP2} {FULL}"),
    ("ahead", 4, f"--zero-stage 2 {PP2} {TP2} {SP} {EP2} {EVEN}"),
    ("ahead", 4, f"--zero-stage 1 {PP2} {CP2} {EP2} {EVEN} {DOCUMENTS}"),
    ("ahead_deep", 4, f"--zero-stage 0 {INTERLEAVED} {EP2}"),
    ("ahead_deep", 4, f"--zero-stage 1 {INTERLEAVED} {TP2} {EP2} {FULL}"),
    ("ahead", 8, f"--zero-stage 3 {PP2} {CP2} {TP2} {SP} {EP4} {EVEN}"),
    ("ahead", 1, "--zero-stage 0"),
    ("ahead_latent", 2, f"--zero-stage 3 {TP2} {SP} {EP2} {EVEN}"),
    ("ahead_latent", 4, f"--zero-stage 1 {PP2} {CP2} {EP2} {EVEN}"),
    ("ahead_ring", 4, f"--zero-stage 2 {CP2} --cp-comm-type p2p {EP2} {EVEN}"),
]
