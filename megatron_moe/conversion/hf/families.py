"""transformers' architectures: config.json <-> the settings of a run, one pair of functions per family.

`read` turns the file into settings by their names here; `write` turns a run into the file. What a family cannot say is found by writing
and reading back (fit.py), so `write` simply says what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.hf import names
from megatron_moe.conversion.hf.names import Names
from megatron_moe.conversion.hf.reader import MOST, Settings

Values = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """`fused`: the map of files whose experts are one tensor per matrix (save_original_format=False); None: there are none.
    `brings`: folder of this package whose files of Python go along, because transformers has none of this family."""

    model_type: str
    architecture: str
    names: Names
    read: Callable[[Settings], Values]
    write: Callable[[RunConfig], Values]
    fused: Names | None = None
    brings: str | None = None


# ---------------------------------------------------------------- what most have in common


def read_common(c: Settings, theta: float = 10000.0) -> Values:
    """A pre-norm decoder with RMSNorm, SwiGLU and rotary positions."""
    heads = c.whole("num_attention_heads")
    c.must_be("hidden_act", "silu")
    return {
        "num_layers": c.count("num_hidden_layers"), "hidden_size": c.whole("hidden_size"), "num_attention_heads": heads,
        "num_key_value_heads": c.whole("num_key_value_heads", heads), "kv_channels": c.whole("head_dim", None),
        "ffn_hidden_size": c.whole("intermediate_size"), "max_position_embeddings": c.whole("max_position_embeddings"),
        "layernorm_epsilon": c.number("rms_norm_eps"), "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not c.truth("tie_word_embeddings", False), "vocab_size": c.whole("vocab_size"),
        "hidden_dropout": 0.0, "attention_dropout": c.number("attention_dropout", 0.0), "init_method_std": c.number("initializer_range", 0.02),
    } | without_score_scale(c, read_rope(c, theta))  # fmt: skip


def write_common(run: RunConfig) -> Values:
    m = run.model
    return {
        "num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.key_value_heads, "head_dim": m.head_dim, "intermediate_size": m.ffn_size,
        "max_position_embeddings": m.max_position_embeddings, "rms_norm_eps": m.layernorm_epsilon, "hidden_act": "silu",
        "tie_word_embeddings": m.is_tied, "vocab_size": m.vocab_size, "attention_dropout": m.attention_dropout,
        "initializer_range": m.init_method_std,
    } | write_rope(run)  # fmt: skip


def read_rope(c: Settings, theta: float) -> Values:
    """Of transformers 5 (rope_parameters) and before (rope_theta, rope_scaling)."""
    theta, scaling = c.number("rope_theta", theta), c.section("rope_scaling")
    found = c.section("rope_parameters") or scaling
    values: Values = {"position_embedding_type": "rope", "rotary_base": theta}
    share = c.number("partial_rotary_factor", None)
    if found is not None:
        values["rotary_base"], share = found.number("rope_theta", theta), found.number("partial_rotary_factor", share)
        values |= _read_scaling(found, found.text("rope_type", None) or found.text("type", "default"))
    if share not in (None, 1.0):
        c.problem("partial_rotary_factor", f"is {share:g}; these architectures rotate whole heads")
    return values


def _read_scaling(c: Settings, kind: str) -> Values:
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3", "yarn"):
        c.problem("rope_type", f"is {kind!r}; known are default, linear, llama3 and yarn")
        return {}
    values: Values = {"rope_scaling_type": kind, "rope_scaling_factor": c.number("factor")}
    if kind != "linear":
        values["rope_original_max_position_embeddings"] = c.whole("original_max_position_embeddings", None)
    if kind == "llama3":
        values |= {"rope_low_freq_factor": c.number("low_freq_factor"), "rope_high_freq_factor": c.number("high_freq_factor")}
    if kind == "yarn":
        values |= {"rope_beta_fast": c.number("beta_fast", 32.0), "rope_beta_slow": c.number("beta_slow", 1.0)}
        mscale, all_dim = c.number("mscale", None), c.number("mscale_all_dim", None)
        if mscale and all_dim:
            values |= {"rope_mscale": mscale, "rope_mscale_all_dim": all_dim}
        elif mscale or all_dim:
            c.problem("mscale", f"is {mscale} and mscale_all_dim {all_dim}: one without the other is not built here")
        if not c.truth("truncate", True):
            values["rope_yarn_truncate"] = False
        if c.has("attention_factor"):
            c.problem("attention_factor", "is given; only the one that follows from the factor is built here")
    return values


def without_score_scale(c: Settings, values: Values) -> Values:
    """Outside of DeepSeek's attention mscale_all_dim does not multiply the scores, which it does here."""
    if values.get("rope_mscale_all_dim"):
        c.problem("rope_scaling", "has mscale_all_dim, which is built here as DeepSeek's attention has it")
    return values


