"""What one process computes: a plain GPT on the whole batch, and torch's own optimizer.

The definition that a layout is held against, so nothing here knows a rank: no mesh, no DTensor, no FSDP, and no import of `parallel/`
or `mpu/`, directly or not (tests/training/test_verify_imports.py walks the graph). The rules of the step - divide once, clip, decay,
move the expert biases - are written down a second time, in the plainest words.

What depends on the number of data ranks by definition, the global-batch loss (its counts are those of the micro-batches that have been
routed so far, one of each data rank at a time), is walked in the order of so many ranks: `Rounds`.
"""
# B sequences, S tokens each, V vocabulary, N modules of multi-token prediction, M = 1 + N predictions from a place

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import OptimizerConfig
from megatron_moe.data.batch import Batch, Samples, make_batch
from megatron_moe.data.mock import MockDataset
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, initialize_parameters
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.tokens import Reducer
from megatron_moe.utils.random import Purpose, token_keys, uniform

STEPS = 2
EOD = 1  # a frequent word of the made-up text: documents end within sequences
_HOLES = 1_000_000  # an iteration that no step has: the draws of the loss mask are no draws of the model

Say = Callable[[str], None]


@dataclass
class Trace:
    """Everything that is compared, by (quantity, step from 1, name); whole tensors on the CPU. `clip`: what gradients were clipped to."""

    values: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    clip: float = 0.0

    def put(self, quantity: str, step: int, name: str, value: Tensor) -> None:
        self.values[quantity, step, name] = value.detach().to("cpu", torch.float64, copy=True)


@dataclass(frozen=True)
class Rates:
    """Of one step."""

    learning_rate: float
    weight_decay: float


def rates(run: RunConfig) -> list[Rates]:
    """Different ones for the two steps, where the run's change."""
    o = run.optimizer
    decays = (o.weight_decay,) * 2 if o.start_weight_decay is None else (o.start_weight_decay, o.end_weight_decay)
    return [Rates(o.lr, decays[0]), Rates(o.lr / 2, decays[1])]


# ---------------------------------------------------------------- what both sides are given


def text(run: RunConfig, vocab_size: int) -> MockDataset:
    return MockDataset(vocab_size, run.training.seq_length, run.training.seed)


def holed_batch(run: RunConfig, items: Sequence[dict] | Samples) -> Batch:
    """A micro-batch whose loss mask leaves another number of tokens to every rank, to every fourth sequence hardly any."""
    d = run.data
    batch = make_batch(items, EOD, d.reset_position_ids, d.reset_attention_mask, d.eod_mask_loss)
    keys_BS = token_keys(run.training.seed, _HOLES, batch.sample_ids, batch.tokens.shape[1])
    share_B1 = torch.where(batch.sample_ids % 4 == 0, 0.85, 0.3)[:, None]
    return batch._replace(loss_mask=batch.loss_mask * (uniform(keys_BS, Purpose.ASSIGNMENT, 1)[..., 0] >= share_B1))


def fill(model: GPT, run: RunConfig, seed: int) -> GPT:
    """Initial weights of a seed, with gates wide enough that no two scores are nearly equal: a tie would be decided by rounding."""
    initialize_parameters(model, seed, run.model.init_method_std, run.model.num_layers, run.moe.moe_identical_expert_init)
    with torch.no_grad():
        for moe in moe_layers(model):
            moe.gate.weight.mul_(20.0)
    return model


# ---------------------------------------------------------------- the run in one process


def train_reference(run: RunConfig, vocab_size: int, data_ranks: int, device: torch.device, say: Say) -> Trace:
    """Two steps. `data_ranks`: how many ranks the layout reads with; the micro-batches are the same, one after the other."""
    trace, micro = Trace(), run.training.micro_batch_size
    model = fill(build(run, vocab_size, device), run, run.training.seed)
    teacher = (
        fill(build(run.teacher(), vocab_size, device), run.teacher(), run.training.seed + 1).eval() if run.distillation.is_on else None
    )
    optimizer = plain_optimizer(model, run)
    samples, batch_size = text(run, vocab_size), run.training.global_batch_size
    for step in range(STEPS):
        say(f"one device: step {step + 1} of {STEPS}")
        first = step * batch_size
        items = [samples[i] for i in range(first, first + batch_size)]
        batches = [holed_batch(run, items[i : i + micro]).to(device) for i in range(0, batch_size, micro)]
        trace.put("loss", step + 1, "", gradients(model, teacher, run, batches, step, data_ranks, trace))
        for name, p in model.named_parameters():
            trace.put("gradient", step + 1, name, torch.zeros_like(p) if p.grad is None else p.grad)
        for moe in moe_layers(model):
            trace.put("routing", step + 1, f"layers.{moe.layer}.moe", moe.stats.vector(device))
        norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        trace.put("gradient norm", step + 1, "", norm)
        if step == 0 and run.optimizer.clip_grad:
            trace.clip = min(run.optimizer.clip_grad, float(norm) / 2)  # small enough to act
        if trace.clip:
            scale = min(trace.clip / (float(norm) + 1e-6), 1.0)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)
        set_plain_rates(optimizer, rates(run)[step])
        optimizer.step()
        optimizer.zero_grad()
        move_biases(model)
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            trace.put("weight", step + 1, name, t)
    return trace


