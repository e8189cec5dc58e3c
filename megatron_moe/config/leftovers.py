"""Upstream flags that are no setting here: accepted, and listed in docs/flags.md.

LEFTOVERS have no meaning here and are warned about once. NOT_YET belong to features that are not there yet: they parse, and are
refused when used to train, unless their value or the rest of the command asks for nothing.
name -> (number of values, why). `*` is any number.
"""

from __future__ import annotations

LEFTOVERS: dict[str, tuple[int | str, str]] = {
    # launcher and engine
    "deepspeed": (0, "the engine is always PyTorch's own"),
    "deepscale": (0, "the engine is always PyTorch's own"),
    "local-rank": (1, "torchrun sets LOCAL_RANK"),
    "no-pipeline-parallel": (0, "the pipeline is chosen by --pipeline-model-parallel-size alone"),
    "use-cpu-initialization": (0, "initial weights never depend on the device"),
    "no-masked-softmax-fusion": (0, "attention is torch's scaled_dot_product_attention"),
    "no-bias-gelu-fusion": (0, "fusion is left to torch"),
    "no-bias-dropout-fusion": (0, "fusion is left to torch"),
    "no-gradient-accumulation-fusion": (0, "fusion is left to torch"),
    "use-flash-attn": (0, "scaled_dot_product_attention picks the fastest kernel"),
    "use-flash-attn-v1": (0, "scaled_dot_product_attention picks the fastest kernel"),
    "use-flash-attn-v2": (0, "scaled_dot_product_attention picks the fastest kernel"),
    "use-flash-attn-triton": (0, "scaled_dot_product_attention picks the fastest kernel"),
    "use-flash-attn-builder": (0, "scaled_dot_product_attention picks the fastest kernel"),
    "no-persist-layer-norm": (0, "the norms are torch's"),
    "disable-mem-efficient-ln": (0, "the norms are torch's"),
    "embedding-weights-in-fp32": (0, "parameters are always float32"),
    "fp16-lm-cross-entropy": (0, "the loss is always computed in float32"),
    "no-initialization": (0, "weights are drawn, and replaced by those of --load"),
    "no-query-key-layer-scaling": (0, "queries and keys are never scaled by the layer number"),
    "no-async-tensor-model-parallel-allreduce": (0, "communication order is torch's"),
    "attention-softmax-in-fp32": (0, "the attention kernel accumulates in float32"),
    "accumulate-allreduce-grads-in-fp32": (0, "gradients are always accumulated and reduced in float32"),
    "use-distributed-optimizer": (0, "sharding of optimizer state is --zero-stage"),
    "DDP-impl": (1, "replicas and shards are FSDP2's; see --zero-stage"),
    "no-contiguous-buffers-in-local-ddp": (0, "FSDP2 lays gradients out itself"),
    "no-scatter-gather-tensors-in-pipeline": (0, "what pipeline stages exchange is torch's choice"),
    "use-ring-exchange-p2p": (0, "what pipeline stages exchange is torch's choice"),
    "overlap-p2p-communication": (0, "what pipeline stages exchange is torch's choice"),
    "enable-zbh1-exact-semantics": (0, "a step is always exact: weights move when the gradient norm of all stages is known"),
    "empty-unused-memory-level": (1, "torch manages the memory"),
    "lazy-mpu-init": (1, "torchrun has set up the ranks"),
    "use-mcore-models": (0, "there is one model"),
    "transformer-impl": (1, "there is one implementation"),
    # MoE
    "create-moe-param-group": (0, "experts are always told apart from dense parameters"),
    "use-tutel": (0, "dispatch kernels are chosen by --moe-token-dispatcher"),
    "ds-inference": (0, "there is no separate inference engine"),
    "moe-grouped-gemm": (0, "grouped products are taken wherever they can be; see --moe-kernels"),
    # activation checkpointing of DeepSpeed
    "checkpoint-num-layers": (1, "every layer is a checkpoint"),
    "recompute-method": (1, "every layer is a checkpoint"),
    "recompute-num-layers": (1, "every layer is a checkpoint"),
    "distribute-saved-activations": (0, "checkpoints are not split over ranks"),
    "distribute-checkpointed-activations": (0, "checkpoints are not split over ranks"),
    "partition-activations": (0, "checkpoints are not split over ranks"),
    "contigious-checkpointing": (0, "torch manages the memory of checkpoints"),
    "checkpoint-in-cpu": (0, "checkpoints stay on the device; --cpu-offloading moves what is kept without recomputation"),
    "synchronize-each-layer": (0, "a debugging aid of DeepSpeed's checkpointing"),
    "profile-backward": (0, "a debugging aid of DeepSpeed's checkpointing"),
    # ZeRO leftovers
    "zero-reduce-scatter": (0, "FSDP2 always reduce-scatters"),
    "zero-contigious-gradients": (0, "FSDP2 lays gradients out itself"),
    "zero-reduce-bucket-size": (1, "FSDP2 reduces layer by layer"),
    "zero-allgather-bucket-size": (1, "FSDP2 gathers layer by layer"),
    "remote-device": (1, "parameters are created on the device they live on"),
    "use-pin-memory": (0, "pinned memory is chosen by the device"),
    "scattered-embeddings": (0, "embeddings are sharded by --tensor-model-parallel-size"),
    "split-transformers": (0, "layers are sharded by --zero-stage"),
    "memory-centric-tiled-linear": (0, "linear layers are not tiled"),
    "tile-factor": (1, "linear layers are not tiled"),
    "ds-fused-adam": (0, "torch's AdamW picks the fused kernel"),
    "cpu-torch-adam": (0, "torch's AdamW picks the fused kernel"),
    # data and schedule
    "override-opt-param-scheduler": (0, "the schedule always follows the command line"),
    "use-checkpoint-opt-param-scheduler": (0, "the schedule always follows the command line"),
    "use-checkpoint-args": (0, "--load compares the checkpoint's architecture with the command line and names what differs"),
    "no-load-lr-state": (0, "the schedule always follows the command line"),
    "no-load-rng": (0, "random numbers follow from --seed and the iteration: a checkpoint has no state of them"),
    "no-save-rng": (0, "random numbers follow from --seed and the iteration: a checkpoint has no state of them"),
    "trust-remote-code": (0, "a tokenizer is a file of data: no code of others runs"),
    "aml-data-download-path": (1, "data is read from where --data-path says"),
    "data-impl": (1, "datasets are MMIDIDX files, and recognised by what is in them"),
    "dataloader-type": (1, "every run resumes by consumed samples"),
    "repeated-dataloader": (0, "training goes on into the next epoch by itself"),
    "mmap-warmup": (0, "the dataset is mapped lazily"),
    "data-parallel-random-init": (0, "initial weights never depend on the layout"),
    # logging
    "log-timers-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-batch-size-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-validation-ppl-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-memory-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-learning-rate-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-loss-scale-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-optimizer-states-to-tensorboard": (0, "every logged number goes to every writer"),
    "log-world-size-to-tensorboard": (0, "the number of ranks is in the start event of metrics.jsonl"),
    "no-log-learnig-rate-to-tensorboard": (0, "every logged number goes to every writer"),
    "no-log-loss-scale-to-tensorboard": (0, "every logged number goes to every writer"),
    "tensorboard-log-interval": (1, "TensorBoard follows --log-interval"),
    "log-num-zeros-in-grad": (0, "not computed"),
    "log-params-norm": (0, "not computed"),
    "timing-log-level": (1, "not computed"),
    "timing-log-option": (1, "not computed"),
    "no-barrier-with-level-1-timing": (0, "not computed"),
}

