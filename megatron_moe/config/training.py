"""The run: batches, length, precision, optimizer, schedule, evaluation, stopping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class TrainingConfig:
    """Training run."""

    micro_batch_size: int = flag(1, "sequences per rank and forward pass", minimum=1)
    global_batch_size: int | None = flag(None, "sequences per optimizer step; micro batch x data-parallel size when not given", minimum=1)
    gradient_accumulation_steps: int | None = flag(
        None,
        "microbatches per optimizer step (DeepSpeed's word): gives the global batch, or must agree with --global-batch-size",
        minimum=1,
    )
    seq_length: int = flag(1024, "tokens per sequence", minimum=1)
    train_iters: int | None = flag(None, "optimizer steps; an upper bound when samples or tokens are given too", minimum=1)
    train_samples: int | None = flag(None, "sequences to train on", minimum=1)
    train_tokens: int | None = flag(None, "tokens to train on", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = flag(
        None, "START INCREMENT SAMPLES: grow the global batch from START by INCREMENT until it is full, over SAMPLES samples",
        minimum=1, metavar="N")  # fmt: skip
    seed: int = flag(1234, "initial weights, data order, dropout and routing noise", minimum=0)
    bf16: bool = flag(False, "bfloat16 compute; parameters, optimizer state, gradient reduction and router stay float32")
    fp16: bool = flag(False, "float16 compute with a dynamic loss scale; what stays float32 is that of --bf16")
    fp16_master_weights_and_grads: bool = flag(
        False,
        "with --fp16: store parameters and reduce gradients in float16 too, all but the router's; moments stay float32. 12 bytes a "
        "parameter in place of 16, and updates below a 2048th of a weight are lost",
    )
    params_dtype: Literal["float32", "float64"] = flag("float32", "type of the stored parameters; float64 is for parity tests")
    checkpoint_activations: bool = flag(
        False,
        "same as --recompute-granularity full (Megatron-DeepSpeed's spelling)",
        names=("deepspeed-activation-checkpointing",),
    )
    recompute_activations: bool = flag(False, "same as --recompute-granularity selective (Megatron-LM's spelling)")
    recompute_granularity: Literal["full", "selective"] | None = flag(
        None,
        "recompute in the backward instead of keeping activations. full: attention, MLP and experts; selective: --recompute-modules. "
        "Routing is kept",
    )
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "shared_experts"], ...] | None = flag(
        None,
        "what selective recomputes, core_attn when not given. core_attn: attention with its projections; mlp: dense MLPs, residual ones "
        "among them; moe: dispatch, experts and combine, never the routing; shared_experts: the MLPs beside the experts",
    )
    moe_layer_recompute: bool = flag(False, "recompute dispatch, experts and combine, whatever else is recomputed")
    moe_kernels: Literal["auto", "reference"] = flag(
        "auto", "expert matrix products: auto takes torch's grouped_mm where it can; reference is the plain loop, also in float64"
    )
    compile: bool = flag(
        False,
        "compile the model with torch.compile: the first step takes up to a minute or two longer, the others less; needs a C++ "
        "compiler (on a GPU Triton and a C compiler)",
    )
    cuda_graph_impl: Literal["none", "full_iteration"] = flag(
        "none",
        "full_iteration: forward and backward of all micro-batches of a step are one CUDA graph, launched at once. Where no host waits for the "
        "device: one GPU, --moe-token-dispatcher fused with a static or worst capacity, or allgather. Not yet measured on a GPU",
    )
    cuda_graph_warmup_steps: int = flag(3, "steps before the CUDA graph is captured", minimum=1)
    deterministic_mode: bool = flag(False, "refuse operations without a deterministic implementation")
    eval_interval: int = flag(1000, "steps between evaluations; 0: only at the end", minimum=0)
    eval_iters: int = flag(100, "global batches per evaluation; 0 switches evaluation off", minimum=0)
    exit_interval: int | None = flag(None, "save and exit when the iteration is divisible by this", minimum=1)
    exit_duration_in_mins: float | None = flag(None, "save and exit after this many minutes", above=0)
    kill_switch_file: str | None = flag(None, "save and exit when this file appears", metavar="FILE")
    check_replicas_interval: int | None = flag(
        None, "steps between two comparisons of what several ranks hold alike: a hash of parameters, expert biases and optimizer state, one small "
        "all-gather; ranks that differ stop the run, and the message names them and the parameter",
        names=("check-weight-hash-across-dp-replicas-interval",), minimum=1,
    )  # fmt: skip
    exit_signal_handler: bool = flag(
        True, "on SIGTERM, SIGINT or SIGUSR1 finish the step, save and exit; a second signal ends at once. --no-...: the first one does"
    )

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.half and self.params_dtype == "float64":
            name = "bf16" if self.bf16 else "fp16"
            yield f"--{name} and --params-dtype float64 exclude each other: {name} keeps its parameters in float32; drop one"
        if self.cuda_graph_impl != "none":
            yield from self._graph_problems()
        if self.rampup_batch_size is not None and len(self.rampup_batch_size) != 3:
            yield f"--rampup-batch-size wants START INCREMENT SAMPLES, not {' '.join(map(str, self.rampup_batch_size)) or 'nothing'}"
        if self.bf16 and self.fp16:
            yield "--bf16 and --fp16 exclude each other; drop one"
        if self.fp16_master_weights_and_grads and not self.fp16:
            yield "--fp16-master-weights-and-grads is about --fp16 training; add --fp16, or drop it"
        if self.recompute_modules is not None and self.recompute != "selective":
            why = "full recomputes all of them; drop one" if self.recompute else "which is not given; add it"
            yield f"--recompute-modules ({' '.join(self.recompute_modules)}) says what --recompute-granularity selective recomputes, {why}"

    def _graph_problems(self) -> Iterator[str]:
        what = f"--cuda-graph-impl {self.cuda_graph_impl}"
        if self.fp16:
            yield f"{what} is not built for a loss scale, which --fp16 has; use --bf16, or leave the graph out"
        if self.rampup_batch_size is not None:
            yield f"{what} is of one size of a step, and --rampup-batch-size has several; leave one of them out"
        if self.moe_kernels == "reference":
            yield f"{what} waits for nothing, and --moe-kernels reference reads the sizes of experts on the host; leave one of them out"

    @property
    def half(self) -> str | None:
        """The 16-bit type that is computed in, as torch calls it."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None

    @property
    def bytes_per_activation(self) -> int:
        """Of one number that is computed in."""
        return 2 if self.half else 8 if self.params_dtype == "float64" else 4

    @property
    def recompute(self) -> str | None:
        """None, 'full' or 'selective'."""
        return self.recompute_granularity or (
            "full" if self.checkpoint_activations else "selective" if self.recompute_activations else None
        )

    @property
    def recomputed_modules(self) -> frozenset[str]:
        """Parts of a block that are recomputed, by the names of --recompute-modules."""
        modules = {"full": ("core_attn", "mlp", "moe", "shared_experts"), "selective": self.recompute_modules or ("core_attn",), None: ()}
        return frozenset(modules[self.recompute]) | ({"moe"} if self.moe_layer_recompute else set())