def build(run: RunConfig, vocab_size: int, device: torch.device) -> GPT:
    model = build_on_meta(lambda: GPT(run.model, run.moe, vocab_size), torch.float64).to_empty(device=device)
    for moe in moe_layers(model):
        moe.experts.use_reference = True
    return model


def gradients(
    model: GPT, teacher: GPT | None, run: RunConfig, batches: Sequence[Batch], step: int, data_ranks: int, trace: Trace
) -> Tensor:
    """Of sum(losses of unmasked tokens) / their number in the global batch, plus the auxiliary losses; returns the language-model loss."""
    length = run.training.seq_length
    divisor = sum(b.loss_mask.sum(dtype=torch.float64) for b in batches).clamp_min(1.0)
    warmup = run.moe.moe_loss_warmup_iters
    weight = (min((step + 1) / warmup, 1.0) if warmup else 1.0) / (run.training.global_batch_size * length)
    for moe in moe_layers(model):
        moe.begin_step(weight)
    forward = partial(_answers, model, run, step)
    ahead = {id(b): tokens_ahead(b, run.model.mtp_num_layers) for b in batches}
    counted = [sum(ahead[id(b)][1][:, n].sum() for b in batches).clamp_min(1.0) for n in range(1, 1 + run.model.mtp_num_layers)]
    further = torch.zeros(len(counted), dtype=torch.float64, device=divisor.device)
    if run.moe.moe_global_loss_coeff:
        know_rounds(model, lambda b: forward(b, ahead[id(b)][0]), batches, weight, data_ranks)
    loss, distance, d = 0.0, 0.0, run.distillation
    for b in batches:
        labels_BMS, mask_BMS = ahead[id(b)]
        logits_BSV, further_BNS = forward(b, labels_BMS)
        losses_BS = F.cross_entropy(logits_BSV.flatten(0, 1), b.labels.flatten(), reduction="none").view_as(b.labels)
        objective = lm = (losses_BS * b.loss_mask).sum() / divisor
        for n, count in enumerate(counted):
            share = (further_BNS[:, n] * mask_BMS[:, n + 1]).sum() / count
            objective = objective + run.model.mtp_loss_scaling_factor * share / len(counted)
            further[n] += share.detach()
        if teacher is not None:
            kl = (_divergence(logits_BSV, teacher, b, d.kd_temp) * b.loss_mask).sum() / divisor
            objective = d.kd_alpha_ce * objective + d.kd_beta_ce * d.kd_temp**2 * kl
            distance += kl.detach()
        objective.backward()
        loss += lm.detach()
    if teacher is not None:
        trace.put("distance to the teacher", step + 1, "", distance)
    if counted:
        trace.put("loss further on", step + 1, "", further)
    return loss


