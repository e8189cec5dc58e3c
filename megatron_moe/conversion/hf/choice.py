"""Which architecture of transformers a run can be, and what would be lost in one.

Nothing is listed by hand: a family writes a run's config.json, reads it back, and whatever of the forward pass then differs is what
the family cannot say. A new setting of the model is compared as soon as it exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.hf.families import FAMILIES, Family, scores_of
from megatron_moe.conversion.hf.reader import Settings

# Of a model: what only training, or the layout, looks at, and what `_DERIVED` says better.
_NOT_THE_FORWARD_PASS = {
    "hidden_dropout", "attention_dropout", "init_method_std", "make_vocab_size_divisible_by", "use_rotary_position_embeddings",
    "num_key_value_heads", "kv_channels", "ffn_hidden_size", "activation_func", "swiglu", "squared_relu", "num_experts", "expert_interval",
    "moe_first_k_dense_replace", "moe_expert_parallel_size", "moe_pyramid_ep", "moe_train_capacity_factor", "moe_eval_capacity_factor",
    "moe_min_capacity", "moe_rts", "moe_token_drop_policy", "moe_top2_2nd_expert_sampling", "moe_noisy_gate_policy", "moe_router_hash_seed",
    "moe_router_sinkhorn_iterations", "moe_router_zipf_exponent", "moe_router_normalize", "moe_router_pre_softmax",
    "moe_router_bias_update_rate", "moe_loss_coeff", "moe_seq_loss_coeff", "moe_global_loss_coeff", "moe_loss_warmup_iters",
    "moe_router_z_loss_coeff", "moe_token_dispatcher", "moe_node_size", "moe_fused_capacity", "moe_fused_capacity_factor", "moe_overlap_chunks", "moe_pad_expert_input_to_capacity",
    "moe_ffn_hidden_size", "moe_residual_combine", "window_size", "window_attn_skip_freq", "rope_original_max_position_embeddings",
    "moe_router_group_best", "mtp_loss_scaling_factor", "create_moe_param_group", "use_tutel",
}  # fmt: skip
_AS_TOP_K = ("expert_choice", "sinkhorn")  # policies that take a token's best experts in evaluation


def forward_settings(run: RunConfig) -> dict[str, Any]:
    """Everything that the logits depend on beside the weights, by option."""
    m, moe = run.model, run.moe
    experts = moe.experts_per_layer(m.num_layers)
    is_moe = any(n > 1 for n in experts)
    out = {s.option: getattr(m, s.name) for s in fields_of(ModelConfig) if s.name not in _NOT_THE_FORWARD_PASS}
    if is_moe:
        out |= {s.option: getattr(moe, s.name) for s in fields_of(MoEConfig) if s.name not in _NOT_THE_FORWARD_PASS}
        policy = moe.moe_router_policy
        out["--moe-router-policy"] = "topk" if policy in _AS_TOP_K else policy
        out["--moe-router-score-function"] = scores_of(run)
        out["--moe-router-normalize"] = "none" if moe.normalize == "none" else "chosen"
        out["--moe-router-group-best"] = moe.group_best
        out["--moe-ffn-hidden-size"] = moe.expert_ffn_size(m.ffn_size)
        out["--mlp-type"] = moe.mlp_type if moe.residual is None else f"{moe.mlp_type}, {moe.residual}"
    out["--num-experts"] = experts
    out["--activation-func"], out["--num-key-value-heads"], out["--kv-channels"] = m.activation, m.key_value_heads, m.head_dim
    if not is_moe or min(experts) == 1 or moe.residual:
        out["--ffn-hidden-size"] = m.ffn_size
    if m.position_embedding_type != "rope":
        out.pop("--rotary-base")
    out["--window-size"] = tuple(m.window_of(layer) for layer in range(1, m.num_layers + 1))
    out["--rope-original-max-position-embeddings"] = m.rope_original_length if m.rope_scaling_type in ("llama3", "yarn") else None
    if m.multi_latent_attention:
        out.pop("--kv-channels")
    return out


def read_back(family: Family, run: RunConfig) -> tuple[RunConfig | None, list[str]]:
    """The run that the family's own config.json of `run` describes, or why there is none."""
    settings = Settings(family.write(run), f"a {family.model_type}")
    values = family.read(settings)
    if settings.problems:
        return None, settings.problems
    try:
        return RunConfig.from_values(values | {"seq_length": 1, "make_vocab_size_divisible_by": 1}), []
    except ConfigError as error:
        return None, [f"a {family.model_type}: {problem}" for problem in error.problems]


