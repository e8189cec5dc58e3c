"""generate(): against a loop without a cache, alone and in batches."""

import pytest
import torch
from small_models import LEARNED, ROPE_GQA_SWIGLU, VOCAB, all_logits, small_model

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate, stream
from megatron_moe.model.core import CausalCore

GREEDY = SamplingConfig(greedy=True)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [49, 0, 12]]


def without_cache(model, prompt, max_new_tokens, eod=None):
    """The oracle: a whole forward for each token, and the largest logit of a real token."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = int(all_logits(model, torch.tensor([tokens]))[0, -1, :VOCAB].argmax())
        if token == eod:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", [LEARNED, ROPE_GQA_SWIGLU])
def test_greedy_in_a_batch_equals_each_prompt_alone_without_cache(kind):
    model = small_model(**kind)
    texts = generate(model, PROMPTS, 12, GREEDY)
    assert texts == [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert texts == [generate(model, [prompt], 12, GREEDY)[0] for prompt in PROMPTS]


def test_a_row_stops_at_the_end_of_document_and_the_others_go_on():
    model = small_model()
    free = generate(model, PROMPTS, 10, GREEDY)
    eod = free[1][3]
    texts = generate(model, PROMPTS, 10, GREEDY, eod)
    assert texts == [without_cache(model, prompt, 10, eod) for prompt in PROMPTS]
    assert texts[1] == free[1][: free[1].index(eod)]
    assert max(map(len, texts)) > len(texts[1])  # or nothing was shown


def test_all_rows_ended_means_no_further_step():
    model = small_model()
    eod = generate(model, [[7]], 1, GREEDY)[0][0]
    assert list(stream(model, [[7]], 10, GREEDY, eod)) == []


def test_an_empty_prompt_starts_from_the_end_of_document():
    model = small_model()
    assert generate(model, [[]], 5, GREEDY, eod=2) == generate(model, [[2]], 5, GREEDY, eod=2)
    with pytest.raises(ValueError, match="without a tokenizer there is none"):
        generate(model, [[]], 5, GREEDY)


def test_the_seed_decides_the_draws_and_every_token_exists():
    model = small_model()
    a, b, c = (generate(model, PROMPTS, 12, SamplingConfig(temperature=2.0), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a == b != c
    assert max(max(text) for text in a) < VOCAB  # columns 50 to 63 are padding


def test_rotary_positions_go_beyond_what_was_trained_and_learned_ones_end():
    prompt = [1] * 20
    assert len(generate(small_model(**LEARNED), [prompt], 4, GREEDY)[0]) == 4  # 24 positions: just fits
    assert len(generate(small_model(**ROPE_GQA_SWIGLU), [prompt], 9, GREEDY)[0]) == 9
    with pytest.raises(ValueError, match=r"prompt 2 has 20 tokens; with 5 new ones .* 24 learned positions .*; ask for 4 or fewer"):
        generate(small_model(**LEARNED), [[1], prompt], 5, GREEDY)
    with pytest.raises(ValueError, match="shorten the prompt to 19 tokens or fewer"):
        generate(small_model(**LEARNED), [[1] * 30], 5, GREEDY)
    with pytest.raises(ValueError, match="shorten the prompt, and ask for 23 new tokens or fewer"):
        generate(small_model(**LEARNED), [[1] * 30], 24, GREEDY)


def test_what_cannot_be_continued_is_refused_before_the_model_runs():
    with pytest.raises(ValueError, match=r"prompt 1 has the token 50, .* from 0 to 49"):
        generate(small_model(), [[50]], 1, GREEDY)
    with pytest.raises(ValueError, match="no prompt"):
        generate(small_model(), [], 1, GREEDY)
    model = small_model()
    model.moe_config = type(model.moe_config)(num_experts=(4, 8), moe_token_dropping=True)
    with pytest.raises(ValueError, match="moe_token_dropping=False"):
        generate(model, [[1]], 1, GREEDY)


def test_the_model_is_as_before_also_when_a_stream_is_dropped():
    model = small_model().train()
    steps = stream(model, [[1]], 5, GREEDY)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    assert all(type(block.attn.core) is CausalCore for block in model.layers.values())
    assert not torch.is_inference_mode_enabled()
