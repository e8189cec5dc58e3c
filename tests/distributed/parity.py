"""The definition of right: a parallel layout trains the model that one process trains.

`reference(model_flags)` trains a plain GPT - no mesh, no DTensor, no FSDP - on the whole batch in this process.
One thing depends on the layout by definition, the global-batch loss: its counts are of the micro-batches so far, and how many that
are differs with the data ranks. `reference(..., ranks)` walks the micro-batches of so many ranks in turn, and knows the counts
of those that the ranks route at the same time from a forward of the whole step before (`CountsOfRounds`).
`layout(flags)` trains the same model in a layout, on every rank of a pool. Both return losses and norms of every step, all
gradients of the first, routing statistics of the first two, and the weights after the last. `check` compares.
"""
# B sequences, S tokens each

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from optimizer.muon_oracle import PlainMuon
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_moe.arguments import parse_args
from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, look_ahead
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.tokens import Reducer
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.optimizer.clip import clip_gradients, gradient_factor, gradient_norm
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.half_adam import HalfAdamW
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.distillation import Distillation, build_teacher
from megatron_moe.training.step import count_loss_tokens, counted_parameters, forward_backward, move_expert_biases, train_step
from megatron_moe.utils.random import token_keys

VOCAB, SEQUENCES, LENGTH, STEPS = 60, 8, 15, 5  # 15 tokens: not divisible by any tensor-parallel degree
DIVISIBLE = "--seq-length 16"  # for layouts that cut every sequence into equal parts
DOCUMENTS = "--reset-attention-mask --reset-position-ids"  # a sequence is of several documents
SEED, CLIP = 7, 0.5

