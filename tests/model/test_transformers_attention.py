"""Attention of transformers' models with the same weights: the same outputs and input gradients; their rotary frequencies, value by value."""
# B batch, S sequence, D hidden

import pytest
import torch

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.attention import build_attention
from megatron_moe.model.core import Context
from megatron_moe.model.rope import build_rotary

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

B, S, D, H, G, LONG = 2, 24, 32, 4, 2, 64
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 64}  # fmt: skip
SHARED = {"hidden_size": D, "num_attention_heads": H, "num_hidden_layers": 2, "max_position_embeddings": LONG, "attention_dropout": 0.0,
          "rms_norm_eps": 1e-5, "attn_implementation": "eager", "vocab_size": 40}  # fmt: skip
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5, "num_key_value_heads": H}
OURS = {"num_layers": 2, "hidden_size": D, "num_attention_heads": H, "max_position_embeddings": LONG, "attention_dropout": 0.0,
        "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "add_bias_linear": False, "position_embedding_type": "rope"}  # fmt: skip
OUR_LATENT = {"multi_latent_attention": True, "kv_lora_rank": 10, "qk_head_dim": 6, "qk_pos_emb_head_dim": 8, "v_head_dim": 5,
              "rotary_interleaved": True}  # fmt: skip
OUR_YARN = {"rope_scaling_type": "yarn", "rope_scaling_factor": 8.0, "rope_original_max_position_embeddings": 64}
OUR_LLAMA3 = {"rope_scaling_type": "llama3", "rope_scaling_factor": 4.0, "rope_original_max_position_embeddings": 32}


def kinds():
    """name -> (module of transformers, attention class, rotary class, configuration, ours)."""
    t, m = transformers, transformers.models
    latent3 = t.DeepseekV3Config(**SHARED, **LATENT, q_lora_rank=12, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3})
    return {
        "llama-3": (m.llama.modeling_llama, "Llama", t.LlamaConfig(**SHARED, num_key_value_heads=G, rope_parameters=LLAMA3), OUR_LLAMA3
                    | {"num_key_value_heads": G}),
        "qwen2": (m.qwen2.modeling_qwen2, "Qwen2", t.Qwen2Config(**SHARED, num_key_value_heads=G, rope_parameters=ROPE),
                  {"num_key_value_heads": G, "add_qkv_bias": True}),
        "mistral": (m.mistral.modeling_mistral, "Mistral", t.MistralConfig(**SHARED, num_key_value_heads=G, sliding_window=7, rope_parameters=ROPE),
                    {"num_key_value_heads": G, "window_size": 7}),
        "qwen3-moe": (m.qwen3_moe.modeling_qwen3_moe, "Qwen3Moe",
                      t.Qwen3MoeConfig(**SHARED, num_key_value_heads=G, head_dim=12, rope_parameters=ROPE),
                      {"num_key_value_heads": G, "kv_channels": 12, "qk_layernorm": True}),
        "olmoe": (m.olmoe.modeling_olmoe, "Olmoe", t.OlmoeConfig(**SHARED, num_key_value_heads=G, rope_parameters=ROPE),
                  {"num_key_value_heads": G, "qk_layernorm": True, "qk_layernorm_scope": "hidden"}),
        "deepseek-v2-lite": (m.deepseek_v2.modeling_deepseek_v2, "DeepseekV2",
                             t.DeepseekV2Config(**SHARED, **LATENT, q_lora_rank=None, rope_parameters=ROPE), OUR_LATENT),
        "deepseek-v2": (m.deepseek_v2.modeling_deepseek_v2, "DeepseekV2",
                        t.DeepseekV2Config(**SHARED, **LATENT, q_lora_rank=12, rope_parameters=YARN), OUR_LATENT | OUR_YARN | {"q_lora_rank": 12}),
        "deepseek-v3": (m.deepseek_v3.modeling_deepseek_v3, "DeepseekV3", latent3,
                        OUR_LATENT | OUR_YARN | {"q_lora_rank": 12, "rope_mscale": 0.7, "rope_mscale_all_dim": 1.3}),
        "gpt-oss": (m.gpt_oss.modeling_gpt_oss, "GptOss",
                    t.GptOssConfig(**SHARED, num_key_value_heads=G, head_dim=12, sliding_window=5, rope_parameters=YARN | {"truncate": False},
                                   layer_types=["sliding_attention", "full_attention"]),
                    {"num_key_value_heads": G, "kv_channels": 12, "add_bias_linear": True, "window_size": 5, "window_attn_skip_freq": 2,
                     "softmax_type": "learnable", "rope_yarn_truncate": False} | OUR_YARN),
    }  # fmt: skip


