"""The generation tool, on checkpoints that tiny runs could have left behind."""

import dataclasses
import io
import json
import subprocess
import sys

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


def test_a_prompt_file_of_json_lines_has_stop_strings_of_each_prompt(byte_run, tmp_path, capsys):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    words = ["--load", byte_run, "--prompt-file", str(file), "--greedy", "--max-new-tokens", "12", "--output", str(output)]
    file.write_text('{"prompt": "ab"}\n\n{"prompt": "Gr\\u00fc\\u00dfe"}\n')
    assert run_tool(capsys, *words)[0] == 0
    free = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    stop = free[0]["continuation"][5:7]
    file.write_text(json.dumps({"prompt": "ab", "stop": [stop]}) + "\n" + json.dumps({"prompt": "Gr\u00fc\u00dfe", "stop": []}) + "\n")
    assert run_tool(capsys, *words)[0] == 0
    first, second = (json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())
    assert first["stopped_by"] == "stop string"
    assert first["continuation"] == free[0]["continuation"].partition(stop)[0]
    assert second == free[1]
    code, _, _ = run_tool(capsys, *words, "--stop", free[1]["continuation"][2])  # of all prompts, beside their own
    second = json.loads(output.read_text(encoding="utf-8").splitlines()[1])
    assert (code, second["stopped_by"]) == (0, "stop string")


def test_lines_that_are_no_prompts_are_all_named(byte_run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ok"}\n{"prompt": 3}\nnot json\n{"prompt": "a", "stop": "b"}\n{"prompt": "a", "stops": []}\n')
    code, out, err = run_tool(capsys, "--load", byte_run, "--prompt-file", str(file))
    assert (code, out) == (2, "")
    assert [f"line {n}:" in err for n in (1, 2, 3, 4, 5)] == [False, True, True, True, True]
    assert "unknown key 'stops'" in err


def test_streamed_text_is_the_text_that_is_shown_at_the_end(byte_run, capsys):
    words = ["--load", byte_run, "--prompt", "ab", "cde", "--num-samples", "2", "--max-new-tokens", "9", "--top-k", "50"]
    whole, live = run_tool(capsys, *words)[1], run_tool(capsys, *words, "--stream", "always")[1]
    blocks = [block.split("\n", 1)[1] for block in whole.split("--- prompt ")[1:]]
    streamed = [block.split("\n", 1)[1].rpartition("\n    (stopped by ")[0] + "\n" for block in live.split("--- prompt ")[1:]]
    assert streamed == blocks
    assert live.count("(stopped by --max-new-tokens)") == 4


def chat(capsys, monkeypatch, lines, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run_tool(capsys, "--interactive", "--max-new-tokens", "5", "--greedy", *words)


def test_a_conversation_goes_on_from_all_its_turns_until_it_is_reset(byte_run, capsys, monkeypatch):
    from megatron_moe.inference.chat import PlainTemplate

    code, out, err = chat(capsys, monkeypatch, ["Hi", "/reset", "/what", "Hi", "", "Yo", "/quit", "never"], "--load", byte_run)
    assert code == 0
    assert "(forgotten)" in err
    assert "unknown command /what: there are /reset and /quit" in err
    model, user, template = load_for_inference(byte_run).model, {"role": "user", "content": "Hi"}, PlainTemplate()
    assert template.render([user]) == "User: Hi\n\nAssistant:"

    def answer(messages):
        ids = generate(model, [list(template.render(messages).encode())], 5, SamplingConfig(greedy=True), eod=256)[0]
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    first = answer([user])
    again = answer([user, {"role": "assistant", "content": first.strip()}, {"role": "user", "content": "Yo"}])
    assert out == f"{first}\n{first}\n{again}\n"


def test_a_turn_that_does_not_fit_is_said_and_forgotten(byte_run, capsys, monkeypatch):
    code, out, err = chat(capsys, monkeypatch, ["x" * 60, "Hi"], "--load", byte_run)
    assert code == 0
    assert "64 learned positions" in err
    assert len(out.splitlines()) >= 1  # the second turn alone


def test_the_chat_template_beside_a_tokenizer_is_used_in_a_sandbox(tmp_path, capsys, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "<end>": 1, "u": 2, "a": 3, "Hi": 4, "?": 5}, unk_token="?")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}u {{ m.content }} {{ eos_token }}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    config = {"chat_template": template, "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    run = save_tiny_run(tmp_path / "run", tokenizer_model=str(tmp_path / "tokenizer.json"))
    code, _, err = chat(capsys, monkeypatch, ["Hi"], "--load", run)
    assert code == 0
    assert "tokenizer_config.json" in err

    from megatron_moe.config.data import TokenizerConfig
    from megatron_moe.inference.chat import tokenizer_template

    read = tokenizer_template(TokenizerConfig(tokenizer_model=str(tmp_path / "tokenizer.json")))
    assert read.render([{"role": "user", "content": "Hi"}]) == "u Hi <end> a"
    assert read.stops == ("<end>",)
    config["chat_template"] = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    _, out, err = chat(capsys, monkeypatch, ["Hi"], "--load", run)
    assert (out, "refuses this conversation" in err) == ("", True)
    assert chat(capsys, monkeypatch, ["Hi"], "--load", run, "--chat-template", "plain")[0] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--interactive", "--prompt", "a", "--num-samples", "2"], "has no --num-samples 2"),
        (["--chat-template", "plain", "--prompt", "a"], "add --interactive"),
        (["--stop", "", "--prompt", "a"], "--stop: an empty text"),
    ],
)
def test_flags_that_contradict_each_other_are_named(byte_run, capsys, words, message):
    with pytest.raises(SystemExit):
        generate_text.main(["--load", byte_run, *words])
    assert message in capsys.readouterr().err


def test_a_layout_wants_its_ranks(byte_run, capsys):
    code, _, err = run_tool(capsys, "--load", byte_run, "--prompt", "a", "--moe-expert-parallel-size", "2")
    assert code == 2
    assert "are for 2 processes, and 1 is running; start torchrun --nproc-per-node 2" in err


@pytest.mark.matrix
@pytest.mark.distributed
def test_torchrun_shows_what_one_process_shows(byte_run, capsys):
    words = ["--load", byte_run, "--prompt", "ab", "cde", "--max-new-tokens", "9", "--top-k", "50", "--stop", "q"]
    alone = run_tool(capsys, *words)[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", generate_text.__file__]
    degrees = ["--tensor-model-parallel-size", "2", "--moe-expert-parallel-size", "2"]
    done = subprocess.run([*command, *words, *degrees], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, alone), done.stderr