COMMON = (
    "--num-layers 3 --expert-interval 1 --hidden-size 32 --num-attention-heads 4 --seq-length 15 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --mock-data --train-iters 5 --make-vocab-size-divisible-by 16 --hidden-dropout 0 --attention-dropout 0 "
    # eps 1e-5: with 1e-8 Adam turns the rounding noise of near-zero gradients into full steps
    "--lr 1e-2 --adam-eps 1e-5 --moe-loss-coeff 0.5 --moe-router-z-loss-coeff 0.1"
)
FP32 = "--adam-eps 1e-3"  # the same trap at float32's level of noise
FP64 = "--params-dtype float64 --moe-kernels reference"
MODELS = {
    # two expert-parallel degrees (2 and 4 under EP 4), residual, top-2 with sampled second expert, grouped queries, biases, tied
    "pyramid": "--num-experts 1 2 8 --mlp-type residual --topk 2 --num-key-value-heads 2 --disable-moe-token-dropping",
    # the other half of every choice
    "modern": "--num-experts 1 4 4 --topk 3 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --disable-moe-token-dropping --ffn-hidden-size 48",
    # the experts' products in FP8, emulated: rows are quantised one by one, so a layout changes nothing
    "fp8": "--num-experts 1 4 4 --topk 3 --swiglu --disable-bias-linear --ffn-hidden-size 48 --moe-fp8-experts --disable-moe-token-dropping",
    # dropout everywhere, top-1 with jitter
    "noisy": "--num-experts 1 4 4 --topk 1 --hidden-dropout 0.2 --attention-dropout 0.2 --moe-noisy-gate-policy Jitter "
    "--disable-moe-token-dropping",
    # capacity with random token selection: per source rank and microbatch, so the same under every data/expert layout
    # experts with a rate and a decay of their own, and a decay that grows
    "rates": "--num-experts 1 2 8 --mlp-type residual --topk 2 --disable-moe-token-dropping --moe-expert-lr-mult 0.3 --moe-expert-wd-mult 4 "
    "--weight-decay-incr-style linear --start-weight-decay 0.5 --end-weight-decay 2.5 --weight-decay 0.5",
    # a student with all the noise, and a teacher that has none: other depth, width and degrees (4 and 8), evaluation capacity
    "student": "--num-experts 1 4 4 --topk 1 --hidden-dropout 0.2 --attention-dropout 0.2 --moe-noisy-gate-policy Jitter "
    "--moe-train-capacity-factor 16 --moe-eval-capacity-factor 16 --kd-alpha-ce 0.7 --kd-beta-ce 1.5 --kd-temp 2 --mos "
    "--num-layers-teacher 2 --num-experts-teacher 4 8 --hidden-size-teacher 48 --load-teacher none",
    "dropping": "--num-experts 1 4 4 --topk 1 --moe-train-capacity-factor 0.6 --moe-min-capacity 1",
    # sigmoid scores, groups, and a bias that moves: by 0.05, so that choices change within the steps
    "deepseek": "--num-experts 1 4 8 --topk 2 --moe-router-score-function sigmoid --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05 --disable-moe-top2-2nd-expert-sampling "
    "--moe-router-normalize chosen --moe-router-topk-scaling-factor 2.5 --disable-moe-token-dropping",
    "drawn": "--num-experts 1 4 4 --topk 1 --moe-noisy-gate-policy RSample --moe-train-capacity-factor 0.8 --moe-min-capacity 1",
    "balanced": "--num-experts 1 4 4 --topk 2 --moe-router-policy balanced --moe-seq-loss-coeff 0.4",
    "hash": "--num-experts 1 4 8 --topk 2 --moe-router-policy hash --moe-router-z-loss-coeff 0 --disable-moe-token-dropping",
    "zipf": "--num-experts 1 4 4 --topk 2 --moe-router-policy zipf --moe-noisy-gate-policy Jitter --disable-moe-token-dropping",
    # these two look at all tokens of a rank's micro-batch
    "expert_choice": "--num-experts 1 4 4 --topk 2 --moe-router-policy expert_choice",
    "sinkhorn": "--num-experts 1 4 4 --topk 1 --moe-router-policy sinkhorn --moe-train-capacity-factor 0.8 --moe-min-capacity 1",
    # a gated shared expert beside narrower routed ones
    "shared": "--num-experts 1 4 4 --topk 2 --activation-func relu --moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate "
    "--moe-ffn-hidden-size 20 --disable-moe-token-dropping",
    # experts of another width than the tokens, and the plain sum of Residual-MoE
    "latent": "--num-experts 1 4 8 --topk 3 --squared-relu --moe-latent-size 12 --mlp-type residual --moe-residual-combine sum --init-method-std 0.05 "
    "--disable-moe-token-dropping",
    # experts of the factory below, of which some get no token
    "modules": "--num-experts 1 2 8 --topk 1 --disable-moe-token-dropping",
    # other optimizers, experts at a rate and a decay of their own; 1, 2 and 4 matrices of one shape
    "muon": "--num-experts 1 2 8 --mlp-type residual --topk 2 --disable-moe-token-dropping --optimizer muon --weight-decay 0.3 "
    "--moe-expert-lr-mult 0.5 --moe-expert-wd-mult 2 --num-key-value-heads 2",
    "muon_latent": "--num-experts 1 4 8 --topk 3 --swiglu --disable-bias-linear --ffn-hidden-size 48 --moe-latent-size 12 --optimizer muon "
    "--no-muon-use-nesterov --muon-num-ns-steps 3 --moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate --init-method-std 0.05 "
    "--disable-moe-token-dropping",
    "sgd": "--num-experts 1 2 8 --mlp-type residual --topk 2 --disable-moe-token-dropping --optimizer sgd --sgd-momentum 0.8 --weight-decay 0.3 "
    "--moe-expert-lr-mult 0.5",
    # every auxiliary loss at once, in a warm-up: micro-batch and z from the common flags, sequence, global batch
    "losses": "--num-experts 1 4 8 --topk 2 --disable-moe-token-dropping --moe-seq-loss-coeff 0.4 --moe-global-loss-coeff 0.3 "
    "--moe-loss-warmup-iters 3",
    # rotary positions, grouped queries, no dropout
    "ring": "--num-experts 1 2 4 --topk 2 --num-key-value-heads 2 --position-embedding-type rope --hidden-dropout 0.1 --disable-moe-token-dropping",
    # kinds of attention. Norms of each head, biases of q, k and v alone, half of each head rotated in neighbouring pairs; dense first
    "qk_heads": "--num-experts 4 --moe-first-k-dense-replace 1 --topk 2 --num-key-value-heads 2 --disable-bias-linear --add-qkv-bias --qk-layernorm "
    "--position-embedding-type rope --rotary-percent 0.5 --rotary-interleaved --disable-moe-token-dropping",
    # norms of all heads together, stretched frequencies
    "qk_hidden": "--num-experts 1 2 4 --topk 2 --num-key-value-heads 2 --normalization RMSNorm --qk-layernorm --qk-layernorm-scope hidden "
    "--position-embedding-type rope --rope-scaling-type linear --rope-scaling-factor 3 --disable-moe-token-dropping",
    "qk_hidden_mean": "--num-experts 1 2 4 --topk 2 --num-key-value-heads 2 --qk-layernorm --qk-layernorm-scope hidden --disable-moe-token-dropping",
    # latent attention with narrow queries and YaRN; without, with dropout
    "latent_heads": "--num-experts 1 2 4 --topk 2 --swiglu --normalization RMSNorm --disable-bias-linear --multi-latent-attention --q-lora-rank 14 "
    "--kv-lora-rank 12 --qk-head-dim 6 --qk-pos-emb-head-dim 4 --v-head-dim 10 --position-embedding-type rope --rotary-interleaved "
    "--rope-scaling-type yarn --rope-scaling-factor 4 --rope-original-max-position-embeddings 16 --rope-mscale 0.7 --rope-mscale-all-dim 1.3 "
    "--disable-moe-token-dropping",
    "latent_direct": "--num-experts 1 2 4 --topk 2 --multi-latent-attention --kv-lora-rank 12 --qk-head-dim 6 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 4 --position-embedding-type rope --attention-dropout 0.2 --disable-moe-token-dropping",
    "latent_ring": "--num-experts 1 2 4 --topk 2 --multi-latent-attention --kv-lora-rank 12 --qk-head-dim 12 --qk-pos-emb-head-dim 4 --v-head-dim 8 "
    "--position-embedding-type rope --rope-scaling-type yarn --rope-scaling-factor 4 --rope-mscale-all-dim 1.3 --disable-moe-token-dropping",
    "latent_wide": "--num-experts 1 2 4 --topk 2 --multi-latent-attention --kv-lora-rank 12 --qk-head-dim 4 --qk-pos-emb-head-dim 4 --v-head-dim 16 "
    "--position-embedding-type rope --disable-moe-token-dropping",
    # a window on two layers of three, sinks, dropout
    "windows": "--num-experts 1 2 4 --topk 2 --num-key-value-heads 2 --window-size 5 --window-attn-skip-freq 1 0 1 --softmax-type learnable "
    "--attention-dropout 0.2 --position-embedding-type rope --rope-scaling-type llama3 --rope-scaling-factor 4 "
    "--rope-original-max-position-embeddings 12 --init-method-std 0.2 --disable-moe-token-dropping",
    # multi-token prediction: a dense and an MoE last layer, tied and untied, everything drawn
    "ahead": "--num-experts 1 4 8 --topk 2 --num-key-value-heads 2 --mtp-num-layers 2 --mtp-loss-scaling-factor 0.4 --hidden-dropout 0.2 "
    "--attention-dropout 0.1 --moe-noisy-gate-policy Jitter --disable-moe-token-dropping",
    "ahead_untied": "--num-experts 1 4 4 --topk 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.05 --disable-moe-top2-2nd-expert-sampling --moe-router-normalize chosen --mtp-num-layers 1 "
    "--moe-seq-loss-coeff 0.4 --disable-moe-token-dropping",
    "ahead_student": "--num-experts 1 4 4 --topk 1 --mtp-num-layers 1 --mtp-loss-scaling-factor 0.5 --disable-moe-token-dropping "
    "--kd-alpha-ce 0.7 --kd-beta-ce 1.5 --kd-temp 2 --mos --num-layers-teacher 2 --num-experts-teacher 4 8 --load-teacher none",
    "ahead_latent": "--num-experts 1 2 4 --topk 2 --swiglu --normalization RMSNorm --disable-bias-linear --multi-latent-attention --q-lora-rank 14 "
    "--kv-lora-rank 12 --qk-head-dim 6 --qk-pos-emb-head-dim 4 --v-head-dim 10 --position-embedding-type rope --window-size 5 "
    "--window-attn-skip-freq 1 0 1 --softmax-type learnable --mtp-num-layers 1 --disable-moe-token-dropping",
    "ahead_deep": "--num-layers 4 --num-experts 1 2 4 8 --mlp-type residual --topk 2 --mtp-num-layers 1 --disable-moe-token-dropping",
    "ahead_ring": "--num-experts 1 2 4 --topk 2 --mtp-num-layers 1 --position-embedding-type rope --disable-moe-token-dropping",
    # four layers, for pipelines of up to four stages
    "deep": "--num-layers 4 --num-experts 1 2 4 8 --mlp-type residual --topk 2 --num-key-value-heads 2 --disable-moe-token-dropping",
    # experts in the later half alone: early stages have none
    "late": "--num-layers 4 --num-experts 1 1 4 8 --topk 2 --swiglu --untie-embeddings-and-output-weights --position-embedding-type rope "
    "--disable-moe-token-dropping --moe-seq-loss-coeff 0.4",
}