def write_rope(run: RunConfig) -> Values:
    """As files before transformers 5 have it: 5 reads that too, and so does vLLM."""
    m = run.model
    values: Values = {"rope_theta": m.rotary_base, "rope_scaling": None}
    kind = m.rope_scaling_type
    if kind == "none":
        return values
    scaling: Values = {"rope_type": kind, "factor": m.rope_scaling_factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = m.rope_original_length
    if kind == "llama3":
        scaling |= {"low_freq_factor": m.rope_low_freq_factor, "high_freq_factor": m.rope_high_freq_factor}
    if kind == "yarn":
        scaling |= {"beta_fast": m.rope_beta_fast, "beta_slow": m.rope_beta_slow}
        scaling |= {} if m.rope_yarn_truncate else {"truncate": False}
        if (m.rope_mscale, m.rope_mscale_all_dim) != (1.0, 0.0):
            scaling |= {"mscale": m.rope_mscale, "mscale_all_dim": m.rope_mscale_all_dim}
    return values | {"rope_scaling": scaling}


def read_experts(c: Settings, count: int, normalizes: bool) -> Values:
    """Top-k over a softmax, nothing dropped, no noise."""
    topk = c.whole("num_experts_per_tok")
    return {
        "num_experts": (count,), "topk": topk, "expert_interval": 1, "moe_token_dropping": False, "moe_top2_2nd_expert_sampling": False,
        "moe_router_normalize": "chosen" if normalizes and topk > 1 else "none", "moe_loss_coeff": c.number("router_aux_loss_coef", 0.001),
    }  # fmt: skip


def write_experts(run: RunConfig) -> Values:
    return {
        "num_experts_per_tok": run.moe.topk, "router_aux_loss_coef": run.moe.moe_loss_coeff,
        "output_router_logits": False,
    }  # fmt: skip


def scores_of(run: RunConfig) -> str:
    """How logits become gate weights: a policy may have a way of its own (moe/policies/sinkhorn.py)."""
    if run.moe.moe_router_policy == "sinkhorn":
        return "sigmoid" if run.moe.topk == 1 else "softmax"
    return run.moe.moe_router_score_function


def most_experts(run: RunConfig) -> int:
    """Of any layer."""
    return max(run.moe.experts_per_layer(run.model.num_layers))


# ---------------------------------------------------------------- dense


def read_llama(c: Settings) -> Values:
    c.must_be("pretraining_tp", 1)
    biases = c.truth("attention_bias", False), c.truth("mlp_bias", False)
    if biases[0] != biases[1]:
        c.problem("attention_bias", f"is {biases[0]} and mlp_bias {biases[1]}: here all linear layers have biases, or none")
    return read_common(c) | {"add_bias_linear": all(biases)}


def write_llama(run: RunConfig) -> Values:
    return write_common(run) | {"attention_bias": run.model.add_bias_linear, "mlp_bias": run.model.add_bias_linear}


def read_mistral(c: Settings) -> Values:
    return read_common(c) | read_window(c)


def write_mistral(run: RunConfig) -> Values:
    return write_common(run) | {"sliding_window": _window(run)}


def _window(run: RunConfig) -> int | None:
    """That of all layers: one that some do not have is not said, and found to be missing."""
    windows = {run.model.window_of(layer) for layer in range(1, run.model.num_layers + 1)}
    return windows.pop() if len(windows) == 1 else None


def read_window(c: Settings) -> Values:
    """The same window in every layer, or none."""
    window = c.whole("sliding_window", None)
    return {} if window is None else {"window_size": window}


def read_qwen_dense(c: Settings) -> Values:
    c.must_be("use_sliding_window", False)
    full_attention_only(c)
    return read_common(c)


def full_attention_only(c: Settings) -> None:
    if windows := set(c.texts("layer_types", [])) - {"full_attention"}:
        c.problem("layer_types", f"has {', '.join(sorted(windows))}; only full_attention is built for this architecture")


def read_qwen2(c: Settings) -> Values:
    return read_qwen_dense(c) | {"add_qkv_bias": True}


def read_qwen3(c: Settings) -> Values:
    c.must_be("attention_bias", False)
    return read_qwen_dense(c) | {"qk_layernorm": True, "kv_channels": c.whole("head_dim", 128)}


def write_qwen_dense(run: RunConfig) -> Values:
    return write_common(run) | {"use_sliding_window": False}


def read_gpt2(c: Settings) -> Values:
    c.must_be("activation_function", "gelu_new", "gelu", "relu")
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        c.must_be(name, value)
    hidden = c.whole("n_embd")
    return {
        "num_layers": c.count("n_layer"), "hidden_size": hidden, "num_attention_heads": c.whole("n_head"),
        "ffn_hidden_size": c.whole("n_inner", 4 * hidden), "max_position_embeddings": c.whole("n_positions"),
        "layernorm_epsilon": c.number("layer_norm_epsilon", 1e-5), "normalization": "LayerNorm", "vocab_size": c.whole("vocab_size"),
        "activation_func": _GPT2_ACTIVATIONS.get(c.text("activation_function", "gelu_new"), "gelu"), "add_bias_linear": True,
        "position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": not c.truth("tie_word_embeddings", True),
        "hidden_dropout": c.number("resid_pdrop", 0.1), "attention_dropout": c.number("attn_pdrop", 0.1),
        "init_method_std": c.number("initializer_range", 0.02),
    }  # fmt: skip


_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def write_gpt2(run: RunConfig) -> Values:
    m = run.model
    activation = next((theirs for theirs, ours in _GPT2_ACTIVATIONS.items() if ours == m.activation), "gelu")
    return {
        "n_layer": m.num_layers, "n_embd": m.hidden_size, "n_head": m.num_attention_heads, "n_inner": m.ffn_size,
        "n_positions": m.max_position_embeddings, "layer_norm_epsilon": m.layernorm_epsilon, "vocab_size": m.vocab_size,
        "activation_function": activation, "tie_word_embeddings": m.is_tied, "resid_pdrop": m.hidden_dropout, "embd_pdrop": m.hidden_dropout,
        "attn_pdrop": m.attention_dropout, "initializer_range": m.init_method_std, "scale_attn_weights": True,
    }  # fmt: skip


# ---------------------------------------------------------------- experts


def read_mixtral(c: Settings) -> Values:
    return read_common(c, 1e6) | read_experts(c, c.count("num_local_experts"), True) | read_window(c)


def write_mixtral(run: RunConfig) -> Values:
    values = write_common(run) | write_experts(run) | {"sliding_window": _window(run)}
    return values | {"num_local_experts": most_experts(run), "intermediate_size": run.moe.expert_ffn_size(run.model.ffn_size)}


def read_qwen_moe(c: Settings) -> Values:
    """The layers with experts are every decoder_sparse_step-th; the experts have a width of their own."""
    c.must_be("mlp_only_layers", [])
    c.must_be("use_sliding_window", False)
    full_attention_only(c)
    count = c.count("num_experts", None) or c.count("num_local_experts")
    values = read_common(c) | read_experts(c, count, c.truth("norm_topk_prob", False))
    return values | {"expert_interval": c.whole("decoder_sparse_step", 1), "moe_ffn_hidden_size": c.whole("moe_intermediate_size")}


def write_qwen_moe(run: RunConfig) -> Values:
    moe = run.moe
    return write_common(run) | write_experts(run) | {
        "num_experts": most_experts(run), "norm_topk_prob": moe.normalize != "none", "decoder_sparse_step": moe.expert_interval,
        "moe_intermediate_size": moe.expert_ffn_size(run.model.ffn_size), "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip


def read_qwen2_moe(c: Settings) -> Values:
    bias = {"add_qkv_bias": True} if c.truth("qkv_bias", True) else {}
    shared = {"moe_shared_expert_intermediate_size": c.whole("shared_expert_intermediate_size"), "moe_shared_expert_gate": True}
    return read_qwen_moe(c) | shared | bias


def write_qwen2_moe(run: RunConfig) -> Values:
    return write_qwen_moe(run) | {
        "qkv_bias": run.model.add_qkv_bias,
        "shared_expert_intermediate_size": run.moe.moe_shared_expert_intermediate_size or run.model.ffn_size,
    }


def read_qwen3_moe(c: Settings) -> Values:
    c.must_be("attention_bias", False)
    return read_qwen_moe(c) | {"qk_layernorm": True}


def read_olmoe(c: Settings) -> Values:
    c.must_be("attention_bias", False)
    if c.has("clip_qkv"):
        c.problem("clip_qkv", "is set; queries and keys are not clipped here")
    experts = read_experts(c, c.count("num_experts"), c.truth("norm_topk_prob", False))
    return read_common(c) | experts | {"qk_layernorm": True, "qk_layernorm_scope": "hidden"}


def write_olmoe(run: RunConfig) -> Values:
    width = run.moe.expert_ffn_size(run.model.ffn_size)
    values = write_common(run) | write_experts(run)
    return values | {
        "num_experts": most_experts(run),
        "norm_topk_prob": run.moe.normalize != "none",
        "intermediate_size": width,
        "clip_qkv": None,
    }


def read_deepseek(c: Settings) -> Values:
    """What versions 2 and 3 share: latent attention, first layers dense, shared experts."""
    for name, value in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("moe_layer_freq", 1),
        ("rms_norm_eps", 1e-6),
    ):
        c.must_be(name, value)  # 1e-6: the norms of the narrow vectors have it in transformers, whatever the others have
    heads, width, topk = c.whole("num_attention_heads"), c.whole("moe_intermediate_size"), c.whole("num_experts_per_tok")
    if c.whole("num_key_value_heads", heads) != heads:
        c.problem("num_key_value_heads", f"must be num_attention_heads ({heads}): every head has keys and values of its own")
    return {
        "num_layers": c.count("num_hidden_layers"), "hidden_size": c.whole("hidden_size"), "num_attention_heads": heads,
        "ffn_hidden_size": c.whole("intermediate_size"), "max_position_embeddings": c.whole("max_position_embeddings"),
        "layernorm_epsilon": 1e-6, "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not c.truth("tie_word_embeddings", False), "vocab_size": c.whole("vocab_size"),
        "hidden_dropout": 0.0, "attention_dropout": c.number("attention_dropout", 0.0), "init_method_std": c.number("initializer_range", 0.02),
        "multi_latent_attention": True, "q_lora_rank": c.whole("q_lora_rank", None), "kv_lora_rank": c.whole("kv_lora_rank"),
        "qk_head_dim": c.whole("qk_nope_head_dim"), "qk_pos_emb_head_dim": c.whole("qk_rope_head_dim", minimum=2),
        "v_head_dim": c.whole("v_head_dim"), "num_experts": (c.count("n_routed_experts"),), "topk": topk, "expert_interval": 1,
        "moe_first_k_dense_replace": c.whole("first_k_dense_replace", 0, minimum=0), "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * c.count("n_shared_experts"), "moe_token_dropping": False,
        "moe_top2_2nd_expert_sampling": False, "moe_router_topk_scaling_factor": c.number("routed_scaling_factor", 1.0), "moe_loss_coeff": 0.0,
    } | read_rope(c, 10000.0)  # fmt: skip


def read_groups(c: Settings, best: int) -> Values:
    """Groups of experts; a group counts as much as its `best` best together."""
    groups, chosen = c.count("n_group", 1), c.count("topk_group", 1)
    if groups == 1 or chosen >= groups:
        return {}
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen, "moe_router_group_best": best}


