"""Layouts with what saves memory, and with the optimizers, for test_parallel_equals_single."""

EP2, EP4, TP2 = "--moe-expert-parallel-size 2", "--moe-expert-parallel-size 4", "--tensor-model-parallel-size 2"
SELECTIVE = "--recompute-granularity selective --recompute-modules"

PRECISION_LAYOUTS = [
    # the vocabulary in chunks: tied weights of one FSDP unit; cut over TP, 60 real columns of 64 in parts of 32 and of 16
    ("pyramid", 2, f"--zero-stage 3 {EP2} --cross-entropy-loss-chunk-size 24"),
    ("pyramid", 2, f"--zero-stage 1 {TP2} --cross-entropy-loss-chunk-size 24"),
    ("modern", 4, "--zero-stage 2 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4 --cross-entropy-loss-chunk-size 7"),
    ("noisy", 4, f"--zero-stage 3 {TP2} {EP2} --recompute-granularity full --cross-entropy-loss-chunk-size 25"),
    # parts of a block recomputed, in FSDP units that are freed after the forward
    ("noisy", 4, f"--zero-stage 3 {TP2} {EP4} {SELECTIVE} moe"),
    ("shared", 4, f"--zero-stage 3 {TP2} {EP2} {SELECTIVE} shared_experts mlp --moe-layer-recompute"),
    # E+Z-Off+M of DeepSpeed: on a CPU the same step, with nothing to move
    ("modern", 4, f"--zero-stage 2 {TP2} {EP4} --cpu-optimizer --cpu-offloading"),
    # matrices whole here; cut by rows over 2; by rows and by columns over TP; experts cut inside, and over more ranks than there are
    ("muon", 2, f"--zero-stage 0 {EP2}"),
    ("muon", 2, "--zero-stage 3"),
    ("muon", 2, f"--zero-stage 1 {TP2} {EP2}"),
    ("muon", 4, f"--zero-stage 3 {EP2}"),
    ("muon", 4, f"--zero-stage 2 {TP2} {EP4}"),
    ("muon_latent", 4, f"--zero-stage 3 {TP2} {EP2}"),
    ("muon_latent", 4, "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"),
    ("sgd", 4, f"--zero-stage 3 {TP2} {EP4}"),
]
