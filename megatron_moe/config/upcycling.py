"""Sparse upcycling: an MoE run that starts from a trained dense model (arXiv 2212.05055).

What has to hold for the first logits to be those of the dense model, as pure functions of the configuration: the sum of a token's gate
weights decides by what the experts' output matrix is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe.config.flags import checked, fields_of, flag

if TYPE_CHECKING:
    from megatron_moe.config.moe import MoEConfig
    from megatron_moe.config.run import RunConfig

NEARLY_ZERO = 1e-3  # of the usual size of a new router: experts are still told apart, and their scores are equal to three digits


@dataclass(frozen=True)
class UpcyclingConfig:
    """Sparse upcycling."""

    moe_use_upcycling: bool = flag(
        False, "--load is the run of a dense model, or --load-hf a dense folder of transformers, and this run starts from it at iteration 0 "
        "with a fresh optimizer: experts are copies of its MLPs. The log says how far the first logits are from the dense ones "
        "(docs/upcycling.md)")  # fmt: skip
    moe_upcycling_granularity: int = flag(
        1, "cut each MLP into this many narrow experts; a token's k are the parts of whole MLPs (arXiv 2410.07524). Wants "
        "--moe-ffn-hidden-size of that part of the MLP's width, and k and the experts to be multiples", minimum=1)  # fmt: skip
    moe_upcycling_noise_std: float = flag(
        0.0, "standard deviation of noise on the matrices of the copies; another draw for each expert, so that they differ", minimum=0
    )
    moe_upcycling_drop_ratio: float = flag(
        0.0, "drop-upcycling (arXiv 2502.19261): of each expert draw this share of the inner neurons anew, with mean and spread of the "
        "dense matrix; the paper recommends 0.5", minimum=0, maximum=1)  # fmt: skip
    moe_upcycling_router_std: float | None = flag(
        None, "spread of the routers' new weights. When not given: that of a new model where gate weights add up to one, else a thousandth of "
        "it. 0: all experts tie, so that the k lowest get every token until the first updates", minimum=0)  # fmt: skip

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        return iter(())

    @property
    def idle(self) -> list[str]:
        """Flags that were given and do nothing, because nothing is upcycled."""
        given = [s.option for s in fields_of(type(self)) if getattr(self, s.name) != s.default]
        return [] if self.moe_use_upcycling else given


# ---------------------------------------------------------------- gate weights


def weights_add_up(moe: MoEConfig) -> bool:
    """Whether a token's gate weights have the same sum whatever the router says."""
    return moe.normalize != "none" or moe.moe_router_policy == "hash"


def weight_sum(moe: MoEConfig, num_experts: int) -> float:
    """Sum of the gate weights of a token, none dropped: always if `weights_add_up`, else where the router's logits are all 0."""
    scale = moe.moe_router_topk_scaling_factor
    if weights_add_up(moe):
        return scale
    is_sigmoid = moe.topk == 1 if moe.moe_router_policy == "sinkhorn" else moe.moe_router_score_function == "sigmoid"
    return moe.topk * (0.5 if is_sigmoid else 1 / num_experts) * scale


def router_std(run: RunConfig) -> float:
    """Of the weights that a router starts with."""
    given, usual = run.upcycling.moe_upcycling_router_std, run.model.init_method_std
    if given is not None:
        return given
    return usual if weights_add_up(run.moe) else usual * NEARLY_ZERO


def branch_factors(run: RunConfig, num_experts: int) -> tuple[float, float, float]:
    """What is multiplied so that a layer's answer is that of the dense MLP: (output matrix of the experts, their output bias, output
    of the MLP beside them).

    --moe-residual-combine sum adds two answers up, so each gets a half; the learned softmax of `coefficient` starts at a half each by
    itself. A shared expert starts with an output of zero. The parts of an MLP all get a G-th of its weight; the bias is in each part.
    """
    share = 0.5 if run.moe.residual == "sum" else 1.0
    bias = share / weight_sum(run.moe, num_experts)
    return bias * run.upcycling.moe_upcycling_granularity, bias, share


def inexact_because(run: RunConfig) -> list[str]:
    """Why the first logits differ from the dense ones by more than rounding, and the flag to change; empty: they do not."""
    u, m, reasons = run.upcycling, run.moe, []
    if u.moe_upcycling_noise_std:
        reasons.append(f"--moe-upcycling-noise-std ({u.moe_upcycling_noise_std:g}) moves the copies; 0 would be exact")
    if u.moe_upcycling_drop_ratio:
        reasons.append(f"--moe-upcycling-drop-ratio ({u.moe_upcycling_drop_ratio:g}) draws neurons anew; 0 would be exact")
    if not weights_add_up(m) and router_std(run):
        cure = "--moe-upcycling-router-std 0 would be exact"
        if m.topk > 1 and m.moe_router_policy in ("topk", "balanced", "zipf"):
            cure = f"--moe-router-normalize chosen would be exact, or {cure[2:]}"
        reasons.append(f"gate weights are raw scores (--moe-router-normalize {m.normalize}), whose sum depends on the router; {cure}")
    return reasons


