"""Rows of `test_parallel_equals_single` in which sequences are cut over ranks, parameters sharded and replicated, or key/value heads shared."""

from __future__ import annotations

from distributed import parity

TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
EP2, EP4, CP2, CP4 = (f"--{what}-parallel-size {n}" for what, n in (("moe-expert", 2), ("moe-expert", 4), ("context", 2), ("context", 4)))
SP, FULL, SELECTIVE = "--sequence-parallel", "--recompute-granularity full", "--recompute-granularity selective"
EVEN, DOCUMENTS, REPLICAS = parity.DIVISIBLE, parity.DOCUMENTS, "--num-distributed-optimizer-instances 2"
RING = "--cp-comm-type p2p"
PADDED = "--moe-pad-expert-input-to-capacity"

LAYOUTS = [  # model, world size, flags
    *(("pyramid", 2, f"--zero-stage {z} {TP2} {SP} {EVEN}") for z in (0, 1)),
    ("pyramid", 2, f"--zero-stage 2 {TP2} {SP} {EP2} --moe-token-dispatcher allgather {EVEN}"),
    ("pyramid", 4, f"--zero-stage 3 {TP2} {SP} {EP4} {FULL} {EVEN}"),  # degrees 2 and 4
    ("modern", 4, f"--zero-stage 2 {TP4} {SP} {EP4} {FULL} {EVEN}"),  # RMSNorm, rotary positions, no biases, untied
    ("noisy", 4, f"--zero-stage 3 {TP2} {SP} {EP2} {SELECTIVE} {EVEN}"),
    ("shared", 4, f"--zero-stage 3 {TP2} {SP} {EP2} {FULL} {EVEN}"),
    ("latent", 4, f"--zero-stage 1 {TP4} {SP} {EP2} {PADDED} {EVEN}"),
    ("losses", 4, f"--zero-stage 1 {TP4} {SP} {EP4} {EVEN}"),
    *((policy, 2, f"--zero-stage 1 {TP2} {SP} {EP2} {EVEN}") for policy in ("hash", "balanced", "deepseek")),
    ("modules", 2, f"--zero-stage 0 {TP2} {SP} {EVEN}"),
    # context parallelism: chunks of a sequence that are not neighbours
    *(("pyramid", 2, f"--zero-stage {z} {CP2} {EVEN}") for z in (0, 2)),
    ("pyramid", 4, f"--zero-stage 3 {CP2} {EP4} {FULL} {EVEN}"),
    ("modern", 4, f"--zero-stage 1 {CP4} {EP2} {EVEN} {DOCUMENTS}"),
    ("noisy", 2, f"--zero-stage 3 {CP2} {EP2} {SELECTIVE} {EVEN} {DOCUMENTS}"),
    ("noisy", 4, f"--zero-stage 2 {CP4} {EP4} --moe-token-dispatcher allgather {FULL} {EVEN}"),
    ("losses", 4, f"--zero-stage 2 {CP2} {EP2} {EVEN}"),
    ("balanced", 2, f"--zero-stage 1 {CP2} {EP2} {EVEN}"),
    # keys that travel: one pass of the ring, three, heads that are shared and heads that are not, two micro-batches in a pipeline
    ("ring", 2, f"--zero-stage 1 {CP2} {RING} {EVEN}"),
    ("ring", 4, f"--zero-stage 3 {CP4} {RING} {EP4} {FULL} {EVEN}"),
    ("ring", 4, f"--zero-stage 2 {CP2} {RING} {TP2} {SP} {EP2} {SELECTIVE} {EVEN}"),
    ("ring", 4, f"--zero-stage 1 {CP2} {RING} --pipeline-model-parallel-size 2 {EP2} {EVEN}"),
    # both, and with tensor parallelism alone, which slices the tokens of a context-parallel rank
    ("pyramid", 4, f"--zero-stage 3 {CP2} {TP2} {SP} {EP4} {EVEN}"),
    ("losses", 4, f"--zero-stage 1 {CP2} {TP2} {SP} {EP2} {FULL} {EVEN}"),
    ("losses", 4, f"--zero-stage 3 {CP2} {TP2} {EP4} {EVEN}"),
    ("noisy", 4, f"--zero-stage 0 {CP2} {TP2} {SP} {EP4} {FULL} {EVEN}"),
    ("latent", 4, f"--zero-stage 2 {CP2} {TP2} {SP} {EP2} {EVEN}"),
    ("shared", 4, f"--zero-stage 1 {CP2} {TP2} {SP} {EP4} {SELECTIVE} {EVEN} {DOCUMENTS}"),
    ("student", 4, f"--zero-stage 2 {CP2} {TP2} {SP} {EP2} {EVEN}"),
    # key/value heads that several ranks share
    ("pyramid", 4, f"--zero-stage 1 {TP4}"),
    ("pyramid", 4, f"--zero-stage 3 {TP4} {SP} {EP4} {FULL} {EVEN}"),
    # hybrid sharding: experts (2, 2), (2, 1), and with micro-batches that are reduced in two parts
    ("pyramid", 4, f"--zero-stage 1 {REPLICAS}"),
    ("pyramid", 4, f"--zero-stage 3 {REPLICAS} {EP2} {FULL}"),
    ("modern", 4, f"--zero-stage 2 {REPLICAS} {EP2} --micro-batch-size 1"),
    ("rates", 4, f"--zero-stage 3 {REPLICAS} {TP2} {EP4}"),
    ("pyramid", 4, f"--zero-stage 2 {REPLICAS} {CP2} {EP2} {EVEN}"),
    ("pyramid", 8, f"--zero-stage 3 {REPLICAS} {CP2} {TP2} {SP} {EP4} {FULL} {EVEN}"),
]
FAST = [
    ("ring", 4, f"--zero-stage 1 {CP4} {RING} {EP2} {EVEN}"),
    ("pyramid", 4, f"--zero-stage 3 {CP2} {TP2} {SP} {EP4} {EVEN}"),
    ("modern", 4, f"--zero-stage 2 {REPLICAS} {EP2}"),
]
