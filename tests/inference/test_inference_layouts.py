"""A model that answers on several ranks, whatever layout trained it, equals the model of one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from small_models import ROPE_GQA_SWIGLU, all_logits, random_tokens
from test_inference_loading import save_small_model

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.engine import Engine, Request
from megatron_moe.inference.generate import generate
from megatron_moe.inference.kv_cache import cached_attention
from megatron_moe.inference.layout import Layout
from megatron_moe.inference.load import load_for_inference

pytestmark = pytest.mark.distributed

GREEDY = SamplingConfig(greedy=True)
REQUESTS = [Request([3, 9, 27], 9), Request([5], 6), Request([1, 2, 3, 4, 5, 6], 8)]
# small_models: gates of a standard deviation of 0.3 have no near-ties in float64


def cached_logits(model, tokens_BS):
    """Prompt of 4 tokens, then one at a time, from the cache; all columns, and the rank's own memory of them."""
    parts = []
    with torch.no_grad(), cached_attention(model, tokens_BS.shape[1]):
        for first, last in [(0, 4), *((i, i + 1) for i in range(4, tokens_BS.shape[1]))]:
            positions = torch.arange(first, last).expand(len(tokens_BS), last - first)
            logits = model(tokens_BS[:, first:last], positions)
            has_all = not hasattr(model.project, "gather")
            parts.append(logits if has_all else model.project.gather(logits.flatten(0, 1)).unflatten(0, logits.shape[:2]))
    return torch.cat(parts, 1)


def _in_layout(directory, tp, ep, tokens):
    """Logits with a cache, then what an engine answers: rank 0 asks, the others follow."""
    loaded = load_for_inference(directory, layout=Layout(tp, ep, dist.group.WORLD))
    logits = cached_logits(loaded.model, tokens)
    parameters = sum(getattr(p, "_local_tensor", p).numel() for p in loaded.model.parameters())
    answers, ended = None, []
    with Engine(loaded, lambda: ended.append("on_close")) as engine:
        if engine.is_leader:
            answers = [a.tokens for a in engine.complete(REQUESTS, GREEDY)]
            steps = engine.stream(REQUESTS, GREEDY)
            next(steps)
            steps.close()  # the others must not go on
            answers += [a.tokens for a in engine.complete(REQUESTS[:1], GREEDY)]
        else:
            engine.follow()
    assert ended == ["on_close"], "process groups are ended on every rank"
    return logits, parameters, answers


@pytest.mark.parametrize(
    ("tp", "ep", "values"),
    [
        (1, 2, {}),
        (2, 1, ROPE_GQA_SWIGLU),
        (2, 2, {}),
        pytest.param(1, 4, ROPE_GQA_SWIGLU, marks=pytest.mark.matrix),
        pytest.param(4, 2, {}, marks=pytest.mark.matrix),
        # a cache of a window, sinks that tensor-parallel ranks share out, norms of q and k
        pytest.param(2, 2, ROPE_GQA_SWIGLU | {"window_size": 3, "softmax_type": "learnable", "qk_layernorm": True}, marks=pytest.mark.matrix),
        pytest.param(2, 2, {"position_embedding_type": "rope", "multi_latent_attention": True, "kv_lora_rank": 12, "qk_head_dim": 8,
                            "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "normalization": "RMSNorm", "add_bias_linear": False},
                     marks=pytest.mark.matrix),
        pytest.param(2, 4, {"mlp_type": "standard", "moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True,
                            "moe_latent_size": 10}, marks=pytest.mark.matrix),
    ],
)  # fmt: skip
def test_a_layout_answers_what_one_process_answers(tmp_path, tp, ep, values):
    save_small_model(tmp_path, **values)
    tokens, world = random_tokens(2, 9), max(tp, ep)
    model = load_for_inference(tmp_path).model
    whole = all_logits(model, tokens)
    prompts, limits = [r.prompt for r in REQUESTS], [r.max_new_tokens for r in REQUESTS]
    alone = [text[:limit] for text, limit in zip(generate(model, prompts, 9, GREEDY), limits)]
    assert alone == [generate(model, [prompt], limit, GREEDY)[0] for prompt, limit in zip(prompts, limits)]
    torch.testing.assert_close(cached_logits(model, tokens), whole, rtol=1e-10, atol=1e-10)
    replies = run_distributed(_in_layout, world, str(tmp_path), tp, ep, tokens)
    for logits, parameters, _ in replies:
        torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
        assert parameters < 0.95 * sum(p.numel() for p in model.parameters())  # TP splits what is dense, EP the experts
    assert [answers for _, _, answers in replies] == [[*alone, alone[0]]] + [None] * (world - 1)


def _refused(directory, tp, ep):
    try:
        load_for_inference(directory, layout=Layout(tp, ep, dist.group.WORLD))
    except ConfigError as error:
        return str(error)


def test_degrees_that_do_not_divide_the_model_are_refused(tmp_path):
    save_small_model(tmp_path, num_experts=(3, 9))
    assert all("--moe-expert-parallel-size" in text for text in run_distributed(_refused, 2, str(tmp_path), 1, 2))
    save_small_model(tmp_path / "b", hidden_size=33, num_attention_heads=3)
    assert all("--tensor-model-parallel-size" in text for text in run_distributed(_refused, 2, str(tmp_path / "b"), 2, 1))


def test_the_other_ranks_wait_longer_than_a_collective_may_take():
    from megatron_moe.inference import engine

    assert timedelta(days=30) < engine.IDLE
