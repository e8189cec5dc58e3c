"""Whole runs in every kind of layout: the same metrics.jsonl, and a checkpoint of each goes on in any other."""

from __future__ import annotations

import math

import pytest
from distributed_pool import run_distributed

from megatron_moe.metrics.reader import read_records
from training import runs

pytestmark = pytest.mark.distributed

RUN = (
    f"{runs.FP64} --num-layers 4 --num-experts 1 2 4 4 --topk 2 --num-key-value-heads 2 --attention-dropout 0.1 --disable-moe-token-dropping --moe-router-z-loss-coeff 0.1 "
    "--moe-loss-coeff 0.1 --moe-seq-loss-coeff 0.1 --micro-batch-size 1 --global-batch-size 8 --adam-eps 1e-5 --eval-interval 2 "
    "--eval-iters 1 --vocab-size 64 --split 80,20,0"
)
TP, EP, CP = "--tensor-model-parallel-size", "--moe-expert-parallel-size", "--context-parallel-size"
PP, ETP, ZERO = "--pipeline-model-parallel-size", "--expert-tensor-parallel-size", "--zero-stage"
LAYOUTS = {  # name -> ranks, flags
    "one process": (1, ""),
    "EP 2, ZeRO 3": (2, f"{EP} 2 {ZERO} 3"),
    "TP 2 with SP": (2, f"{TP} 2 --sequence-parallel"),
    "PP 2": (2, f"{PP} 2"),
    "CP 2, EP 2": (2, f"{CP} 2 {EP} 2 {ZERO} 2"),
    "ETP 2, ZeRO 0": (2, f"{ETP} 2 {ZERO} 0"),
    "interleaved PP 2, EP 2": (4, f"{PP} 2 --num-layers-per-virtual-pipeline-stage 1 {EP} 2"),
    "TP 2 with SP, EP 4, ZeRO 3": (4, f"{TP} 2 --sequence-parallel {EP} 4 {ZERO} 3"),
    "hybrid ZeRO 3, EP 2": (4, f"{EP} 2 {ZERO} 3 --num-distributed-optimizer-instances 2"),
    "TP 4, heads that are shared": (4, f"{TP} 4"),
    "CP 2, TP 2, ETP 2": (4, f"{CP} 2 {TP} 2 {ETP} 2"),
}
OF_THE_MACHINE = {
    "iteration_time_ms",
    "tokens_per_second",
    "tflops_per_device",
    "peak_memory_bytes",
    "sent_bytes",
    "sent_bytes_near",
    "sent_bytes_far",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(name: str, text, save, flags: str) -> None:
    world, layout = LAYOUTS[name]
    run_distributed(runs.train_here, world, f"{RUN} --data-path {text} --save {save} --train-iters 8 {layout} {flags}")


def records(save) -> list[dict]:
    """Of training and evaluation, by iteration, without what depends on the machine."""
    found = [strip(r) for r in read_records(save / "metrics.jsonl") if r["event"] in ("train", "eval")]
    return sorted(found, key=lambda r: (r["iteration"], r["event"]))


def strip(record):
    if isinstance(record, dict):
        return {key: strip(value) for key, value in record.items() if key not in OF_THE_MACHINE}
    return [strip(value) for value in record] if isinstance(record, list) else record


def assert_equal(found, expected, where: str = "") -> None:
    """Equal but for 1e-9 in numbers that were added up in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-10), f"{where}: {found} is not {expected}"
    else:
        assert found == expected, f"{where}: {found} is not {expected}"


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> list[dict]:
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    train("one process", text, save, "")
    return records(save)


ALWAYS = ["interleaved PP 2, EP 2"]
NAMES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.matrix) for name in LAYOUTS if name != "one process"]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_one_process(name, text, undisturbed, tmp_path):
    train(name, text, tmp_path / "run", "")
    assert_equal(records(tmp_path / "run"), undisturbed)


ORDERS = [  # each layout goes on from the one before it
    pytest.param(["one process", "EP 2, ZeRO 3", "PP 2", "TP 2 with SP"], marks=pytest.mark.matrix),
    ["interleaved PP 2, EP 2", "CP 2, TP 2, ETP 2", "hybrid ZeRO 3, EP 2", "one process"],
    pytest.param(["TP 2 with SP, EP 4, ZeRO 3", "interleaved PP 2, EP 2", "ETP 2, ZeRO 0", "CP 2, EP 2"], marks=pytest.mark.matrix),
    pytest.param(["CP 2, EP 2", "PP 2", "TP 2 with SP, EP 4, ZeRO 3", "ETP 2, ZeRO 0"], marks=pytest.mark.matrix),
    pytest.param(["hybrid ZeRO 3, EP 2", "TP 2 with SP", "CP 2, TP 2, ETP 2", "interleaved PP 2, EP 2"], marks=pytest.mark.matrix),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " - ".join(order))
def test_a_run_that_moves_from_layout_to_layout_has_the_curve_of_one_that_does_not(order, text, undisturbed, tmp_path):
    save = tmp_path / "run"
    for i, name in enumerate(order):
        train(name, text, save, f"--exit-interval 2 {f'--load {save}' if i else ''}")
    # at the end of a stop there may be no evaluation, and at the start of the next one there may be another
    assert_equal([r for r in records(save) if r["event"] == "train"], [r for r in undisturbed if r["event"] == "train"])