# Flags of features that are planned: parsed, and refused when used to train.
NOT_YET: dict[str, tuple[int | str, str]] = {
    "standalone-embedding-stage": (0, "a pipeline stage of the embedding alone"),
    "ds-sequence-parallel-size": (1, "DeepSpeed's sequence parallelism (Ulysses; --context-parallel-size cuts sequences too)"),
    "random-ltd": (0, "random layer-token dropping"),
    "data-efficiency-curriculum-learning": (0, "curriculum learning"),
    "force-ds-sequence-parallel": (0, "DeepSpeed's sequence parallelism (Ulysses)"),
    "ds-sequence-parallel-fpdt": (0, "DeepSpeed's sequence parallelism (FPDT)"),
    "ds-sequence-parallel-fpdt-chunk-size": (1, "DeepSpeed's sequence parallelism (FPDT)"),
    "ds-sequence-parallel-fpdt-offloading": (0, "DeepSpeed's sequence parallelism (FPDT)"),
    "return-data-index": (0, "the data efficiency library"),
    "num-experts-switch": (1, "Megatron's SwitchMLP"),
    "load-tag": (1, "DeepSpeed checkpoint tags"),
    "universal-checkpoint": (0, "DeepSpeed universal checkpoints"),
    "train-idx-path": (1, "index files of the data efficiency library"),
    "train-desc-path": (1, "index files of the data efficiency library"),
    "train-doc-idx-path": (1, "index files of the data efficiency library"),
    "train-sample-idx-path": (1, "index files of the data efficiency library"),
    "train-shuffle-idx-path": (1, "index files of the data efficiency library"),
    "skip-train": (0, "evaluation without training"),
    "inference": (0, "evaluation without training"),
    "wandb-project": (1, "Weights & Biases"),
    "wandb-entity": (1, "Weights & Biases"),
    "wandb-exp-name": (1, "Weights & Biases"),
    "wandb-save-dir": (1, "Weights & Biases"),
    "profile": (1, "the profiler"),
    "profile-steps": (1, "the profiler"),
    "profile-step-start": (1, "the profiler"),
    "profile-step-end": (1, "the profiler"),
    "profile-ranks": ("*", "the profiler"),
    "openai-gelu": (0, "GELU by the tanh formula"),
    "init-method-xavier-uniform": (0, "uniform initial weights"),
    "apply-layernorm-1p": (0, "norm weights around zero"),
    "apply-residual-connection-post-layernorm": (0, "residuals behind the norm"),
    "fp32-residual-connection": (0, "a float32 residual stream"),
    "fp8-e4m3": (0, "fp8 training"),
    "fp8-hybrid": (0, "fp8 training"),
}

