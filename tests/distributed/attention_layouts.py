"""Rows of `test_parallel_equals_single` about the kinds of attention: norms of q and k, latent heads, windows, sinks, rotary scaling."""

from __future__ import annotations

from distributed import parity

TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
EP2, CP2, PP2 = "--moe-expert-parallel-size 2", "--context-parallel-size 2", "--pipeline-model-parallel-size 2"
SP, FULL, SELECTIVE = "--sequence-parallel", "--recompute-granularity full", "--recompute-granularity selective"
EVEN, DOCUMENTS, RING = parity.DIVISIBLE, parity.DOCUMENTS, "--cp-comm-type p2p"

QUICK = [  # model, world size, flags
    ("qk_heads", 2, f"--zero-stage 1 {TP2} {SP} {EVEN}"),
    ("qk_hidden", 2, f"--zero-stage 2 {TP2} {SP} {EP2} {EVEN}"),
    ("latent_heads", 2, f"--zero-stage 1 {TP2} {EP2}"),
    ("latent_heads", 2, f"--zero-stage 0 {PP2}"),
    ("windows", 4, f"--zero-stage 1 {TP2} {CP2} {EVEN}"),
]
MATRIX = [
    ("qk_heads", 2, f"--zero-stage 3 {TP2} {FULL}"),
    ("qk_heads", 4, f"--zero-stage 1 {TP4} {SP} {EVEN}"),  # two key heads for four ranks
    ("qk_heads", 2, f"--zero-stage 1 {CP2} {RING} {EVEN}"),
    ("qk_hidden", 2, f"--zero-stage 0 {TP2}"),
    ("qk_hidden", 4, f"--zero-stage 3 {TP4} {SP} {EP2} {SELECTIVE} {EVEN}"),  # two key heads for four ranks
    ("qk_hidden_mean", 4, f"--zero-stage 2 {TP4}"),
    ("latent_heads", 4, f"--zero-stage 3 {TP4} {SP} {EP2} {FULL} {EVEN}"),
    ("latent_heads", 4, f"--zero-stage 2 {TP2} {SP} {CP2} {EVEN}"),
    ("latent_heads", 4, f"--zero-stage 1 {PP2} {TP2} {EP2}"),
    ("latent_direct", 2, f"--zero-stage 1 {TP2} {SP} {EVEN}"),
    ("latent_direct", 4, f"--zero-stage 2 {CP2} {EP2} {SELECTIVE} {EVEN}"),
    ("windows", 2, f"--zero-stage 1 {TP2} {SP} {EVEN} {DOCUMENTS}"),
    ("windows", 2, f"--zero-stage 3 {CP2} {EVEN} {DOCUMENTS} {FULL}"),
    ("windows", 2, f"--zero-stage 0 {PP2}"),
    ("windows", 4, f"--zero-stage 1 --context-parallel-size 4 {EVEN}"),
    ("latent_ring", 2, f"--zero-stage 1 {CP2} {RING} {FULL} {EVEN}"),
    ("latent_wide", 4, f"--zero-stage 2 {TP2} {CP2} {RING} {EVEN}"),
]