class OddExpert(nn.Module):
    """What a stack of matrices is not: a norm inside, a vector, a single number, and the tuple that Megatron's modules return."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 20), nn.Tanh(), nn.Linear(20, width))
        self.scale, self.mix = nn.Parameter(torch.ones(width)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.inner(self.norm(x)) * self.scale + self.mix * x, None


FACTORIES = {"modules": OddExpert}


def config(model: str, flags: str = "") -> RunConfig:
    return parse_args(f"{COMMON} {MODELS[model]} {flags}".split()).run


def global_batch(step: int, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, S + 1], and a mask that leaves different numbers of tokens to every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (SEQUENCES, length + 1), generator=generator)
    mask = (torch.rand(SEQUENCES, length, generator=generator) > 0.3).float()
    mask[0, :12] = 0
    return tokens, mask


def microbatches(step: int, rank: int, ranks: int, size: int, c: RunConfig | None = None) -> list[Batch]:
    """Micro-batch m of rank r holds the samples (m * ranks + r) * size + [0, size), as the loader hands them out."""
    length, has_documents = (LENGTH, False) if c is None else (c.training.seq_length, c.data.reset_attention_mask)
    tokens, mask = global_batch(step, length)
    segments, positions = documents(tokens[:, :-1]) if has_documents else (None, torch.arange(length).expand(SEQUENCES, -1))
    out = []
    for m in range(SEQUENCES // (size * ranks)):
        first = (m * ranks + rank) * size
        s = slice(first, first + size)
        numbers = None if segments is None else segments[s]
        out.append(Batch(tokens[s, :-1], tokens[s, 1:], mask[s], positions[s], numbers, torch.arange(first, first + size)))
    return out


def documents(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of its document, and position within it, of every token: one in six ends a document."""
    numbers, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for i in range(1, tokens.shape[1]):
        ends = tokens[:, i - 1] % 6 == 0
        numbers[:, i] = numbers[:, i - 1] + ends
        positions[:, i] = torch.where(ends, 0, positions[:, i - 1] + 1)
    return numbers, positions