def read_deepseek_v2(c: Settings) -> Values:
    c.must_be("topk_method", "greedy", "group_limited_greedy")
    c.must_be("scoring_func", "softmax")
    c.must_be("norm_topk_prob", False)
    groups = read_groups(c, 1) if c.text("topk_method", "greedy") != "greedy" else {}
    return read_deepseek(c) | {"rotary_interleaved": True, "moe_router_normalize": "none"} | groups


def read_deepseek_v3(c: Settings) -> Values:
    c.must_be("topk_method", "noaux_tc")
    c.must_be("scoring_func", "sigmoid")
    normalizes = c.truth("norm_topk_prob", True)
    return read_deepseek(c) | read_groups(c, 2) | {
        "rotary_interleaved": c.truth("rope_interleave", True), "moe_router_normalize": "chosen" if normalizes else "none",
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    }  # fmt: skip


def write_deepseek(run: RunConfig) -> Values:
    m, moe = run.model, run.moe
    width = moe.expert_ffn_size(m.ffn_size)
    values = write_common(run)
    del values["head_dim"]  # transformers' own name for the rotated part
    return values | {
        "q_lora_rank": m.q_lora_rank, "kv_lora_rank": m.kv_lora_rank, "qk_nope_head_dim": m.qk_head_dim,
        "qk_rope_head_dim": m.qk_pos_emb_head_dim, "v_head_dim": m.v_head_dim, "num_key_value_heads": m.num_attention_heads,
        "n_routed_experts": most_experts(run), "num_experts_per_tok": moe.topk, "moe_intermediate_size": width,
        "n_shared_experts": max((moe.moe_shared_expert_intermediate_size or width) // width, 1), "moe_layer_freq": moe.expert_interval,
        "first_k_dense_replace": moe.experts_per_layer(m.num_layers).count(1), "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "norm_topk_prob": moe.normalize != "none", "attention_bias": False, "n_group": moe.moe_router_num_groups or 1,
        "topk_group": moe.moe_router_group_topk or 1,
    }  # fmt: skip


def write_deepseek_v2(run: RunConfig) -> Values:
    has_groups = run.moe.moe_router_num_groups is not None
    return write_deepseek(run) | {"topk_method": "group_limited_greedy" if has_groups else "greedy", "scoring_func": "softmax"}


def write_deepseek_v3(run: RunConfig) -> Values:
    return write_deepseek(run) | {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": run.model.rotary_interleaved, "num_nextn_predict_layers": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- what transformers lacks: standalone/


def read_standalone(c: Settings) -> Values:
    """Everything that standalone/modeling_megatron_moe.py builds."""
    layers, experts = c.count("num_hidden_layers"), c.wholes("experts_per_layer")
    if len(experts) != layers or not all(1 <= n <= MOST for n in experts):
        c.problem("experts_per_layer", f"has {len(experts)} numbers, not one from 1 to {MOST} for each of {layers} layers")
        experts = [1] * layers
    residual, norm, scores = c.text("residual", None), c.text("qk_norm", None), c.text("score_function", "softmax")
    c.must_be("residual", "coefficient", "sum")
    c.must_be("qk_norm", "head", "hidden")
    c.must_be("score_function", "softmax", "sigmoid")
    c.must_be("normalization", "LayerNorm", "RMSNorm")
    c.must_be("activation", "gelu", "gelu_tanh", "relu", "squared_relu", "swiglu")
    c.must_be("position_embedding_type", "learned_absolute", "rope")
    values = {
        "num_layers": layers, "hidden_size": c.whole("hidden_size"), "num_attention_heads": c.whole("num_attention_heads"),
        "num_key_value_heads": c.whole("num_key_value_heads"), "kv_channels": c.whole("head_dim"), "ffn_hidden_size": c.whole("intermediate_size"),
        "max_position_embeddings": c.whole("max_position_embeddings"), "vocab_size": c.whole("vocab_size"),
        "position_embedding_type": c.text("position_embedding_type"), "rotary_base": c.number("rotary_base", 10000.0),
        "normalization": c.text("normalization"), "layernorm_epsilon": c.number("norm_eps"), "activation_func": c.text("activation"),
        "add_bias_linear": c.truth("use_bias"), "add_qkv_bias": c.truth("qkv_bias", False), "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "untie_embeddings_and_output_weights": not c.truth("tie_word_embeddings", True), "init_method_std": c.number("initializer_range", 0.02),
        "qk_layernorm": norm is not None, "qk_layernorm_scope": norm or "head", "moe_token_dropping": False,
    }  # fmt: skip
    if max(experts) == 1:
        return values
    return values | {
        "num_experts": tuple(experts), "expert_interval": 1, "topk": c.count("num_experts_per_tok"), "moe_top2_2nd_expert_sampling": False,
        "moe_ffn_hidden_size": c.whole("moe_intermediate_size"), "mlp_type": "standard" if residual is None else "residual",
        "moe_residual_combine": residual or "coefficient", "moe_latent_size": c.whole("latent_size", None),
        "moe_shared_expert_intermediate_size": c.whole("shared_expert_intermediate_size", None),
        "moe_shared_expert_gate": c.truth("shared_expert_gate", False), "moe_router_score_function": scores,
        "moe_router_normalize": "chosen" if c.truth("norm_topk_prob") else "none",
        "moe_router_topk_scaling_factor": c.number("routed_scaling_factor", 1.0), "moe_router_num_groups": c.count("n_group", None),
        "moe_router_group_topk": c.count("topk_group", None), "moe_router_group_best": c.count("group_best", None),
        "moe_router_enable_expert_bias": c.truth("expert_bias", False),
    }  # fmt: skip


def write_standalone(run: RunConfig) -> Values:
    m, moe = run.model, run.moe
    return {
        "auto_map": {"AutoConfig": "configuration_megatron_moe.MegatronMoEConfig", "AutoModelForCausalLM": "modeling_megatron_moe.MegatronMoEForCausalLM"},
        "num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.key_value_heads, "head_dim": m.head_dim, "intermediate_size": m.ffn_size, "vocab_size": m.vocab_size,
        "max_position_embeddings": m.max_position_embeddings, "position_embedding_type": m.position_embedding_type,
        "rotary_base": m.rotary_base, "normalization": m.normalization, "norm_eps": m.layernorm_epsilon, "activation": m.activation,
        "use_bias": m.add_bias_linear, "qkv_bias": m.add_qkv_bias, "qk_norm": m.qk_layernorm_scope if m.qk_layernorm else None,
        "tie_word_embeddings": m.is_tied, "initializer_range": m.init_method_std,
        "experts_per_layer": list(moe.experts_per_layer(m.num_layers)), "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.expert_ffn_size(m.ffn_size), "residual": moe.residual, "latent_size": moe.moe_latent_size,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size, "shared_expert_gate": moe.moe_shared_expert_gate,
        "score_function": scores_of(run), "norm_topk_prob": moe.normalize != "none",
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor, "n_group": moe.moe_router_num_groups,
        "topk_group": moe.moe_router_group_topk, "group_best": moe.group_best, "expert_bias": moe.moe_router_enable_expert_bias,
    }  # fmt: skip


FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family("gpt2", "GPT2LMHeadModel", names.GPT2, read_gpt2, write_gpt2),
        Family("llama", "LlamaForCausalLM", names.DENSE, read_llama, write_llama),
        Family("mistral", "MistralForCausalLM", names.DENSE, read_mistral, write_mistral),
        Family("qwen2", "Qwen2ForCausalLM", names.DENSE, read_qwen2, write_qwen_dense),
        Family("qwen3", "Qwen3ForCausalLM", names.DENSE, read_qwen3, write_qwen_dense),
        Family("mixtral", "MixtralForCausalLM", names.MIXTRAL, read_mixtral, write_mixtral, names.QWEN_MOE),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", names.QWEN_MOE, read_qwen2_moe, write_qwen2_moe, names.QWEN_MOE),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", names.QWEN_MOE, read_qwen3_moe, write_qwen_moe, names.QWEN_MOE),
        Family("olmoe", "OlmoeForCausalLM", names.QWEN_MOE, read_olmoe, write_olmoe, names.QWEN_MOE),
        Family("deepseek_v2", "DeepseekV2ForCausalLM", names.DEEPSEEK, read_deepseek_v2, write_deepseek_v2, names.DEEPSEEK),
        Family("deepseek_v3", "DeepseekV3ForCausalLM", names.DEEPSEEK, read_deepseek_v3, write_deepseek_v3, names.DEEPSEEK),
        Family("megatron_moe_gpt", "MegatronMoEForCausalLM", names.STANDALONE, read_standalone, write_standalone, brings="standalone"),
    )
}
