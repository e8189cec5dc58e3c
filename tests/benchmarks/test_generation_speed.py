"""The benchmark of generation: that it runs, what it concludes, and that writing asks the routers for nothing else."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import generation
from benchmarks.harness import Report, Times
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.moe.layer import moe_layers

CONFIG = RunConfig.from_values(generation.QUICK | generation.COMMON)


def test_it_runs_at_both_batches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "missing", lambda peers: dict.fromkeys(peers, "not asked for"))
    assert command.main(["generation", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("generation-*.json")
    figures = json.loads(file.read_text())["figures"]
    assert set(figures) == {"batch 1", "batch 8"}
    assert all(f["writing_tokens_per_cpu_second"] > 0 for f in figures["batch 1"]["systems"].values())
    assert "batch 8: a step reads" in capsys.readouterr().out


def test_writing_is_what_the_longer_turn_takes_beyond_the_shorter_one():
    samples = {"megatron_moe, 1": [Times(0, 2.0)], "megatron_moe, 5": [Times(0, 10.0)], "products alone, 1": [Times(0, 1.0)],
               "products alone, 5": [Times(0, 3.0)]}  # fmt: skip
    report = Report("generation")
    generation.conclude(report, 2, 8, 4, ["megatron_moe", "products alone"], samples, 1e6, 1e9)
    told = report.figures["batch 2"]["systems"]["megatron_moe"]
    assert (told["reading_tokens_per_cpu_second"], told["writing_tokens_per_cpu_second"]) == (8.0, 1.0)
    assert told["reading_over_products"]["median"] == 2.0 and told["writing_over_products"]["median"] == 4.0
    assert report.figures["batch 2"]["least_seconds_per_step"] == 1e-3


def test_bytes_of_a_step_are_those_of_the_weights_that_a_token_meets():
    one, many = (generation.active_bytes(CONFIG, 128, batch) for batch in (1, 100))
    attention, norms, gate, expert = 32 * (32 + 2 * 16) + 32 * 32, 2 * 32, 8 * 32, 3 * 32 * 64
    layer = attention + norms + gate
    assert one == pytest.approx(4 * (2 * (layer + 2 * expert) + 128 * 32 + 32 + 32))
    assert many == pytest.approx(4 * (2 * (layer + 8 * expert) + 128 * 32 + 32 + 100 * 32), rel=1e-6)


def test_systems_that_write_other_tokens_are_not_compared():
    with pytest.raises(AssertionError, match="do not write the same"):
        generation.check_equal({generation.OURS: [[1, 2]], "theirs": [[1, 3]]})


def test_routers_keep_no_statistics_of_what_is_written_and_keep_them_again_afterwards():
    model = generation.model_of(CONFIG, 128)
    generate(model, [[1, 2, 3]], 2, SamplingConfig(greedy=True))
    layers = moe_layers(model)
    assert layers and all(layer.stats.sums is None and layer.measures for layer in layers)