def learning_rate(step: int) -> float:
    return 1e-2 * (1 + step / 2)  # of step 0: what the optimizer was built with


def weight_decay(c: RunConfig, step: int) -> float:
    """Of step 0: what the optimizer was built with."""
    o = c.optimizer
    return (
        o.weight_decay
        if o.start_weight_decay is None
        else o.start_weight_decay + (o.end_weight_decay - o.start_weight_decay) * step / STEPS
    )


# matrices that Muon leaves to AdamW
TABLES = ("embedding.weight", "head.weight", ".gate.weight", "coefficient.weight", "shared_expert_gate.weight")


def plain_optimizer(model: GPT, c: RunConfig) -> torch.optim.Optimizer | PlainMuon:
    """A group for every parameter, with its shares of rate and decay in words: matrices decay, experts have multipliers."""
    o, groups = c.optimizer, []
    for name, p in model.named_parameters():
        is_expert = ".experts." in name
        is_matrix = (name.endswith(".weight") and "norm" not in name) or name.endswith((".w1", ".w2", ".w_gate", ".w3"))
        shares = {"rate": o.moe_expert_lr_mult if is_expert else 1.0, "decay": (o.moe_expert_wd_mult if is_expert else 1.0) * is_matrix}
        groups.append({"params": [p], **shares, "matrices": is_matrix and not name.endswith(TABLES)})
    set_plain_rates(groups, learning_rate(0), weight_decay(c, 0))
    if o.optimizer == "muon":
        return PlainMuon(groups, o)
    if o.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=o.sgd_momentum)
    return torch.optim.AdamW(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=True)


