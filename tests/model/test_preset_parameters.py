"""Parameters of the presets: the digits that were published, and transformers' own models built from the published configurations."""

import pytest

from megatron_moe.config.presets import PRESETS
from megatron_moe.training.preset_table import preset_counts

# Convention: without the rows that pad the vocabulary, without multi-token prediction, tied embeddings once.
TO_THE_PARAMETER = {  # what transformers counts for the released configuration files, see below
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-20b-like": 20_914_757_184 - 24 * 32,  # the biases of its routers
}
DIGITS = {  # (total, active) in billions, as the papers round them
    "gpt-350m-moe-128": (13, None), "gpt-1.3b-moe-128": (52, None), "gpt-350m-pr-moe-32-64": (4, None), "gpt-1.3b-pr-moe-64-128": (31, None),
    "gpt-350m-pr-moe-32-64-mos": (3.5, None), "gpt-1.3b-pr-moe-64-128-mos": (27, None), "gpt-175b": (175, 175), "gpt-13b": (13, 13),
    "mixtral-8x7b": (47, 13), "mixtral-8x22b": (141, 39), "qwen3-30b-a3b": (30.5, 3.3), "qwen3-235b-a22b": (235, 22),
    "olmoe-1b-7b": (6.9, 1.3), "deepseek-v2-lite": (15.7, 2.4), "deepseek-v3": (671, 37), "glam-1.7b-64e-like": (27, 1.9),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_THE_PARAMETER)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert preset_counts(name).total == TO_THE_PARAMETER[name]


@pytest.mark.parametrize("name", DIGITS)
def test_a_preset_has_the_digits_of_its_paper(name):
    """Papers leave different tables out of the active parameters: a table of the vocabulary, half a billion at most, either way."""
    total, active = DIGITS[name]
    counts = preset_counts(name)
    assert counts.total / 1e9 == pytest.approx(total, rel=0.03)
    if active is not None:
        assert abs(counts.active / 1e9 - active) < max(0.02 * active, 0.35)


def configurations(t):
    """The configuration files of the released checkpoints."""
    mixtral = {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    qwen3 = {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "attention_bias": False,
             "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False}  # fmt: skip
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False,
              "tie_word_embeddings": False}  # fmt: skip
    return {
        "gpt2-124m": t.GPT2Config(),
        "gpt2-355m": t.GPT2Config(n_layer=24, n_embd=1024, n_head=16),
        "gpt2-774m": t.GPT2Config(n_layer=36, n_embd=1280, n_head=20),
        "gpt2-1.5b": t.GPT2Config(n_layer=48, n_embd=1600, n_head=25),
        "mixtral-8x7b": t.MixtralConfig(
            num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, **mixtral),
        "mixtral-8x22b": t.MixtralConfig(
            num_hidden_layers=56, hidden_size=6144, intermediate_size=16384, num_attention_heads=48, **mixtral),
        "qwen3-30b-a3b": t.Qwen3MoeConfig(
            num_hidden_layers=48, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32, **qwen3),
        "qwen3-235b-a22b": t.Qwen3MoeConfig(
            num_hidden_layers=94, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_attention_heads=64, **qwen3),
        "olmoe-1b-7b": t.OlmoeConfig(
            num_hidden_layers=16, hidden_size=2048, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=16, num_experts=64,
            num_experts_per_tok=8, vocab_size=50304, tie_word_embeddings=False),
        "deepseek-v2-lite": t.DeepseekV2Config(
            num_hidden_layers=27, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_attention_heads=16,
            num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            first_k_dense_replace=1, vocab_size=102400, **latent),
        "deepseek-v3": t.DeepseekV3Config(
            num_hidden_layers=61, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_attention_heads=128,
            num_key_value_heads=128, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
            first_k_dense_replace=3, vocab_size=129280, **latent),
        "gpt-oss-20b-like": t.GptOssConfig(
            num_hidden_layers=24, hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
            num_local_experts=32, num_experts_per_tok=4, vocab_size=201088, tie_word_embeddings=False),
    }  # fmt: skip


@pytest.mark.parametrize("name", TO_THE_PARAMETER)
def test_transformers_counts_the_same_parameters(name):
    t = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(configurations(t)[name])
    of_routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("router.bias")) if name == "gpt-oss-20b-like" else 0
    assert preset_counts(name).total == sum(p.numel() for p in model.parameters()) - of_routers


def test_every_preset_of_a_published_model_is_counted():
    stand_ins = {"tiny", "switch-base-128-like", "glam-64b-64e-like"}
    dense = {name for name in PRESETS if name.startswith("gpt-") and "moe" not in name}
    assert PRESETS.keys() - TO_THE_PARAMETER.keys() - DIGITS.keys() - stand_ins - dense == {"gpt-125m-moe-64"}
