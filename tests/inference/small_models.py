"""Models of a few thousand weights in float64, for the tests of this folder."""

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain

VOCAB = 50  # padded to 64
LEARNED = {"position_embedding_type": "learned_absolute"}
ROPE_GQA_SWIGLU = {
    "position_embedding_type": "rope", "num_key_value_heads": 2, "swiglu": True, "normalization": "RMSNorm",
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
LATENT = {
    "position_embedding_type": "rope", "multi_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 5, "rope_scaling_type": "yarn", "rope_scaling_factor": 4.0, "rope_mscale_all_dim": 1.0,
    "moe_first_k_dense_replace": 2, "num_experts": (8,),
}  # fmt: skip
WINDOWS_AND_SINKS = {
    "position_embedding_type": "rope", "num_key_value_heads": 2, "window_size": 3, "window_attn_skip_freq": (2,), "softmax_type": "learnable",
    "qk_layernorm": True, "add_bias_linear": False, "add_qkv_bias": True, "rotary_percent": 0.5,
}  # fmt: skip
WINDOW = {"window_size": 3, "num_key_value_heads": 2}


def small_run(**values) -> RunConfig:
    """A residual pyramid, top-2: layers 2 and 4 have 4 and 8 experts."""
    return RunConfig.from_values(
        {
            "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "max_position_embeddings": 24,
            "seq_length": 16, "num_experts": (4, 8), "mlp_type": "residual", "topk": 2, "moe_token_dropping": False,
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": "float64", "make_vocab_size_divisible_by": 64,
            "init_method_std": 0.3,
        }
        | values
    )  # fmt: skip


def small_model(**values) -> GPT:
    run = small_run(**values)
    model = build_plain(run, VOCAB)
    model.to_empty(device="cpu")
    initialize_parameters(model, run.training.seed, run.model.init_method_std, run.model.num_layers)
    return model.eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def all_logits(model: GPT, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The oracle: a plain forward over everything."""
    with torch.no_grad():
        return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS))
