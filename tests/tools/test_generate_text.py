"""The generation tool, on checkpoints that tiny runs could have left behind."""

import dataclasses
import io
import json

import pytest

from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain
from megatron_moe.tokenizers import build_tokenizer
from megatron_moe.training.checkpoints import Progress, describe
from megatron_moe.training.preflight import Prepared
from tools import generate_text


def save_tiny_run(directory, **values) -> str:
    values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": (4,), "init_method_std": 0.3} | values
    run = RunConfig.from_values(values | {"max_position_embeddings": 64, "seq_length": 64})
    tokenizer = build_tokenizer(run.tokenizer) if run.tokenizer.kind else None
    vocab_size, eod = (tokenizer.vocab_size, tokenizer.eod) if tokenizer else (100, -1)
    model = build_plain(run, vocab_size)
    model.to_empty(device="cpu")
    initialize_parameters(model, 1, 0.3, 2)
    described = dataclasses.asdict(run.tokenizer) | {"fingerprint": tokenizer.fingerprint if tokenizer else None}
    meta = describe(Prepared(run, vocab_size, eod, described), Progress(5))
    CheckpointManager(directory).save(5, model_state(model), meta)
    return str(directory)


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("byte_run"), tokenizer_type="ByteTokenizer")


@pytest.fixture(scope="module")
def mock_run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("mock_run"))


def run_tool(capsys, *words):
    code = generate_text.main(list(words))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_prompts_are_continued_shown_and_written(byte_run, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    code, out, err = run_tool(capsys, "--load", byte_run, "--prompt", "ab", "Gr\u00fc\u00dfe", "--max-new-tokens", "7", "--greedy",
                              "--output", str(output))  # fmt: skip
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [r["prompt"] for r in records] == ["ab", "Gr\u00fc\u00dfe"]
    model = load_for_inference(byte_run).model
    for record in records:
        ids = list(record["prompt"].encode())
        assert record["prompt_ids"] == ids
        assert [record["continuation_ids"]] == generate(model, [ids], 7, SamplingConfig(greedy=True), eod=256)
        assert record["prompt"] + record["continuation"] in out
    assert "--- prompt 2 of 2: " in out


def test_samples_differ_among_themselves_and_repeat_with_the_seed(byte_run, capsys):
    words = ["--load", byte_run, "--prompt", "ab", "--num-samples", "3", "--batch-size", "2", "--max-new-tokens", "9", "--top-k", "50"]
    first, again = run_tool(capsys, *words, "--seed", "3"), run_tool(capsys, *words, "--seed", "3")
    assert first == again
    assert first[1].count("--- prompt 1 of 1, sample ") == 3
    texts = first[1].split("--- ")[1:]
    assert len({text.split("\n", 1)[1] for text in texts}) == 3
    assert run_tool(capsys, *words, "--seed", "4")[1] != first[1]


def test_prompts_come_from_a_file_or_standard_input(byte_run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    from_file = run_tool(capsys, "--load", byte_run, "--prompt-file", str(file), "--greedy", "--max-new-tokens", "3")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run_tool(capsys, "--load", byte_run, "--greedy", "--max-new-tokens", "3") == from_file
    assert from_file[1].count("--- prompt ") == 2


def test_an_empty_prompt_starts_a_document(byte_run, capsys):
    code, out, _ = run_tool(capsys, "--load", byte_run, "--prompt", "", "--greedy", "--max-new-tokens", "3")
    assert code == 0
    model = load_for_inference(byte_run).model
    ids = generate(model, [[256]], 3, SamplingConfig(greedy=True), eod=256)[0]
    assert bytes(i for i in ids if i < 256).decode(errors="replace") in out


def test_a_model_without_tokenizer_takes_and_gives_ids(mock_run, capsys):
    code, out, err = run_tool(capsys, "--load", mock_run, "--prompt", "5 17 2", "--greedy", "--max-new-tokens", "4")
    assert code == 0
    assert "token ids" in err
    text = out.splitlines()[1]
    assert text.startswith("5 17 2 ")
    assert "  " not in text
    ids = [int(word) for word in text.split()]
    assert [ids[3:]] == generate(load_for_inference(mock_run).model, [[5, 17, 2]], 4, SamplingConfig(greedy=True))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "hello"], "not 'hello'; give ids"),
        (["--prompt", "3 100"], "prompt 1 has the token 100, and the vocabulary goes from 0 to 99"),
        (["--prompt", "1 2", "--max-new-tokens", "63"], "ask for 62 or fewer"),
        (["--prompt", ""], "without a tokenizer there is none"),
        (["--prompt", "1", "--ckpt-step", "6"], "no checkpoint of iteration 6"),
        (["--prompt", "1", "--tokenizer-type", "ByteTokenizer"], "257 tokens, the model only 100"),
        (["--prompt", "1", "--greedy", "--num-samples", "2"], "drop one of them"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_explained_and_exit_with_2(mock_run, capsys, words, message):
    code, out, err = run_tool(capsys, "--load", mock_run, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_mistakes_of_the_command_line_are_reported_together(capsys):
    with pytest.raises(SystemExit) as stopped:
        generate_text.main(["--temperature", "0", "--top-p", "2", "--output", "no/such/folder/out.jsonl"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "--load DIR is missing" in err
    assert "there is no folder no/such/folder" in err
    assert "--top-p must be at most 1" in err