def set_plain_rates(groups: list[dict], rate: float, decay: float) -> None:
    for group in groups:
        group["lr"], group["weight_decay"] = rate * group["rate"], decay * group["decay"]


def spread_gates(model: GPT) -> None:
    """Top-k without near-ties: a tie may flip between two orders of summation, and is no fault of the layout."""
    with torch.no_grad():
        for moe in moe_layers(model):
            moe.gate.weight.mul_(20.0)


def taught(model: GPT, teacher: GPT, b: Batch, keys: torch.Tensor, divisor: torch.Tensor, c: RunConfig) -> tuple[torch.Tensor, ...]:
    """(objective, language-model loss, divergence) of one micro-batch, by the definition of each."""
    d = c.distillation
    with torch.no_grad():
        softened = teacher(b.tokens, b.position_ids, None, b.segment_ids)[..., :VOCAB] / d.kd_temp
    logits = model(b.tokens, b.position_ids, None, b.segment_ids, keys)[..., :VOCAB]
    lm = F.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none").view_as(b.labels)
    kl = (softened.softmax(-1) * (softened.log_softmax(-1) - (logits / d.kd_temp).log_softmax(-1))).sum(-1)
    lm, kl = ((x * b.loss_mask).sum() / divisor for x in (lm, kl))
    return d.kd_alpha_ce * lm + d.kd_beta_ce * d.kd_temp**2 * kl, lm, kl


def taught_by(teacher: GPT, logits: torch.Tensor, b: Batch, divisor: torch.Tensor, c: RunConfig) -> torch.Tensor:
    """The teacher's part of the objective, for logits [B, S, V]."""
    d = c.distillation
    with torch.no_grad():
        softened = teacher(b.tokens, b.position_ids, None, b.segment_ids)[..., :VOCAB] / d.kd_temp
    kl = (softened.softmax(-1) * (softened.log_softmax(-1) - (logits[..., :VOCAB] / d.kd_temp).log_softmax(-1))).sum(-1)
    return d.kd_beta_ce * d.kd_temp**2 * (kl * b.loss_mask).sum() / divisor


def fill_teacher(teacher: GPT, c: RunConfig) -> GPT:
    """Weights that are not the student's, as if loaded."""
    initialize_parameters(teacher, c.training.seed + 1, 5 * c.model.init_method_std, len(teacher.layers))
    spread_gates(teacher)
    return teacher


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