def _answers(model: GPT, run: RunConfig, step: int, b: Batch, labels_BMS: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the next token, and the losses [B, N, S] of the N behind it in multi-token prediction."""
    keys_BS, further_BNS = token_keys(run.training.seed, step, b.sample_ids, b.tokens.shape[1]), None
    if run.model.mtp_num_layers:
        further_BNS, logits_BSV = model(b.tokens, b.position_ids, labels_BMS, b.segment_ids, keys_BS, with_logits=True)
    else:
        logits_BSV = model(b.tokens, b.position_ids, None, b.segment_ids, keys_BS)
    return logits_BSV[..., : model.vocab_size], further_BNS


def tokens_ahead(b: Batch, depths: int) -> tuple[Tensor, Tensor]:
    """(labels, mask) [B, 1 + depths, S], place by place: the token 1 + n places on counts for whom it follows within the sequence, and all
    tokens up to the one before it within the document."""
    labels, mask = (t[:, None].repeat(1, 1 + depths, 1) for t in (b.labels, b.loss_mask))
    length = b.tokens.shape[1]
    for n in range(1, 1 + depths):
        labels[:, n], mask[:, n] = 0, 0
        for i in range(length - n):
            labels[:, n, i] = b.labels[:, i + n]
            is_same = b.position_ids[:, i + n] == b.position_ids[:, i] + n
            if b.segment_ids is not None:
                is_same = is_same & (b.segment_ids[:, i + n] == b.segment_ids[:, i])
            mask[:, n, i] = b.loss_mask[:, i + n] * is_same
    return labels, mask


def _divergence(logits_BSV: Tensor, teacher: GPT, b: Batch, temperature: float) -> Tensor:
    """KL(teacher || student), both softened, token by token."""
    with torch.no_grad():
        taught_BSV = teacher(b.tokens, b.position_ids, None, b.segment_ids)[..., : logits_BSV.shape[-1]] / temperature
    return (taught_BSV.softmax(-1) * (taught_BSV.log_softmax(-1) - (logits_BSV / temperature).log_softmax(-1))).sum(-1)


# ---------------------------------------------------------------- rules of the step


def plain_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.Optimizer | PlainMuon:
    """A group for every parameter. What is a vector, in one expert, is not decayed; experts have multipliers."""
    o, groups = run.optimizer, []
    for name, p in model.named_parameters():
        is_expert = ".experts." in name
        is_matrix = p.ndim - is_expert > 1
        groups.append({
            "params": [p], "is_turned": is_matrix and not name.endswith(_TABLES), "share_of_rate": o.moe_expert_lr_mult if is_expert else 1.0,
            "share_of_decay": (o.moe_expert_wd_mult if is_expert else 1.0) * is_matrix,
        })  # fmt: skip
    if o.optimizer == "muon":
        return PlainMuon(groups, o)
    if o.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.sgd_momentum, foreach=False)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, foreach=False, fused=False)


# Matrices whose rows are words, experts or weights of a sum: Muon leaves them to AdamW.
_TABLES = ("embedding.weight", "head.weight", ".gate.weight", "coefficient.weight", "shared_expert_gate.weight")


class PlainMuon:
    """Muon matrix by matrix (arXiv 2502.16982), and AdamW for what it leaves."""

    def __init__(self, groups: list[dict], o: OptimizerConfig):
        self.param_groups, self.config = groups, o
        betas = (o.adam_beta1, o.adam_beta2)
        self.adam = torch.optim.AdamW([g for g in groups if not g["is_turned"]], lr=o.lr, betas=betas, eps=o.adam_eps, foreach=False)
        turned = [g for g in groups if g["is_turned"]]
        self.param_groups = [*self.adam.param_groups, *turned]
        self.momenta = {p: torch.zeros_like(p) for g in turned for p in g["params"]}

    @torch.no_grad()
    def step(self) -> None:
        for group in (g for g in self.param_groups if g["is_turned"]):
            for p in group["params"]:
                momentum = self.momenta[p].mul_(self.config.muon_momentum).add_(p.grad, alpha=1 - self.config.muon_momentum)
                way = momentum
                if self.config.muon_use_nesterov:
                    way = (1 - self.config.muon_momentum) * p.grad + self.config.muon_momentum * momentum
                size = self.config.muon_extra_scale_factor * max(p.shape[-2:]) ** 0.5
                turned = torch.stack([turn(m, self.config.muon_num_ns_steps) for m in way.reshape(-1, *p.shape[-2:])])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(turned.view_as(p), alpha=group["lr"] * size)
        self.adam.step()

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def turn(m: Tensor, steps: int) -> Tensor:
    """Newton-Schulz: all singular values of a matrix towards 1, by the polynomial of Keller Jordan."""
    x = m / m.norm().clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        change = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + (change @ x if x.shape[0] <= x.shape[1] else x @ change)
    return x


def set_plain_rates(optimizer: torch.optim.Optimizer | PlainMuon, now: Rates) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate * group["share_of_rate"]
        group["weight_decay"] = now.weight_decay * group["share_of_decay"]


def move_biases(model: GPT) -> None:
    """A fixed step up for experts with fewer tokens than the mean, down for those with more (arXiv 2408.15664, algorithm 1)."""
    for moe in (m for m in moe_layers(model) if m.gate.expert_bias is not None):
        counts = moe.stats.counts_E.tolist()
        mean = sum(counts) / len(counts)
        for e, count in enumerate(counts):
            moe.gate.expert_bias[e] += moe.config.moe_router_bias_update_rate * ((count < mean) - (count > mean))


# ---------------------------------------------------------------- the global-batch loss


class Rounds(Reducer):
    """Counts of all micro-batches that `data_ranks` ranks route at the same time, handed out with the first of them.

    Micro-batch m of rank r is the (m * data_ranks + r)-th here. Without `known` counts it only takes them down.
    """

    def __init__(self, data_ranks: int, known: Sequence[Tensor] | None = None):
        self.data_ranks, self.known, self.seen = data_ranks, known, []

    def over_batch(self, counts: Tensor) -> Tensor:
        number = len(self.seen)
        self.seen.append(counts)
        if self.known is None:
            return counts
        round_ = self.known[number : number + self.data_ranks]
        return sum(round_) if number % self.data_ranks == 0 else torch.zeros_like(counts)


def know_rounds(model: GPT, forward: Callable[[Batch], Tensor], batches: Sequence[Batch], weight: float, data_ranks: int) -> None:
    """Route the step once without training, so that the first micro-batch of each round can be told the counts of the others."""
    layers = moe_layers(model)
    for moe in layers:
        moe.reducer = Rounds(data_ranks)
    with torch.no_grad():
        for b in batches:
            forward(b)
    for moe in layers:
        moe.reducer = Rounds(data_ranks, moe.reducer.seen)
        moe.begin_step(weight)