# ---------------------------------------------------------------- checks


def upcycling_problems(run: RunConfig) -> Iterator[str]:
    """What keeps this model from starting as a dense one. What is in the dense checkpoint is another question."""
    u, m, c = run.upcycling, run.moe, run.checkpoint
    if not u.moe_use_upcycling:
        return
    if not c.load and not c.load_hf:
        yield ("--moe-use-upcycling needs a dense model: --load DIR, the run directory (--save) of its training, or --load-hf DIR, its folder "
               "of transformers")  # fmt: skip
    if c.load and c.load_hf:
        yield (f"--moe-use-upcycling starts from one dense model, and --load ({c.load}) and --load-hf ({c.load_hf}) are two; drop one. To go "
               "on with a run that was upcycled, give its --load alone, without --moe-use-upcycling")  # fmt: skip
    if not m.has_experts:
        yield "--moe-use-upcycling makes experts of a dense model's MLPs, and there are none here; give --num-experts"
    if c.reset_iteration:
        yield "--moe-use-upcycling starts at iteration 0 with a fresh optimizer, --reset-iteration keeps the optimizer; drop one"
    if m.moe_latent_size:
        yield f"--moe-latent-size ({m.moe_latent_size}) makes experts narrower than the dense MLPs that they would be copies of; drop it"
    if run.model.mtp_num_layers:
        yield (f"--moe-use-upcycling makes a model of a dense one, and --mtp-num-layers ({run.model.mtp_num_layers}) modules are behind that; "
               "upcycle without them, then start a run with them from its checkpoint by --finetune")  # fmt: skip
    parts, ffn = u.moe_upcycling_granularity, run.model.ffn_size
    if ffn % parts:
        yield f"--moe-upcycling-granularity ({parts}) must divide the width of the dense MLP ({ffn})"
    elif (width := m.expert_ffn_size(ffn)) * parts != ffn:
        fitting = f" or --moe-upcycling-granularity {ffn // width}" if ffn % width == 0 else ""
        yield (f"experts of width {width} are not the {f'{parts} parts' if parts > 1 else 'whole'} of an MLP of width {ffn}: give "
               f"--moe-ffn-hidden-size {ffn // parts}{fitting}")  # fmt: skip
    if parts > 1:
        yield from _part_problems(m, parts)


def _part_problems(m: MoEConfig, parts: int) -> Iterator[str]:
    """A token must take all parts of an MLP or none."""
    name = f"--moe-upcycling-granularity ({parts})"
    if m.topk % parts:
        yield f"--topk ({m.topk}) must be a multiple of {name}: a token takes all parts of an MLP; use {parts} or {2 * parts}"
    for n in sorted({n for n in m.num_experts if n > 1 and n % parts}):
        yield f"--num-experts ({n}) must be a multiple of {name}: use {max(n // parts, 1) * parts} or {(n // parts + 1) * parts}"
    if m.moe_router_policy != "topk":
        yield f"{name} needs --moe-router-policy topk: {m.moe_router_policy} does not keep the parts of an MLP together"
    elif m.draws_choices:
        cure = "--moe-noisy-gate-policy None" if m.topk == 1 else "--disable-moe-top2-2nd-expert-sampling"
        yield f"{name} needs choices that are not drawn, which would tear the parts of an MLP apart; add {cure}"
    groups = m.moe_router_num_groups
    for n in sorted({n for n in m.num_experts if groups and n > 1 and n % groups == 0 and n // groups % parts}):
        yield f"{name} must divide the experts of a group ({n} / {groups} = {n // groups}), so that the parts of an MLP are in one"
    if m.moe_router_group_topk and not m.moe_router_group_best and m.topk % (m.moe_router_group_topk * parts):
        yield f"{name} times --moe-router-group-topk ({m.moe_router_group_topk}) must divide --topk ({m.topk})"


def upcycling_warnings(run: RunConfig) -> Iterator[str]:
    u, m = run.upcycling, run.moe
    yield from (f"{option} has no effect without --moe-use-upcycling" for option in u.idle)
    if not u.moe_use_upcycling:
        return
    yield from (f"upcycling is not exact: {reason}" for reason in inexact_because(run))
    for name in ("finetune", "no_load_optim"):
        if getattr(run.checkpoint, name):
            yield f"--{name.replace('_', '-')} has no effect: --moe-use-upcycling takes the weights only"
    if m.moe_identical_expert_init:
        yield "--moe-identical-expert-init has no effect with --moe-use-upcycling: experts start as copies"
    if router_std(run) == 0 and m.moe_router_policy in ("topk", "sinkhorn") and any(n > m.topk for n in m.num_experts):
        lost = ", and what exceeds their capacity is dropped" if m.moe_token_dropping else ""
        yield f"--moe-upcycling-router-std 0: in the first steps all tokens go to the {m.topk} lowest experts of a layer{lost}"
    if m.moe_router_policy == "expert_choice":
        yield ("--moe-router-policy expert_choice gives tokens any number of experts in training, so that only evaluation starts with the "
               "logits of the dense model")  # fmt: skip