NAMES = {
    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj", "sinks": "sinks", "k_norm": "k_norm",
    "kv_down_proj": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up_proj": "kv_b_proj", "q_down_proj": "q_a_proj",
    "q_up_proj": "q_b_proj",
}  # fmt: skip


def their_name(name: str, is_latent: bool) -> str:
    module, _, kind = name.partition(".")
    if module == "q_norm":
        return f"{'q_a_layernorm' if is_latent else 'q_norm'}.{kind}"
    return NAMES[module] + (f".{kind}" if kind else "")


def mask(window: int | None) -> torch.Tensor:
    """What transformers adds to the scores."""
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    if window is not None:
        seen &= torch.ones_like(seen).triu(1 - window)
    return torch.zeros(S, S, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[None, None]


def their_positions(rotary, x, positions, is_complex: bool):
    """DeepSeek-V2 has one complex number per pair, the others a cosine and a sine per channel; in float32, both."""
    embedding = rotary.double()(x, positions)
    return embedding if is_complex else tuple(t.double() for t in embedding)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("kind", list(kinds()))
def test_attention_equals_that_of_transformers(kind, layer):
    module, prefix, theirs_config, changes = kinds()[kind]
    config = ModelConfig(**(OURS | changes))
    torch.manual_seed(4)
    theirs = getattr(module, f"{prefix}Attention")(theirs_config, layer_idx=layer - 1).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.4)
    ours, state = build_attention(config, layer).double(), theirs.state_dict()
    ours.load_state_dict({name: state.pop(their_name(name, config.multi_latent_attention)) for name in ours.state_dict()})
    assert not state, "every weight of theirs is one of ours"
    x, positions = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True), torch.arange(S).expand(B, S)
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(theirs_config)
    embedding = their_positions(rotary, x, positions, prefix == "DeepseekV2")
    reference = theirs(x, position_embeddings=embedding, attention_mask=mask(config.window_of(layer)))[0]
    y = ours(x, Context(positions))
    assert reference.abs().max() > 0.3
    # float32 angles on their side
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    gradient, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, reference))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rope_type": "linear", "factor": 3.0}, {"rope_scaling_type": "linear", "rope_scaling_factor": 3.0}),
        (LLAMA3, OUR_LLAMA3),
        (YARN, OUR_YARN),
        (YARN | {"truncate": False}, OUR_YARN | {"rope_yarn_truncate": False}),
        (YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, OUR_YARN | {"rope_beta_fast": 4.0, "rope_beta_slow": 0.5}),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}, OUR_YARN | {"rope_mscale": 0.707, "rope_mscale_all_dim": 0.5}),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, {"rotary_percent": 0.5}),
    ],
    ids=lambda v: "-".join(f"{k}_{x}" for k, x in v.items() if k != "rope_theta"),
)
def test_frequencies_equal_those_of_transformers(theirs, ours, base):
    module = transformers.models.glm.modeling_glm if "partial_rotary_factor" in theirs else transformers.models.llama.modeling_llama
    kind, config = ("Glm", transformers.GlmConfig) if "partial_rotary_factor" in theirs else ("Llama", transformers.LlamaConfig)
    parameters = theirs | {"rope_theta": base}
    rotary = getattr(module, f"{kind}RotaryEmbedding")(config(**SHARED | {"hidden_size": 256}, head_dim=64, rope_parameters=parameters))
    mine = build_rotary(ModelConfig(**(OURS | {"kv_channels": 64, "rotary_base": base} | ours)), 64)
    torch.testing.assert_close(mine.frequencies(torch.device("cpu"), torch.float64).float(), rotary.inv_freq, rtol=2e-6, atol=0)
    assert mine.factor == pytest.approx(rotary.attention_scaling)