# The same quantity in several units: one source of settings gives it in one unit, a stronger source replaces it as a whole.
RUN_LENGTHS = ("train_iters", "train_samples", "train_tokens")
DECAY_LENGTHS = ("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens")
WARMUP_LENGTHS = ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adam", "sgd", "muon"] = flag(
        "adam",
        "adam is AdamW (decoupled weight decay); muon orthogonalises the updates of matrices, expert by expert, and leaves embeddings, "
        "head, router, coefficients and vectors to AdamW",
    )
    lr: float = flag(1e-3, "highest learning rate", above=0)
    min_lr: float = flag(0.0, "lowest learning rate of the decay", minimum=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag("linear", "shape of the decay")
    lr_decay_iters: int | None = flag(None, "steps until the lowest rate; the whole run when not given", minimum=1)
    lr_decay_samples: int | None = flag(None, "the same in samples", minimum=1)
    lr_decay_tokens: int | None = flag(None, "the same in tokens", minimum=1)
    lr_warmup_fraction: float | None = flag(None, "linear warm-up over this share of the decay", minimum=0, maximum=1)
    lr_warmup_iters: int = flag(0, "linear warm-up steps", minimum=0)
    lr_warmup_samples: int = flag(0, "the same in samples", minimum=0)
    lr_warmup_tokens: int | None = flag(None, "the same in tokens", minimum=0)
    lr_wsd_decay_iters: int | None = flag(None, "length of the final decay of WSD; a tenth of the run when not given", minimum=1)
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential"] = flag("exponential", "shape of the final decay of WSD")
    weight_decay: float = flag(0.01, "decoupled weight decay; biases and norms have none", minimum=0)
    start_weight_decay: float | None = flag(None, "weight decay at the start, with --weight-decay-incr-style linear or cosine", minimum=0)
    end_weight_decay: float | None = flag(None, "weight decay at the end of the run, in place of --weight-decay", minimum=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = flag(
        "constant", "how the weight decay goes from start to end, with the samples of the run"
    )
    moe_expert_lr_mult: float = flag(
        1.0, "learning rate of the routed experts over that of all else, at every step (lr_mult of Megatron's parameter groups)", minimum=0
    )
    moe_expert_wd_mult: float = flag(1.0, "the same for the weight decay (wd_mult)", minimum=0)
    adam_beta1: float = flag(0.9, "decay of the first moment", minimum=0, maximum=0.99999)
    adam_beta2: float = flag(0.999, "decay of the second moment; the published recipes use 0.95", minimum=0, maximum=0.9999999)
    adam_eps: float = flag(1e-8, "added to the root of the second moment", above=0)
    adam_kernel: Literal["torch", "apex"] = flag(
        "torch", "whose fused AdamW: torch's, or that of NVIDIA's apex where it is installed, which makes the same step"
    )
    sgd_momentum: float = flag(0.9, "momentum of sgd", minimum=0, maximum=0.99999)
    muon_momentum: float = flag(0.95, "momentum of muon", minimum=0, maximum=0.99999)
    muon_use_nesterov: bool = flag(True, "look one step ahead along muon's momentum")
    muon_num_ns_steps: int = flag(5, "Newton-Schulz steps of muon", minimum=1, maximum=99)
    muon_extra_scale_factor: float = flag(
        0.2,
        "muon's update of a matrix is this times the root of its longer side times an orthogonal matrix; 0.2 makes its elements as large "
        "as AdamW's, so that one learning rate fits both",
        above=0,
    )
    clip_grad: float = flag(1.0, "clip the global gradient norm to this; 0 switches clipping off", minimum=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"--min-lr ({self.min_lr:g}) must not exceed --lr ({self.lr:g})"
        decays = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style == "constant" and decays != (None, None):
            yield "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine; or give --weight-decay alone"
        elif self.weight_decay_incr_style != "constant" and None in decays:
            yield f"--weight-decay-incr-style {self.weight_decay_incr_style} needs both --start-weight-decay and --end-weight-decay"
        given = [n for n in DECAY_LENGTHS if getattr(self, n) is not None]
        if len(given) > 1:
            yield f"give the decay in one unit only, not {' and '.join('--' + n.replace('_', '-') for n in given)}"
        warmups = [n for n in WARMUP_LENGTHS if getattr(self, n)]
        if len(warmups) > 1:
            yield f"give the warm-up in one unit only, not {' and '.join('--' + n.replace('_', '-') for n in warmups)}"

    @property
    def has_state(self) -> bool:
        """Whether it remembers anything of earlier steps."""
        return self.optimizer != "sgd" or self.sgd_momentum > 0