class CountsOfRounds(Reducer):
    """A reducer of one process that walks the micro-batches of `ranks` data ranks: micro-batch m of rank r is its (m * ranks + r)-th.

    Without `recorded` counts it only takes them down. With them, the counts of a round - all ranks' m-th micro-batches - come with
    the first micro-batch of the round, so that each of its micro-batches has seen the same ones.
    """

    def __init__(self, ranks: int, recorded: list[torch.Tensor] | None = None):
        self.ranks, self.recorded, self.seen = ranks, recorded, []

    def over_batch(self, counts: torch.Tensor) -> torch.Tensor:
        number = len(self.seen)
        self.seen.append(counts)
        if self.recorded is None:
            return counts
        assert torch.equal(counts, self.recorded[number]), "the same step routes the same way twice"
        return sum(self.recorded[number : number + self.ranks]) if number % self.ranks == 0 else torch.zeros_like(counts)


def know_other_ranks(model: GPT, batches: list[Batch], step: int, ranks: int) -> None:
    """Route the whole step once, to give every layer the counts of the rounds ahead."""
    layers = moe_layers(model)
    for moe in layers:
        moe.reducer = CountsOfRounds(ranks)
    with torch.no_grad():
        for b in batches:
            model(b.tokens, b.position_ids, b.labels, b.segment_ids, token_keys(SEED, step, b.sample_ids, b.tokens.shape[1]))
    for moe in layers:
        moe.reducer = CountsOfRounds(ranks, moe.reducer.seen)
        moe.begin_step(moe.loss_weight)


def expected(model_name: str, world: int, flags: str, precision: str = FP64) -> dict[str, torch.Tensor]:
    """The reference of a layout."""
    c = config(model_name, f"{precision} {flags}")
    ranks = c.data_parallel_size(world) if c.moe.moe_global_loss_coeff else 1
    return reference(model_name, " ".join([precision, *of_the_data(c)]), ranks)


def of_the_data(c: RunConfig) -> list[str]:
    """The flags of a layout that change the micro-batches, and so belong to the reference too."""
    has_other = {
        f"--seq-length {c.training.seq_length}": c.training.seq_length != LENGTH,
        f"--micro-batch-size {c.training.micro_batch_size}": c.training.micro_batch_size != 2,
        DOCUMENTS: c.data.reset_attention_mask,
    }
    return [flags for flags, is_other in has_other.items() if is_other]


