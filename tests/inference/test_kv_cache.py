"""A text fed in pieces gives the logits of the text fed at once."""

import pytest
import torch
from small_models import LATENT, LEARNED, ROPE_GQA_SWIGLU, WINDOW, WINDOWS_AND_SINKS, all_logits, random_tokens, small_model

from megatron_moe.inference.kv_cache import CachedCore, cached_attention
from megatron_moe.model.core import CausalCore, Context

SHARED_LATENT = LEARNED | {
    "mlp_type": "standard", "moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True, "moe_latent_size": 10,
    "moe_ffn_hidden_size": 20, "activation_func": "relu", "moe_pad_expert_input_to_capacity": True,
}  # fmt: skip


GROUPED = LEARNED | {"num_key_value_heads": 1, "mlp_type": "standard"}


@pytest.mark.parametrize("kind", [LEARNED, GROUPED, ROPE_GQA_SWIGLU, SHARED_LATENT, LATENT, WINDOW, WINDOWS_AND_SINKS])
@pytest.mark.parametrize("pieces", [(5, *[1] * 11), (16,), (4, 3, 1, 8)])
def test_cached_decoding_equals_the_full_forward_at_every_position(kind, pieces):
    model, tokens = small_model(**kind), random_tokens(2, 16)
    parts, start = [], 0
    with torch.no_grad(), cached_attention(model, max_length=16):
        for size in pieces:
            positions = torch.arange(start, start + size).expand(2, size)
            parts.append(model(tokens[:, start : start + size], positions))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), all_logits(model, tokens), rtol=1e-10, atol=1e-10)


def test_a_token_takes_the_slot_of_padding():
    """The worked example of kv_cache.py: `a b c` beside `d .`; the next token of each goes to slots 3 and 1."""
    model, tokens = small_model(), random_tokens(2, 5)
    short = torch.cat([tokens[1:, :1], tokens[1:, 3:]], 1)  # d e f
    with torch.no_grad(), cached_attention(model, max_length=5):
        model(tokens[:, :3], torch.arange(3).expand(2, 3))
        model(tokens[:, 3:4], torch.tensor([[3], [1]]))
        last = model(tokens[:, 4:], torch.tensor([[4], [2]]))
    torch.testing.assert_close(last[0, 0], all_logits(model, tokens)[0, -1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last[1, 0], all_logits(model, short)[0, -1], rtol=1e-10, atol=1e-10)


def test_the_cache_holds_key_value_heads_not_query_heads():
    model = small_model(**ROPE_GQA_SWIGLU)
    with torch.no_grad(), cached_attention(model, max_length=9):
        model(random_tokens(3, 4), torch.arange(4).expand(3, 4))
        core = model.layers["1"].attn.core
        assert core.k_BLGh.shape == core.v_BLGw.shape == (3, 9, 2, 8)


def test_plain_cores_are_back_after_an_error():
    model = small_model()
    before = [block.attn.core for block in model.layers.values()]
    with pytest.raises(IndexError), cached_attention(model, max_length=4):
        model(torch.tensor([[10**6]]), torch.tensor([[0]]))
    assert [block.attn.core for block in model.layers.values()] == before
    assert all(isinstance(core, CausalCore) for core in before)


def test_more_tokens_than_the_cache_holds_are_refused():
    core, q = CachedCore(max_length=3), torch.zeros(1, 1, 4, 2)
    with pytest.raises(AssertionError, match="4 tokens in a cache of 3"):
        core(q, q, q, Context(torch.arange(4)[None]))
