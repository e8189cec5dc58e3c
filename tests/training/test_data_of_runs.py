"""What whole runs read: nothing twice, nothing left out, whatever changes between a stop and the next start."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.checkpoint.files import iteration_name, read_manifest, write_manifest
from megatron_moe.config.data import DataConfig
from megatron_moe.config.flags import ConfigError
from megatron_moe.data import index_cache, megatron_order
from megatron_moe.data.loader import build_datasets
from megatron_moe.metrics.reader import read_records
from megatron_moe.training.distributed import World, in_turn
from megatron_moe.training.preflight import prepare
from training import runs

pytestmark = pytest.mark.distributed

BATCH, SEQ = 8, 16
COMMON = f"--vocab-size 64 --split 80,20,0 --global-batch-size {BATCH} --lr-decay-iters 20 --eval-iters 1"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two corpora; the training part of the first has 42 samples an epoch, so that no step but a rare one ends with it."""
    folder = tmp_path_factory.mktemp("texts")
    return runs.write_text(folder / "a"), runs.write_text(folder / "b", documents=25)


@pytest.fixture(params=["one corpus", "blend"])
def words(request, texts):
    return (str(texts[0]),) if request.param == "one corpus" else ("0.7", str(texts[0]), "0.3", str(texts[1]))


def read(world, words, save, flags):
    """One {sample id: tokens} per step, of all ranks together, and the progress at the end."""
    command = f"--data-path {' '.join(words)} {COMMON} --save {save} {flags}"
    ranks = run_distributed(runs.read_here, world, command)
    steps = [{i: text for rank in ranks for i, text in rank["steps"][s].items()} for s in range(len(ranks[0]["steps"]))]
    assert all(len(step) == BATCH for step in steps)
    return steps, ranks[0]["progress"]


def undisturbed(words, order, steps, wanted):
    """What a run that is never stopped reads, from the datasets alone."""
    train = build_datasets(DataConfig(data_path=words, split="80,20,0", data_order=order), SEQ, 1234, 64, wanted).train
    return [{i: train[i]["text"].tolist() for i in range(s * BATCH, (s + 1) * BATCH)} for s in range(steps)]