def differences(family: Family, run: RunConfig) -> dict[str, str]:
    """Option -> what this family makes of it, for all that it does not say as the run does."""
    back, problems = read_back(family, run)
    if back is None:
        return {problem: problem for problem in problems}
    here, there = forward_settings(run), forward_settings(back)
    return {
        option: f"{option} is {_shown(here.get(option))} here, and {_shown(there.get(option))} in a {family.model_type}"
        for option in {**here, **there}
        if here.get(option) != there.get(option)
    }


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} in all layers" if len(value) > 1 else str(value[0])
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------- what can be left out


@dataclass(frozen=True)
class Loss:
    """A part of a model that can be left out, with the sentence that says so."""

    option: str
    sentence: str
    drop: Callable[[RunConfig], RunConfig]


def _model(**values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, **values))


def _moe(**values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda run: dataclasses.replace(run, moe=dataclasses.replace(run.moe, **values))


DROPPING = Loss(
    "--moe-token-dropping", "the capacity of the experts: in training a token passed by an expert that was full, the target drops none",
    _moe(moe_token_dropping=False, moe_pad_expert_input_to_capacity=False),
)  # fmt: skip
LOSSES = (
    Loss("--mtp-num-layers", "the modules that predict further tokens (--mtp-num-layers)", _model(mtp_num_layers=0)),
    Loss("--moe-router-enable-expert-bias", "the bias of the experts: tokens are routed by their scores alone",
         _moe(moe_router_enable_expert_bias=False)),
    Loss("--mlp-type", "the dense MLP beside the experts (--mlp-type residual) and its coefficients", _moe(mlp_type="standard", moe_residual_combine="coefficient")),
    Loss("--moe-shared-expert-gate", "the gate of the shared expert: it counts in full", _moe(moe_shared_expert_gate=False)),
    Loss("--moe-shared-expert-intermediate-size", "the shared expert", _moe(moe_shared_expert_intermediate_size=None, moe_shared_expert_gate=False)),
    Loss("--add-bias-linear", "the bias vectors of the linear layers", _model(add_bias_linear=False)),
    Loss("--position-embedding-type", "the learned positions: the target rotates queries and keys instead, and what it says makes no sense before it "
         "is trained", _model(position_embedding_type="rope")),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """`run`: what the target will describe, without what is lost. `obstacles`: what cannot even be left out."""

    family: Family
    run: RunConfig
    losses: list[str]
    obstacles: list[str]


def attempt(family: Family, run: RunConfig) -> Choice:
    """Leave out what has to be left out, one thing after the other."""
    losses: list[str] = []
    if run.moe.has_experts and run.moe.moe_token_dropping:
        run, losses = DROPPING.drop(run), [DROPPING.sentence]
    while found := differences(family, run):
        loss = next((loss for loss in LOSSES if loss.option in found), None)
        if loss is None or loss.sentence in losses:
            return Choice(family, run, losses, list(found.values()))
        run, losses = loss.drop(run), [*losses, loss.sentence]
    return Choice(family, run, losses, [])


def choose(run: RunConfig, vocab_size: int, model_type: str | None = None) -> Choice:
    """The first family that says the whole model, or `model_type`. ConfigError when there is none, or it cannot.

    The last family is the one whose modelling file we write ourselves: for what transformers has no architecture for.
    """
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=vocab_size))
    families = [FAMILIES[model_type]] if model_type else list(FAMILIES.values())
    attempts = [attempt(family, run) for family in families]
    possible = [a for a in attempts if not a.obstacles]
    if not possible:
        which = (
            f"this model cannot be a {model_type}"
            if model_type
            else "neither an architecture of transformers nor a folder of our own says this model"
        )
        raise ConfigError([f"--to hf: {which}: {obstacle}" for obstacle in attempts[-1].obstacles])
    best = min(possible, key=lambda a: len(a.losses))  # the first of equals
    return best