# Flags of NOT_YET at these values ask for nothing: what upstream does without the flag.
NEUTRAL: dict[str, str] = {"ds-sequence-parallel-size": "1"}

# Settings of a feature in NOT_YET: without one of its switches they ask for nothing.
_FPDT, _WANDB, _PROFILER = ("ds-sequence-parallel-fpdt",), ("wandb-project",), ("profile",)
SWITCHES: dict[str, tuple[str, ...]] = {
    "ds-sequence-parallel-fpdt-chunk-size": _FPDT,
    "ds-sequence-parallel-fpdt-offloading": _FPDT,
    "wandb-entity": _WANDB,
    "wandb-exp-name": _WANDB,
    "wandb-save-dir": _WANDB,
    "profile-steps": _PROFILER,
    "profile-step-start": _PROFILER,
    "profile-step-end": _PROFILER,
    "profile-ranks": _PROFILER,
}


def notes_on(given: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Warnings, and what keeps a command from training, for the flags of this file that were given with their words."""
    warnings = [f"--{name} has no effect: {LEFTOVERS[name][1]}" for name in given if name in LEFTOVERS]
    not_yet = []
    for name in (n for n in given if n in NOT_YET):
        if why := asks_for_nothing(name, given):
            warnings.append(f"--{name} has no effect: {why}")
        else:
            not_yet.append(f"--{name}: {NOT_YET[name][1]} is not built yet; leave the flag out")
    return warnings, not_yet


def asks_for_nothing(name: str, given: dict[str, list[str]]) -> str | None:
    """Why a flag of NOT_YET changes nothing as it was given, or None."""
    words = given[name]
    if name in NEUTRAL and len(words) == 1 and _same(words[0], NEUTRAL[name]):
        return f"{words[0]} is what happens without it"
    switches = SWITCHES.get(name, ())
    if switches and not given.keys() & set(switches):
        return f"it is a setting of {' and '.join('--' + s for s in switches)}"
    return None


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b
