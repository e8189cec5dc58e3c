"""Requests in, pieces out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import LEARNED, ROPE_GQA_SWIGLU, VOCAB, small_model, small_run

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.inference import InferenceConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.engine import Engine, Request, open_engine
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import Loaded
from megatron_moe.model.attention import CausalCore

GREEDY = SamplingConfig(greedy=True)


def engine_of(eod=None, **values) -> Engine:
    model = small_model(**values)
    return Engine(Loaded(model, small_run(**values), VOCAB, eod, None, Path(), (), TokenizerConfig()))


def test_answers_are_what_generate_writes_each_with_its_own_limit():
    engine = engine_of()
    free = generate(engine.model, [[3, 1, 4], [7]], 9, GREEDY)
    answers = engine.complete([Request("3 1 4", 9), Request([7], 4)], GREEDY)
    assert [a.tokens for a in answers] == [free[0], free[1][:4]]
    assert [a.finish for a in answers] == ["length", "length"]
    assert answers[0].text == " " + " ".join(map(str, free[0]))  # behind a prompt: token ids are separated by blanks


def test_a_row_that_has_its_share_keeps_within_the_learned_positions():
    """20 tokens and 4 new ones fill the 24 positions; the other row needs 20 new ones."""
    engine = engine_of(**LEARNED)
    long, short = engine.complete([Request([1] * 20, 4), Request([7], 20)], GREEDY)
    assert (len(long.tokens), len(short.tokens)) == (4, 20)
    assert short.tokens == generate(engine.model, [[7]], 20, GREEDY)[0]


def test_a_stop_string_ends_its_request_alone():
    engine = engine_of(**ROPE_GQA_SWIGLU)
    free = generate(engine.model, [[3, 1, 4], [7]], 9, GREEDY)
    stop = f" {free[0][3]} {free[0][4]} "[:-1]
    first = " " + " ".join(map(str, free[0]))
    stopped, other = engine.complete([Request([3, 1, 4], 9, (stop,)), Request([7], 9)], GREEDY)
    assert stopped.text == first[: first.index(stop)]
    assert (stopped.finish, other.finish) == ("stop string", "length")
    assert free[0][: len(stopped.tokens)] == stopped.tokens
    assert len(stopped.tokens) < 9
    assert other.tokens == free[1]


def test_the_end_of_document_ends_a_request():
    free = generate(engine_of().model, [[3, 1, 4], [7]], 9, GREEDY)
    eod = free[1][2]
    answers = engine_of(eod).complete([Request([3, 1, 4], 9), Request([7], 9)], GREEDY)
    assert answers[1].tokens == free[1][: free[1].index(eod)]
    assert answers[1].finish == "end of document"


def test_what_is_cancelled_between_two_steps_gets_no_further_token():
    engine, gone = engine_of(), set()
    seen = []
    for pieces in engine.stream([Request([3, 1], 9), Request([7], 9)], GREEDY, cancelled=gone.__contains__):
        seen += pieces
        if len(seen) == 4:
            gone.add(0)
    of_first = [piece for piece in seen if piece.row == 0]
    assert [piece.finish for piece in of_first] == [None, None, "cancelled"]
    assert of_first[-1].token is None
    assert sum(piece.token is not None for piece in seen if piece.row == 1) == 9


def test_a_closed_stream_leaves_the_engine_free_and_the_model_as_it_was():
    engine = engine_of()
    steps = engine.stream([Request([7], 9)], GREEDY)
    next(steps)
    with pytest.raises(RuntimeError, match="still in another call"):
        next(engine.stream([Request([7], 1)], GREEDY))
    steps.close()
    assert all(type(block.attn.core) is CausalCore for block in engine.model.layers.values())
    assert len(engine.complete([Request([7], 2)], GREEDY)[0].tokens) == 2
    engine.close()
    with pytest.raises(RuntimeError, match="engine is closed"):
        engine.complete([Request([7], 1)], GREEDY)


def test_all_problems_are_named_before_anything_runs():
    engine = engine_of(**LEARNED)
    problems = engine.problems([Request("1 60", 3), Request([1] * 30, 3), Request("1", 0)])
    assert len(problems) == 3
    assert "the token 60" in problems[1]
    assert "24 learned positions" in problems[2]
    assert engine.most_tokens == 24
    assert engine_of(**ROPE_GQA_SWIGLU).most_tokens is None
    with pytest.raises(ValueError, match="not 'hello'"):
        engine.complete([Request("hello")], GREEDY)


def test_draws_repeat_with_the_seed():
    engine, warm = engine_of(), SamplingConfig(temperature=2.0, seed=3)
    first = engine.complete([Request([7], 12)], warm)[0].tokens
    assert engine.complete([Request([7], 12)], warm)[0].tokens == first
    assert engine.complete([Request([7], 12)], warm, engine.generator(4))[0].tokens != first
    assert max(first) < VOCAB
    assert torch.is_grad_enabled()


def test_with_a_seed_of_its_own_a_request_draws_the_same_whatever_is_beside_it():
    engine, warm = engine_of(), SamplingConfig(temperature=2.0, seed=3)
    alone = engine.complete([Request([7], 12)], [warm])[0].tokens
    beside = [SamplingConfig(seed=4), warm, GREEDY, warm]
    answers = engine.complete([Request([1, 2], 15), Request([7], 12), Request([7], 12), Request([7], 12)], beside)
    assert [answers[1].tokens, answers[3].tokens] == [alone, alone]
    assert answers[2].tokens == generate(engine.model, [[7]], 12, GREEDY)[0]
    assert alone == engine.complete([Request([7], 12)], warm)[0].tokens


def test_process_groups_end_when_there_is_nothing_to_load(tmp_path, monkeypatch):
    """A process that exits with its groups open may be aborted by their threads, and the exit code is not the tool's."""
    ended, world = [], SimpleNamespace(device=torch.device("cpu"), cpu_group=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.append("group"))
    with pytest.raises((ValueError, CheckpointError), match=str(tmp_path)):
        open_engine(InferenceConfig(load=str(tmp_path), moe_expert_parallel_size=2), TokenizerConfig(), lambda _: world)
    assert ended == ["group"]
