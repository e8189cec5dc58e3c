"""The harness runs our checkpoints, and finds what our own scoring finds. No hub: tasks and data are files of the test."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed", allow_module_level=True)

import lm_eval
from lm_eval.tasks import TaskManager
from tools.test_generate_text import save_tiny_run

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.inference import InferenceConfig
from megatron_moe.inference.engine import open_engine
from megatron_moe.inference.lm_eval_adapter import MegatronMoELM
from tools import evaluate

CHOICES = [
    {"context": "the cat sat on the", "choices": ["mat", "a much longer answer", "dog"], "answer": 1},
    {"context": "one two", "choices": ["three", "four"], "answer": 0},
    {"context": "q:", "choices": ["no", "yes", "perhaps"], "answer": 2},
    {"context": "x" * 80, "choices": ["cut on the left", "z"], "answer": 1},
]
TEXTS = [
    {"text": "a text that is longer than one window of sixty-four tokens, so that a second one is needed for its end"},
    {"text": "short"},
]
TASKS = {
    "choice": """
        task: choice
        output_type: multiple_choice
        doc_to_text: "{{context}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "rolling": """
        task: rolling
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
        """,
    "writing": """
        task: writing
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: ["e"], max_gen_toks: 12}
        metric_list: [{metric: exact_match}]
        """,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all three tasks, and the model that they were run on."""
    folder = tmp_path_factory.mktemp("lm_eval")
    run = save_tiny_run(folder / "run", tokenizer_type="ByteTokenizer")
    for name, records in {"choice": CHOICES, "rolling": TEXTS, "writing": TEXTS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\ntest_split: test\n"
        task = "\n".join(line.strip() for line in TASKS[name].strip().splitlines())
        (folder / f"{name}.yaml").write_text(f"{task}\n{data}")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="megatron_moe", model_args=f"load={run},ckpt_verify=size", batch_size=3, tasks=list(TASKS), task_manager=manager,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    return found, MegatronMoELM(load=run), folder, run


def test_multiple_choice_is_that_of_our_own_tool(results, capsys):
    found, _, folder, run = results
    output = folder / "scores.json"
    assert evaluate.main(["--load", run, "--multiple-choice", str(folder / "choice.jsonl"), "--output", str(output)]) == 0
    (ours,) = json.loads(output.read_text())["multiple_choice"]
    theirs = found["results"]["choice"]
    assert theirs["acc,none"] == pytest.approx(ours["accuracy"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["accuracy_per_character"])
    assert ours["examples"] == len(CHOICES)


def test_rolling_loglikelihood_is_the_perplexity_of_our_own_tool(results, capsys):
    found, _, folder, run = results
    files = []
    for number, record in enumerate(TEXTS):
        files.append(str(folder / f"text{number}.txt"))
        Path(files[-1]).write_text(record["text"])
    output = folder / "scores.json"
    assert evaluate.main(["--load", run, "--text", *files, "--stride", "64", "--output", str(output)]) == 0
    ours = json.loads(output.read_text())["perplexity"]["all"]
    theirs = found["results"]["rolling"]
    assert theirs["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)
    assert theirs["byte_perplexity,none"] == pytest.approx(math.exp(ours["nats"] / ours["bytes"]), rel=1e-6)


def test_text_is_that_of_the_engine_up_to_the_stop_string(results):
    found, model, _, _ = results
    for sample in found["samples"]["writing"]:
        prompt = sample["doc"]["text"].encode()[-(64 - 12) :]
        request, sampling = model._request(sample["doc"]["text"], {"until": ["e"], "max_gen_toks": 12})
        assert list(request.prompt) == list(prompt)
        assert sampling.greedy
        assert sample["resps"][0][0] == model.engine.complete([request], sampling)[0].text
        assert "e" not in sample["resps"][0][0]


def test_model_args_that_are_no_flags_are_named(results):
    with pytest.raises(ValueError, match="there is no lod; there are load, ckpt_step"):
        MegatronMoELM(lod="x")


def test_a_model_without_tokenizer_is_refused(tmp_path):
    engine = open_engine(InferenceConfig(load=save_tiny_run(tmp_path / "mock")), TokenizerConfig(), lambda _: None)
    with pytest.raises(ValueError, match="trained without a tokenizer"):
        MegatronMoELM(engine=engine)
