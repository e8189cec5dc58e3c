"""Llama, Mixtral and Qwen2-MoE of Hugging Face transformers, with the same weights: the same logits, losses and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB, HIDDEN, FFN, LAYERS, HEADS, GROUPS, EXPERTS, S = 64, 32, 48, 3, 4, 2, 4, 20
SHARED = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip


def build_ours(moe, dtype):
    config = ModelConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        max_position_embeddings=64, position_embedding_type="rope", normalization="RMSNorm", layernorm_epsilon=1e-5, swiglu=True,
        add_bias_linear=False, untie_embeddings_and_output_weights=True, hidden_dropout=0.0, attention_dropout=0.0,
        make_vocab_size_divisible_by=VOCAB,
    )  # fmt: skip
    model = GPT(config, moe, VOCAB).to(dtype).eval()
    initialize_parameters(model, seed=1, std=0.2, num_layers=LAYERS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))  # a norm of ones would hide where it stands
    return model


def under_their_names(p):
    """Our parameters (or their gradients), by our name -> by theirs; expert stacks transposed, gate and value side by side."""
    theirs = {"model.embed_tokens.weight": p["embedding.weight"], "model.norm.weight": p["norm.weight"], "lm_head.weight": p["head.weight"]}
    for i in range(LAYERS):
        a, b = f"layers.{i + 1}.", f"model.layers.{i}."
        theirs[b + "input_layernorm.weight"] = p[a + "attn_norm.weight"]
        theirs[b + "post_attention_layernorm.weight"] = p[a + "mlp_norm.weight"]
        for x, y in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            theirs[b + f"self_attn.{y}.weight"] = p[a + f"attn.{x}.weight"]
        if a + "mlp.fc1.weight" in p:
            for x, y in (("fc_gate", "gate_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")):
                theirs[b + f"mlp.{y}.weight"] = p[a + f"mlp.{x}.weight"]
        else:
            e = a + "moe.experts."
            theirs[b + "mlp.gate.weight"] = p[a + "moe.gate.weight"]
            theirs[b + "mlp.experts.gate_up_proj"] = torch.cat([p[e + "w_gate"], p[e + "w1"]], dim=2).transpose(1, 2)
            theirs[b + "mlp.experts.down_proj"] = p[e + "w2"].transpose(1, 2)
        if a + "shared_expert_gate.weight" in p:
            theirs[b + "mlp.shared_expert_gate.weight"] = p[a + "shared_expert_gate.weight"]
            for x, y in (("fc_gate", "gate_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")):
                theirs[b + f"mlp.shared_expert.{y}.weight"] = p[a + f"shared_expert.{x}.weight"]
    return {name: weight.detach().clone().contiguous() for name, weight in theirs.items()}


def build_pair(kind, dtype):
    if kind == "llama":
        moe = MoEConfig()
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED))
    elif kind == "qwen2_moe":  # a gated shared expert, experts of a width of their own, scores that are not renormalised
        moe = MoEConfig(num_experts=(EXPERTS,), topk=2, expert_interval=1, moe_token_dropping=False, moe_router_normalize="none",
                        moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=40, moe_shared_expert_gate=True)  # fmt: skip
        theirs = transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(**SHARED, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False, qkv_bias=False,
                                        moe_intermediate_size=24, shared_expert_intermediate_size=40, experts_implementation="eager")
        )  # fmt: skip
    else:
        moe = MoEConfig(num_experts=(EXPERTS,), topk=2, expert_interval=1, moe_token_dropping=False)
        theirs = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SHARED, num_local_experts=EXPERTS, num_experts_per_tok=2, experts_implementation="eager")
        )
    model = build_ours(moe, dtype)
    theirs = theirs.to(dtype).eval()
    theirs.load_state_dict(under_their_names(dict(model.named_parameters())))  # strict: every weight of theirs is one of ours
    return model, theirs


def forward(model, theirs):
    tokens = torch.randint(0, VOCAB, (2, S + 1), generator=torch.Generator().manual_seed(5))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(S).expand(2, S)
    logits, losses = model(inputs, positions), model(inputs, positions, labels)
    reference = theirs(input_ids=inputs, use_cache=False).logits
    return logits, losses, reference, F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="none").view(2, S)


# float64 stops at theirs: rotary angles, norms and the router's softmax are float32 there
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe"])
def test_logits_losses_and_gradients_equal_those_of_transformers(kind, dtype):
    model, theirs = build_pair(kind, dtype)
    logits, losses, reference, reference_losses = forward(model, theirs)
    assert reference.abs().max() > 1  # weights are large enough for the comparison to mean something
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, reference_losses, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    reference_losses.mean().backward()
    gradients = under_their_names({name: p.grad for name, p in model.named_parameters()})
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_models_own_loss_is_the_mean_of_ours():
    model, theirs = build_pair("llama", torch.float32)
    tokens = torch.randint(0, VOCAB, (1, S), generator=torch.Generator().manual_seed(5))
    losses = model(tokens[:, :-1], torch.arange(S - 1)[None], tokens[:, 1:])
    torch.testing.assert_close(losses.mean(), theirs(input_ids=tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)
