"""What recomputation of a module frees between forward and backward, in bytes counted by the profiler."""

import pytest
import torch
from live_bytes import LiveBytes

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.parallel.recompute import apply_recompute

B, S, D, F, K, LAYERS, VOCAB = 2, 64, 32, 256, 2, 4, 64
TOKENS, FLOAT = B * S, 4


def kept(modules: tuple[str, ...]) -> tuple[int, int]:
    """Bytes alive behind the forward, and at most during forward and backward, above those of the model."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=LAYERS, hidden_size=D, num_attention_heads=4, ffn_hidden_size=F, max_position_embeddings=S,
                         hidden_dropout=0.0, attention_dropout=0.0, make_vocab_size_divisible_by=16)  # fmt: skip
    moe = MoEConfig(num_experts=(4,), topk=K, moe_token_dropping=False, moe_shared_expert_intermediate_size=F)
    gpt = GPT(config, moe, VOCAB)
    apply_recompute(gpt, modules)
    tokens, positions = torch.randint(VOCAB, (B, S)), torch.arange(S).expand(B, S)
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)  # there already: what is counted below are activations
    gpt(tokens, positions, tokens).sum().backward()
    with LiveBytes() as live:
        loss = gpt(tokens, positions, tokens).sum()
        live.mark()
        loss.backward()
    return live.marks[0], live.peak


@pytest.mark.parametrize(
    ("module", "layers", "at_least"),
    [
        ("core_attn", LAYERS, 4 * TOKENS * D),  # queries, keys, values, what attention gives
        ("mlp", LAYERS // 2, 2 * TOKENS * F),  # before and behind the activation
        ("shared_experts", LAYERS // 2, 2 * TOKENS * F - TOKENS * D),  # less the answer of the experts, which it starts from
        ("moe", LAYERS // 2, TOKENS * K * F + 2 * TOKENS * K * D),  # before the activation; the rows, and what comes of them
    ],
)
def test_a_recomputed_module_keeps_nothing_of_its_inside(module, layers, at_least):
    plain, peak = kept(())
    less, lower_peak = kept((module,))
    assert plain - less >= layers * at_least * FLOAT
    assert lower_peak < peak


def test_all_modules_together_keep_what_enters_them():
    everything, _ = kept(("core_attn", "mlp", "moe", "shared_experts"))
    # per layer: the stream into attention and into the feed-forward, its norm for the router; logits and loss at the end
    assert everything < (LAYERS * 6 * TOKENS * D + 3 * TOKENS * VOCAB) * FLOAT + LAYERS * 16 * TOKENS * 8
