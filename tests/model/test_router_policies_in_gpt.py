"""A whole model under each routing policy: it does not look ahead when it is evaluated, and writes what a plain forward says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))
from small_models import all_logits, random_tokens, small_model

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate

POLICIES = ["topk", "expert_choice", "hash", "sinkhorn", "balanced", "zipf"]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evaluated_model_does_not_look_ahead(policy):
    model, tokens = small_model(moe_router_policy=policy), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 11) % 50
    torch.testing.assert_close(all_logits(model, changed)[:, :7], all_logits(model, tokens)[:, :7], rtol=0, atol=1e-10)
    assert not torch.equal(all_logits(model, changed)[:, 7:], all_logits(model, tokens)[:, 7:])


def test_a_model_in_training_looks_ahead_with_expert_choice():
    model, tokens = small_model(moe_router_policy="expert_choice", moe_train_capacity_factor=0.5).train(), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 11) % 50
    assert not torch.allclose(all_logits(model, changed)[:, :7], all_logits(model, tokens)[:, :7])


# balanced and zipf go by the place in the pass, which a cache changes: they are for benchmarks
@pytest.mark.parametrize("policy", ["topk", "expert_choice", "hash", "sinkhorn"])
@pytest.mark.parametrize("more", [{}, {"moe_router_enable_expert_bias": True, "moe_top2_2nd_expert_sampling": False}], ids=["", "bias"])
def test_what_a_model_writes_with_its_cache_is_what_a_plain_forward_says(policy, more):
    if more and policy != "topk":
        return
    model, prompts = small_model(moe_router_policy=policy, **more), random_tokens(2, 6).tolist()
    for moe in (block.moe for block in model.layers.values() if block.moe is not None and more):
        moe.gate.expert_bias.copy_(torch.linspace(-0.3, 0.3, moe.num_experts))
    written = generate(model, prompts, 5, SamplingConfig(greedy=True))
    for prompt, new in zip(prompts, written):
        said = all_logits(model, torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1, :50].argmax(-1)
        assert said.tolist() == new