@pytest.mark.parametrize("order", ["stable", "megatron"])
def test_stopped_moved_and_prolonged_run_reads_what_an_undisturbed_one_does(order, words, tmp_path):
    """First dp 1 and micro-batches of 2, stopped in the middle of an epoch; then dp 2, micro-batches of 4 and a longer run."""
    first, _ = read(1, words, tmp_path / "run", f"--data-order {order} --train-iters 11 --exit-interval 8")
    rest, progress = read(
        2, words, tmp_path / "run", f"--data-order {order} --train-iters 17 --micro-batch-size 4 --load {tmp_path / 'run'}"
    )
    wanted = [11 * BATCH, 2 * BATCH, BATCH]  # what the first run planned, an evaluation in every 7 steps and one more
    assert (len(first), len(rest)) == (8, 9)
    assert first + rest == undisturbed(words, order, 17, wanted)
    assert progress.ordered_samples == (wanted if order == "megatron" else None)
    told = [r["reason"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "alert" and "condition" not in r]
    assert len(told) == (order == "megatron") and all("drawn for 88 samples" in t and "this run wants 136" in t for t in told)


def test_prolonged_run_passes_the_end_of_megatrons_order(texts):
    """So that the test above covers what comes after it."""
    train = build_datasets(DataConfig(data_path=(str(texts[0]),), split="80,20,0", data_order="megatron"), SEQ, 1234, 64, (88, 16, 8)).train
    assert 88 <= train.plan.num_samples < 136 and train.plan.epochs > 1


def test_finetuning_draws_an_order_of_its_own(texts, tmp_path):
    words = (str(texts[0]),)
    read(1, words, tmp_path / "first", "--data-order stable --train-iters 2")
    steps, progress = read(1, words, tmp_path / "second", f"--data-order megatron --train-iters 6 --load {tmp_path / 'first'} --finetune")
    assert progress.ordered_samples == [6 * BATCH, BATCH, BATCH]
    assert steps == undisturbed(words, "megatron", 6, progress.ordered_samples)


def test_checkpoint_from_before_there_were_orders_goes_on(texts, tmp_path):
    words, save = (str(texts[0]),), tmp_path / "run"
    first, _ = read(1, words, save, "--train-iters 2")
    path = save / iteration_name(2)
    manifest = read_manifest(path)
    del manifest.meta["progress"]["ordered_samples"]
    for name in ("data_order", "train_data_exact_num_epochs"):
        del manifest.meta["config"]["data"][name]
    write_manifest(path, manifest)
    rest, _ = read(1, words, save, f"--train-iters 4 --load {save}")
    assert first + rest == undisturbed(words, "stable", 4, None)


@pytest.mark.parametrize(
    ("flags", "said"), [("--seed 7", "--seed is 7 and was 1234"), ("--split 90,10,0", "--split is 90,10,0 and was 80,20,0")]
)
def test_samples_of_another_order_are_told(texts, tmp_path, flags, said):
    save = tmp_path / "run"
    read(1, (str(texts[0]),), save, "--train-iters 2")
    read(1, (str(texts[0]),), save, f"--train-iters 3 --load {save} {flags}")
    (alert,) = (r for r in read_records(save / "metrics.jsonl") if r["event"] == "alert")
    assert said in alert["reason"]


# ---------------------------------------------------------------- what is refused


def problems_of(flags, world=1):
    try:
        parsed = parse_args(f"{runs.SMALL} --vocab-size 64 {flags}".split())
        check_to_train(parsed, world)
        prepare(parsed.run, world)
    except ConfigError as error:
        return error.problems
    return []


def test_change_of_order_between_save_and_load_is_refused(texts, tmp_path):
    data = f"--data-path {texts[0]}"
    for order, other in (("stable", "megatron"), ("megatron", "stable")):
        save = tmp_path / order
        read(1, (str(texts[0]),), save, f"--data-order {order} --train-iters 2")
        go_on = f"{data} --train-iters 4 --load {save} --lr-warmup-iters 0"
        assert problems_of(f"{go_on} --data-order {order}") == []
        (problem,) = problems_of(f"{go_on} --data-order {other}")
        assert f"--load {save}: iter_0000002 has read its data with --data-order {order} and this run has {other}" in problem
        assert f"give --data-order {order}" in problem and "--finetune" in problem
        assert problems_of(f"{go_on} --data-order {other} --finetune") == []
    (problem,) = problems_of(f"{go_on} --data-order megatron --train-data-exact-num-epochs 9")
    assert "--train-data-exact-num-epochs not given and this run has 9: leave it out" in problem


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mock-data --data-order megatron", ["--mock-data has none"]),
        ("--mock-data --train-data-exact-num-epochs 2", ["--train-data-exact-num-epochs (2)", "--data-order is stable"]),
        ("--data-path {} --data-order megatron --seed 4294967296", ["--seed below 4294967296, not 4294967296"]),
        ("--data-path {} --data-order megatrom", ["stable, megatron", "did you mean 'megatron'"]),
        (
            "--data-path {} --split 80,20,0 --data-order megatron --train-data-exact-num-epochs 1",
            ["has {} samples", "takes 80; give 2 to a new run"],
        ),
    ],
)
def test_what_is_wrong_with_an_order_is_said_before_the_start(flags, said, texts):
    count = len(build_datasets(DataConfig(data_path=(str(texts[0]),), split="80,20,0"), SEQ, 1234, 64).train)
    (problem,) = problems_of(f"--train-iters 20 {flags.format(texts[0])}")
    assert all(words.format(count) in problem for words in said), problem


# ---------------------------------------------------------------- several ranks


def _drawn(prefix):
    """How many orders this rank draws when every one of them is kept in files."""
    drawn, draw = [], megatron_order.draw_order

    def slow_draw(*arguments):
        drawn.append(arguments)
        time.sleep(0.3)  # long enough for ranks that do not wait to draw it as well
        return draw(*arguments)

    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    data = DataConfig(data_path=(prefix,), split="80,20,0", data_order="megatron")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_cache, "CACHE_FROM", 1)
        patch.setattr(megatron_order, "draw_order", slow_draw)
        train = in_turn(world, lambda: build_datasets(data, SEQ, 1234, 64, (96, 16, 8))).train
        return len(drawn), train[5]["text"].tolist()


def test_one_rank_draws_and_the_others_read(texts):
    (first, text), (second, other) = run_distributed(_drawn, 2, str(texts[1]))
    assert (first, second) == (2, 0) and text == other
