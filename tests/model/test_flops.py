"""Parameter and FLOP counts against sums worked by hand."""

import pytest

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.flops import flops_per_token, parameter_counts


def small(**changes):
    """hidden 8, 2 heads of 4, FFN 32, vocabulary 10 padded to 16, 6 positions, 2 layers."""
    settings = {
        "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 6, "make_vocab_size_divisible_by": 16,
    }  # fmt: skip
    return ModelConfig(**(settings | changes))


def test_dense_layer_matches_the_sum_by_hand():
    counts = parameter_counts(small(), MoEConfig(), vocab_size=10)
    layer = counts.per_layer[0]
    assert layer.attention == 4 * (8 * 8 + 8)  # q, k, v, out
    assert layer.norms == 2 * (8 + 8)
    assert layer.mlp == (8 * 32 + 32) + (32 * 8 + 8)
    assert layer.total == layer.active == 288 + 32 + 552
    assert counts.embedding == 16 * 8 + 6 * 8
    assert counts.head == 0
    assert counts.total == counts.active == 176 + 2 * 872 + 16


def test_residual_pyramid_counts_experts_gate_dense_branch_and_coefficient():
    moe = MoEConfig(num_experts=(4,), mlp_type="residual", topk=2)
    dense, sparse = parameter_counts(small(), moe, vocab_size=10).per_layer
    assert dense.experts == 0
    assert sparse.gate == 8 * 4
    assert sparse.experts == 4 * 552
    assert sparse.mlp == 552
    assert sparse.coefficient == 8 * 2 + 2
    assert sparse.total == 288 + 32 + 552 + 32 + 4 * 552 + 18
    assert sparse.active == sparse.total - 2 * 552


def test_standard_moe_layer_has_no_dense_branch():
    _, sparse = parameter_counts(small(), MoEConfig(num_experts=(4,)), vocab_size=10).per_layer
    assert (sparse.mlp, sparse.coefficient, sparse.active_experts) == (0, 0, 552)


def test_modern_variant_without_biases_with_gqa_swiglu_rmsnorm_rope_and_untied_head():
    model = small(
        num_attention_heads=4, num_key_value_heads=2, kv_channels=6, swiglu=True, ffn_hidden_size=12, add_bias_linear=False,
        normalization="RMSNorm", position_embedding_type="rope", untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    counts = parameter_counts(model, MoEConfig(), vocab_size=10)
    layer = counts.per_layer[0]
    assert layer.attention == 8 * 24 + 2 * 8 * 12 + 24 * 8  # q; k and v of 2 heads; out
    assert layer.mlp == 3 * 8 * 12
    assert layer.norms == 2 * 8
    assert counts.embedding == counts.head == 16 * 8
    assert counts.total == 2 * 128 + 8 + 2 * (576 + 288 + 16)


def test_swiglu_with_biases_has_one_more_bias():
    counts = parameter_counts(small(swiglu=True, ffn_hidden_size=12), MoEConfig(), vocab_size=10)
    assert counts.per_layer[0].mlp == 3 * 8 * 12 + 12 + 12 + 8


def test_published_350m_moe_128_has_13_billion_parameters():
    model = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, max_position_embeddings=2048)
    dense = parameter_counts(model, MoEConfig(), vocab_size=50257)
    sparse = parameter_counts(model, MoEConfig(num_experts=(128,)), vocab_size=50257)
    pyramid = parameter_counts(model, MoEConfig(num_experts=(32,) * 10 + (64,) * 2, mlp_type="residual"), vocab_size=50257)
    assert dense.total == pytest.approx(0.356e9, rel=0.01)
    assert sparse.total == pytest.approx(13e9, rel=0.02)
    assert pyramid.total == pytest.approx(4e9, rel=0.03)
    assert sparse.active == dense.total + 12 * 128 * 1024  # k = 1: the router is all that a token pays more


def test_flops_of_a_dense_token_match_the_sum_by_hand():
    seq = 6
    layer = 2 * 4 * 8 * 8 + 2 * 2 * 8 * seq // 2 + 2 * (8 * 32 + 32 * 8)
    assert flops_per_token(small(), MoEConfig(), seq, 10) == 3 * (2 * layer + 2 * 8 * 16)


def test_flops_of_a_residual_moe_layer_count_k_experts_router_and_dense_branch():
    moe = MoEConfig(num_experts=(4,), mlp_type="residual", topk=2)
    extra = flops_per_token(small(), moe, 6, 10) - flops_per_token(small(), MoEConfig(), 6, 10)
    mlp = 2 * (8 * 32 + 32 * 8)
    assert extra == 3 * (2 * mlp + 2 * 8 * 4 + 2 * 8 * 2)


def test_flops_do_not_depend_on_how_many_experts_are_idle_except_for_the_router():
    few, many = (flops_per_token(small(), MoEConfig(num_experts=(n,)), 6, 10) for n in (2, 64))
    assert many - few == 3 * 2 * 8 * 62


def test_six_flops_per_parameter_and_token_is_close_for_a_large_model():
    model = ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16, max_position_embeddings=2048)
    counts = parameter_counts(model, MoEConfig(), 50257)
    assert flops_per_token(model, MoEConfig(), 2048, 50257) == pytest.approx(6 * counts.total, rel=0.1)


def test_a_window_leaves_the_flops_of_what_it_shows():
    """Four tokens that see 1, 2, 2, 2 with a window of 2: the formula is the area of a triangle without its corner, 2 * 4 - 2 of 16."""
    plain, windowed = (flops_per_token(small(**w), MoEConfig(), 4, 10) for w in ({}, {"window_size": 2}))
    width = 2 * (4 + 4)  # heads x channels of keys and values
    assert plain - windowed == pytest.approx(3 * 2 * 2 * width * (4 / 2 - (2 - 2 * 2 / 8)))
    every_other = flops_per_token(small(window_size=2, window_attn_skip_freq=(2,)), MoEConfig(), 4, 10)
    assert every_other == pytest.approx((plain + windowed) / 2)
    assert flops_per_token(small(window_size=9), MoEConfig(), 4, 10) == plain


def test_latent_attention_matches_the_sum_by_hand():
    model = small(multi_latent_attention=True, q_lora_rank=3, kv_lora_rank=5, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=7)
    matrices = 8 * 3 + 3 * 2 * 6 + 8 * (5 + 2) + 5 * 2 * (4 + 7) + 2 * 7 * 8
    layer = parameter_counts(model, MoEConfig(), 10).per_layer[0]
    assert layer.attention == matrices + (3 + 12 + 7 + 22 + 8) + 2 * (3 + 5)  # biases; norms of the narrow vectors
    forward = 2 * matrices + 2 * 2 * (6 + 7) * 6 / 2 + 2 * (8 * 32 + 32 * 8)
    assert flops_per_token(model, MoEConfig(), 6, 10) == pytest.approx(3 * (2 * forward + 2 * 8 * 16))
