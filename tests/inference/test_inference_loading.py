"""Checkpoints of sharded and plain runs, loaded into one process without a process group."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from small_models import ROPE_GQA_SWIGLU, VOCAB, all_logits, random_tokens, small_model, small_run

from megatron_moe.checkpoint.files import Best, CheckpointError, write_best
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.config.data import TokenizerConfig
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference
from megatron_moe.inference.sampling import SamplingConfig
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.tokenizers import build_tokenizer
from megatron_moe.training.checkpoints import Progress, describe
from megatron_moe.training.preflight import Prepared


def prepared(run, vocab_size=VOCAB, eod=-1, fingerprint=None) -> Prepared:
    return Prepared(run, vocab_size, eod, dataclasses.asdict(run.tokenizer) | {"fingerprint": fingerprint})


def save_small_model(directory, iterations=(10,), eod=-1, fingerprint=None, **values):
    model, run = small_model(**values), small_run(**values)
    for iteration in iterations:
        meta = describe(prepared(run, VOCAB, eod, fingerprint), Progress(iteration))
        CheckpointManager(directory).save(iteration, model_state(model), meta)
    return model


def _save_sharded(directory, values, tokens):
    """Expert-parallel 2, ZeRO over both ranks, with optimizer state; returns the logits."""
    run = small_run(**values, moe_expert_parallel_size=2, zero_stage=3)
    model = build_parallel_model(run, VOCAB, build_parallel_mesh(run, "cpu"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tensors = model_state(model) | optimizer_state(model, optimizer)
    CheckpointManager(directory, dist.group.WORLD).save(7, tensors, describe(prepared(run), Progress(7)))
    return all_logits(model.eval(), tokens).clone()


@pytest.mark.distributed
@pytest.mark.parametrize("values", [{}, ROPE_GQA_SWIGLU | {"moe_token_dropping": True, "moe_eval_capacity_factor": 8.0}])
def test_an_expert_parallel_checkpoint_gives_the_same_logits_in_one_process(tmp_path, values):
    tokens = random_tokens(2, 16)
    sharded = run_distributed(_save_sharded, 2, str(tmp_path), values, tokens)
    assert not dist.is_initialized()
    loaded = load_for_inference(tmp_path)
    assert (loaded.vocab_size, loaded.eod, loaded.tokenizer, loaded.path.name) == (VOCAB, None, None, "iter_0000007")
    assert loaded.run.moe.moe_expert_parallel_size == 2  # as it was trained
    assert not loaded.model.moe_config.moe_token_dropping
    assert not loaded.model.training
    for logits in sharded:
        torch.testing.assert_close(all_logits(loaded.model, tokens), logits, rtol=1e-10, atol=1e-10)
    assert len(generate(loaded.model, [[1, 2]], 5, SamplingConfig(greedy=True))[0]) == 5


def test_newest_step_and_single_directory_are_found(tmp_path):
    save_small_model(tmp_path, iterations=(10, 20))
    assert load_for_inference(tmp_path).path.name == "iter_0000020"
    assert load_for_inference(tmp_path, step=10).path.name == "iter_0000010"
    assert load_for_inference(tmp_path / "iter_0000010").path.name == "iter_0000010"
    write_best(tmp_path, Best(10, 2.5))
    assert load_for_inference(tmp_path / "best").path.name == "iter_0000010"
    with pytest.raises(CheckpointError, match="iteration 15"):
        load_for_inference(tmp_path, step=15)
    with pytest.raises(ValueError, match="iteration 10, not of 20"):
        load_for_inference(tmp_path / "iter_0000010", step=20)


def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path):
    save_small_model(tmp_path, iterations=(10, 20))
    shard = next((tmp_path / "iter_0000020").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    loaded = load_for_inference(tmp_path)
    assert loaded.path.name == "iter_0000010"
    assert "size mismatch" in loaded.notes[0]


@pytest.fixture
def word_tokenizer(tmp_path):
    """tokenizer.json of three words and an end of document."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(path))
    return TokenizerConfig(tokenizer_model=str(path))


def test_a_tokenizer_whose_file_has_moved_is_found_by_flag_and_another_is_refused(tmp_path, word_tokenizer):
    fingerprint = build_tokenizer(word_tokenizer).fingerprint
    save_small_model(tmp_path / "run", eod=0, fingerprint=fingerprint, tokenizer_model=word_tokenizer.tokenizer_model)
    assert load_for_inference(tmp_path / "run").tokenizer.encode("b") == [2]

    old = tmp_path / "tokenizer.json"
    new = old.rename(tmp_path / "moved.json")
    with pytest.raises(ValueError, match=r"--tokenizer-model .*tokenizer.json: No such file"):
        load_for_inference(tmp_path / "run")
    loaded = load_for_inference(tmp_path / "run", tokenizer=TokenizerConfig(tokenizer_model=str(new)))
    assert (loaded.eod, loaded.tokenizer.fingerprint) == (0, fingerprint)

    new.write_text(new.read_text() + "\n")
    with pytest.raises(ValueError, match=f"the one of training had {fingerprint}"):
        load_for_inference(tmp_path / "run", tokenizer=TokenizerConfig(tokenizer_model=str(new)))


def test_a_checkpoint_without_tokenizer_takes_one_that_fits_its_vocabulary(tmp_path, word_tokenizer):
    save_small_model(tmp_path / "run")
    assert load_for_inference(tmp_path / "run", tokenizer=word_tokenizer).eod == 0
    with pytest.raises(ValueError, match="ByteTokenizer has 257 tokens, the model only 50"):
        load_for_inference(tmp_path / "run", tokenizer=TokenizerConfig("ByteTokenizer"))
