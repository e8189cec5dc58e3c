"""The evaluation tool: counts, definitions, and lines that are wrong."""

import io
import json
import math

import numpy as np
import pytest
import torch
from test_generate_text import save_tiny_run

from megatron_moe.data.indexed_dataset import IndexedDatasetWriter
from megatron_moe.inference.load import load_for_inference
from tools import evaluate

EOD = 256


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("byte_run"), tokenizer_type="ByteTokenizer")


@pytest.fixture(scope="module")
def mock_run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("mock_run"))


def run_tool(capsys, tmp_path, *words):
    output = tmp_path / "scores.json"
    code = evaluate.main([*words, "--output", str(output)])
    out = capsys.readouterr()
    return code, json.loads(output.read_text(encoding="utf-8")) if code == 0 else None, out.out, out.err


def log_probs(model, tokens):
    """Of each token but the first, given all before it in the list."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1)[None])[0, :, :257]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist()


def test_a_text_of_one_window_is_scored_as_it_is(byte_run, tmp_path, capsys, monkeypatch):
    text = "Gr\u00fc\u00dfe, my friend"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code, result, out, _ = run_tool(capsys, tmp_path, "--load", byte_run, "--text", "-")
    assert code == 0
    entry, size = result["perplexity"]["documents"][0], len(text.encode())
    nats = -sum(log_probs(load_for_inference(byte_run).model, [EOD, *text.encode()]))
    assert (entry["tokens"], entry["scored_tokens"], entry["bytes"], entry["windows"]) == (size, size, size, 1)
    assert entry["nats"] == pytest.approx(nats, rel=1e-5)
    assert entry["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert entry["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (result["window"], result["perplexity"]["stride"]) == (64, 32)
    assert f"perplexity {entry['perplexity']:.4f} over {size} tokens" in out


def test_windows_that_overlap_score_each_token_once(byte_run, tmp_path, capsys):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("abcdefghijklmnopqrstuvwxyz" * 2)
    b.write_text("0123456789")
    words = ["--load", byte_run, "--text", str(a), str(b), "--window", "16", "--stride", "6", "--batch-size", "3"]
    _, result, _, _ = run_tool(capsys, tmp_path, *words)
    entry, model = result["perplexity"]["documents"][0], load_for_inference(byte_run).model
    tokens, nats, done = [EOD, *a.read_bytes()], 0.0, 0
    while done < 52:  # by hand: 16 tokens are seen, the ones that are new are counted
        end = min(16 if done == 0 else done + 6, 52)
        begin = max(end - 16, 0)
        nats -= sum(log_probs(model, tokens[begin : end + 1])[done - begin :])
        done = end
    assert entry["nats"] == pytest.approx(nats, rel=1e-5)
    assert entry["scored_tokens"] == 52
    both = result["perplexity"]["all"]
    assert (both["scored_tokens"], both["bytes"]) == (62, 62)
    assert both["nats"] == pytest.approx(sum(d["nats"] for d in result["perplexity"]["documents"]))


def test_a_data_set_is_its_documents_laid_end_to_end(byte_run, tmp_path, capsys):
    prefix, documents = str(tmp_path / "data_text_document"), [b"first one", b"second"]
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in documents:
            writer.add_document([*text, EOD])
    _, result, _, _ = run_tool(capsys, tmp_path, "--load", byte_run, "--data-path", prefix)
    entry = result["perplexity"]["documents"][0]
    nats = -sum(log_probs(load_for_inference(byte_run).model, [EOD, *documents[0], EOD, *documents[1], EOD]))
    assert (entry["scored_tokens"], entry["bytes"]) == (17, 15)
    assert entry["nats"] == pytest.approx(nats, rel=1e-5)


def test_without_a_tokenizer_the_first_token_has_nothing_before_it(mock_run, tmp_path, capsys):
    file = tmp_path / "ids.txt"
    file.write_text("5 17 2 99")
    _, result, _, _ = run_tool(capsys, tmp_path, "--load", mock_run, "--text", str(file))
    entry = result["perplexity"]["documents"][0]
    assert (entry["tokens"], entry["scored_tokens"], entry["bits_per_byte"]) == (4, 3, None)


def test_last_words_and_choices_are_scored_by_definition(byte_run, tmp_path, capsys):
    model = load_for_inference(byte_run).model

    def score(context, continuation):
        whole = [EOD] * (not context) + list((context + continuation).encode())
        return sum(log_probs(model, whole)[-len(continuation.encode()) :])

    texts = ["the cat sat on the mat", "a b", "one two  three"]
    words, questions = tmp_path / "words.jsonl", tmp_path / "questions.jsonl"
    words.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    records = [
        {"context": "ab", "choices": ["c", "a much longer one", "d"], "answer": 1},
        {"context": "", "choices": ["x", "yy"], "answer": "yy"},
        {"context": "q:\n", "choices": ["no", " yes"], "answer": 0},
    ]
    questions.write_text("\n".join(map(json.dumps, records)))
    _, result, out, _ = run_tool(capsys, tmp_path, "--load", byte_run, "--last-word", str(words), "--multiple-choice", str(questions))
    (entry,) = result["last_word"]
    by_hand = [score("the cat sat on the", " mat"), score("a", " b"), score("one two", "  three")]
    assert entry["perplexity"] == pytest.approx(math.exp(-sum(by_hand) / 3), rel=1e-5)
    assert entry["examples"] == 3

    (entry,) = result["multiple_choice"]
    right = per_character = 0
    joined = [[" c", " a much longer one", " d"], ["x", "yy"], ["no", " yes"]]
    for record, choices, answer in zip(records, joined, (1, 1, 0)):
        context = record["context"].rstrip()
        sums = [score(context, record["context"][len(context) :] + c) for c in choices]
        right += int(np.argmax(sums)) == answer
        per_character += int(np.argmax([s / len(c) for s, c in zip(sums, record["choices"])])) == answer
    assert entry == {"name": str(questions), "examples": 3, "accuracy": right / 3, "accuracy_per_character": per_character / 3}
    assert "of 3 questions right" in out


def test_a_last_word_is_right_when_the_model_would_have_written_it(mock_run, tmp_path, capsys):
    model, file = load_for_inference(mock_run).model, tmp_path / "words.jsonl"
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[5, 17]]), torch.arange(2)[None])[0, -1, :100].argmax())
    file.write_text("".join(json.dumps({"text": f"5 17 {last}"}) + "\n" for last in (likeliest, 99 - likeliest, likeliest)))
    _, result, _, _ = run_tool(capsys, tmp_path, "--load", mock_run, "--last-word", str(file))
    assert result["last_word"][0]["accuracy"] == 2 / 3


@pytest.mark.parametrize(
    ("flag", "lines", "message"),
    [
        ("--last-word", ['{"text": "a b"}', "nonsense", '{"text": 3}', '{"text": "word"}', "[]"], [2, 3, 4, 5]),
        ("--multiple-choice", ['{"context": "a", "choices": ["b", "c"], "answer": 0}', '{"context": "a", "choices": ["b"], "answer": 0}',
                               '{"context": "a", "choices": ["b", "c"], "answer": 2}', '{"choices": ["b", "c"], "answer": 0}',
                               '{"context": "a", "choices": ["b", "c"], "answer": true}'], [2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_lines_that_are_wrong_are_all_named_with_their_numbers(byte_run, tmp_path, capsys, flag, lines, message):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines))
    code, _, out, err = run_tool(capsys, tmp_path, "--load", byte_run, flag, str(file))
    assert (code, out) == (2, "")
    assert [n for n in range(1, 9) if f"line {n}:" in err] == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--text", __file__, "--window", "65"], "exceeds the 64 learned positions of the model; give --window 64"),
        (["--text", __file__, "--stride", "65"], "must be at most the window, 64 as in training"),
        (["--data-path", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_explained_and_exit_with_2(byte_run, tmp_path, capsys, words, message):
    code, _, out, err = run_tool(capsys, tmp_path, "--load", byte_run, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_mistakes_of_the_command_line_are_reported_together(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--window", "4", "--stride", "8", "--output", "no/such/folder/x.json"])
    err = capsys.readouterr().err
    for message in (
        "nothing to evaluate",
        "--load DIR is missing",
        "--stride (8) must be at most --window (4)",
        "no folder no/such/folder",
    ):
        assert message in err