@functools.cache
def reference(model_name: str, flags: str = FP64, ranks: int = 1) -> dict[str, torch.Tensor]:
    """One process, nothing but the model and torch's optimizer. `ranks`: see above."""
    c = config(model_name, flags)
    length = c.training.seq_length
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if c.training.params_dtype == "float64" else torch.float32)
    try:
        model = GPT(c.model, c.moe, VOCAB, FACTORIES.get(model_name))
        teacher = GPT(c.teacher().model, c.teacher().moe, VOCAB).eval() if c.distillation.is_on else None
    finally:
        torch.set_default_dtype(before)
    initialize_parameters(model, c.training.seed, c.model.init_method_std, c.model.num_layers)
    for moe in [*moe_layers(model), *(moe_layers(teacher) if teacher else [])]:
        moe.experts.use_reference = c.training.moe_kernels == "reference"
    spread_gates(model)
    if teacher:
        fill_teacher(teacher, c)
    optimizer = plain_optimizer(model, c)
    out: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        divisor, total, divergence = global_batch(step, length)[1].sum(), 0.0, 0.0
        batches = microbatches(step, 0, 1, c.training.micro_batch_size, c)
        warmup = [(i + 1) / c.moe.moe_loss_warmup_iters for i in range(c.moe.moe_loss_warmup_iters)] + [1.0] * STEPS
        for moe in moe_layers(model):
            moe.begin_step(warmup[step] / (SEQUENCES * length))
        if c.moe.moe_global_loss_coeff:
            know_other_ranks(model, batches, step, ranks)
        depths, ahead = c.model.mtp_num_layers, torch.zeros(c.model.mtp_num_layers, dtype=torch.float64)
        divisors = [sum(further(b, depths)[n][1].sum() for b in batches) for n in range(depths)]
        for b in batches:
            keys = token_keys(SEED, step, b.sample_ids, length)
            if depths:
                labels = torch.stack([b.labels, *(label for label, _ in further(b, depths))], dim=1)
                losses, logits = model(b.tokens, b.position_ids, labels, b.segment_ids, keys, with_logits=True)
                lm = F.cross_entropy(logits[..., :VOCAB].flatten(0, 1), b.labels.flatten(), reduction="none").view_as(b.labels)
                lm, shares = (lm * b.loss_mask).sum() / divisor, further_shares(losses, b, divisors)
                loss = lm + c.model.mtp_loss_scaling_factor * sum(shares) / depths
                ahead += torch.stack(shares).detach()
                if teacher:
                    loss = c.distillation.kd_alpha_ce * loss + taught_by(teacher, logits, b, divisor, c)
            elif teacher:
                loss, lm, kl = taught(model, teacher, b, keys, divisor, c)
                divergence += kl.detach()
            else:
                loss = lm = (model(b.tokens, b.position_ids, b.labels, b.segment_ids, keys) * b.loss_mask).sum() / divisor
            loss.backward()
            total += lm.detach()
        if step == 0:
            out |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters()}
        if step <= 1:
            out |= routing(model, step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        out |= {f"loss {step}": torch.as_tensor(total).double(), f"norm {step}": norm.clone()}
        if depths:
            out[f"further losses {step}"] = ahead
        if teacher and step and not depths:
            out[f"divergence {step}"] = torch.as_tensor(divergence).double()
        set_plain_rates(optimizer.param_groups, learning_rate(step), weight_decay(c, step))
        optimizer.step()
        optimizer.zero_grad()
        move_biases(model)
    return out | {f"weight {n}": whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def further_shares(losses: torch.Tensor, b: Batch, divisors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the n-th token behind the next one, for each n from 1: losses [B, N, S] of a micro-batch."""
    return [(losses[:, n] * mask).sum() / divisors[n] for n, (_, mask) in enumerate(further(b, len(divisors)))]


def further(b: Batch, depths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(label, mask) of the n-th token behind the next one, for each n from 1, token by token."""
    out = []
    for n in range(1, depths + 1):
        labels, mask = torch.zeros_like(b.labels), torch.zeros_like(b.loss_mask)
        for s in range(b.labels.shape[0]):
            for i in range(b.labels.shape[1] - n):
                labels[s, i] = b.labels[s, i + n]
                is_one_document = b.segment_ids is None or b.segment_ids[s, i] == b.segment_ids[s, i + n]
                mask[s, i] = b.loss_mask[s, i + n] if is_one_document else 0.0
        out.append((labels, mask))
    return out


def move_biases(model: GPT) -> None:
    """The rule of arXiv 2408.15664 expert by expert, from the counts of this step."""
    for moe in (m for m in moe_layers(model) if m.gate.expert_bias is not None):
        counts = moe.stats.counts_E.tolist()
        for e, count in enumerate(counts):
            missing = sum(counts) / len(counts) - count
            moe.gate.expert_bias[e] += moe.config.moe_router_bias_update_rate * ((missing > 0) - (missing < 0))


def layout(model_name: str, flags: str, scale: float | None = None) -> dict[str, torch.Tensor] | None:
    """The same on this rank of a layout; rank 0 returns the whole tensors. With a loss scale of `scale`, which must not be seen."""
    import warnings

    warnings.filterwarnings("ignore", message="While redistributing")
    c = config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, VOCAB, mesh, torch.device("cpu"), FACTORIES.get(model_name))
    spread_gates(model)
    distillation = None
    if c.distillation.is_on:
        distillation = Distillation(c.distillation, fill_teacher(build_teacher(c, VOCAB, mesh, torch.device("cpu")), c))
    optimizer = build_optimizer(model, c.optimizer)
    loss_scale = LossScale(LossScaleConfig(loss_scale=scale)) if scale else None
    out: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        batches = microbatches(step, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size, c)
        if step == 0:
            out |= first_step(model, optimizer, batches, mesh, distillation, loss_scale)
        else:
            done = train_step(model, optimizer, batches, mesh, learning_rate(step), CLIP, SEED, step, distillation, weight_decay(c, step),
                              loss_scale)  # fmt: skip
            out |= {f"loss {step}": done.lm_loss, f"norm {step}": done.grad_norm}
            if done.mtp_losses is not None:
                out[f"further losses {step}"] = done.mtp_losses
            elif done.kd_loss is not None:
                out[f"divergence {step}"] = done.kd_loss
        if step <= 1:
            out |= routing(model, step, mesh.stage_group)
    out |= {f"weight {n}": whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    out = of_all_stages(out, mesh)
    return out if dist.get_rank() == 0 else None


def of_all_stages(out: dict[str, torch.Tensor], mesh: ParallelMesh) -> dict[str, torch.Tensor]:
    """What each stage knows of its own layers, together. What two of them have - losses, norms, tied weights - is right on both, or NaN."""
    parts: list[dict[str, torch.Tensor]] = [{}] * mesh.size("pp")
    dist.all_gather_object(parts, out, group=mesh.group("pp"))
    together: dict[str, torch.Tensor] = {}
    for name, value in (item for part in parts for item in part.items()):
        together[name] = value if torch.equal(together.get(name, value), value) else value * math.nan
    return together


def routing(model: GPT, step: int, stage: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
    """Statistics of the step behind, of all ranks together."""
    out = {f"routing {m.layer} in step {step}": m.stats.vector(torch.device("cpu")).clone() for m in moe_layers(model)}
    for vector in out.values() if dist.is_initialized() else ():
        dist.all_reduce(vector, group=stage)
    return out


def first_step(
    model: GPT, optimizer: torch.optim.Optimizer, batches: list[Batch], mesh: ParallelMesh, distillation: Distillation | None = None,
    loss_scale: LossScale | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`train_step` in its parts, to look at what it does not return."""
    scale = loss_scale.scale if loss_scale else None
    if depths := model.config.mtp_num_layers:
        batches = [look_ahead(b, depths) for b in batches]
    loss = forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, SEED, 0, distillation, scale)
    mesh.sum(loss, "dp", "cp", "pp")
    norm = gradient_norm(counted_parameters(model), mesh.stage_ranks)
    if loss_scale:
        norm, _ = loss_scale.unscaled(norm)
    out = {"loss 0": loss, "norm 0": norm, "ones": norm_of_ones(model, mesh)}
    if depths:
        out |= {"loss 0": loss[0], "further losses 0": loss[1:]}
    out |= {f"gradient {n}": whole(p.grad) / (scale or 1) for n, p in model.named_parameters()}
    if isinstance(optimizer, HalfAdamW):
        optimizer.gradient_factor = gradient_factor(norm, CLIP, scale)
    else:
        clip_gradients(model.parameters(), norm, CLIP, scale)
    optimizer.step()
    optimizer.zero_grad()
    move_expert_biases(model, mesh)
    return out


def norm_of_ones(model: GPT, mesh: ParallelMesh) -> torch.Tensor:
    """The gradient norm if every element of every gradient were 1, over sqrt(number of parameters): must be 1."""
    kept = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    counted = torch.tensor(float(sum(p.numel() for p in counted_parameters(model))), dtype=torch.float64)
    norm = gradient_norm(counted_parameters(model), mesh.stage_ranks) / mesh.sum(counted, "pp").sqrt()
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    return norm


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """The assertion of every parity test, which the planted faults must turn red."""
    name, error = max(errors(found, expected).items(), key=lambda item: item[1])
    assert error < tolerance, f"{name} is off by {error:.1e}"


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """max|a - b| / max|b| by entry; entries that are zero by symmetry (key biases) are measured against 1e-3."""
    assert set(found) == set(expected) | {"ones"}, set(found) ^ set(expected)
    result = {"ones": abs(float(found["ones"]) - 1.0)}
    for name, b in expected.items():
        a = found[name]
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} != {tuple(b.shape)}"
        result[name] = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-3))
    return {name: math.inf if math.isnan(error) else error for name, error in result.items()}  # nothing is greater than NaN
