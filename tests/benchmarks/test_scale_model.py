"""Scale on paper: every assumption is told, and the figures behave as their links do."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest

from benchmarks import __main__ as command
from benchmarks import scale_model
from megatron_moe.config.presets import PRESETS
from megatron_moe.model.flops import flops_per_token
from megatron_moe.training.planning.machines import MACHINES, SOURCES, Assumptions

H100 = MACHINES["h100-sxm"]
MODEL = "gpt-350m-moe-128"


def test_it_runs_and_tells_every_assumption_with_its_source(tmp_path, capsys):
    assert command.main(["scale_model", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("PREDICTED, not measured") < out.index(MODEL)
    for name, value in dataclasses.asdict(Assumptions()).items():
        assert f"{name} {value:g}: {SOURCES[name]}" in out
    (file,) = tmp_path.glob("scale_model-*.json")
    told = json.loads(file.read_text())["figures"]
    assert {row["way"] for row in told["rows"]} == set(scale_model.WAYS)
    assert f"{MODEL} on 8 GPUs, hierarchical" in told["without"]  # one node
    assert told["assumptions"] == dataclasses.asdict(Assumptions())


def test_every_source_says_whether_it_was_assumed_or_published():
    assert set(SOURCES) == {f.name for f in dataclasses.fields(Assumptions)}
    assert all(text.startswith(("assumed: ", "published: ", "assumed; published")) for text in SOURCES.values())
    assert "measured" not in " ".join(SOURCES.values())  # until a GPU was there
    assert set(scale_model.ZOO) <= set(PRESETS) and max(scale_model.GPUS) == 16384


def predicted(way: str, gpus: int, machine=H100, assumed=None):
    found = scale_model.predict(MODEL, gpus, way, machine, assumed or Assumptions())
    assert found is not None
    return found


def test_each_way_is_only_where_it_has_a_use():
    assert scale_model.predict(MODEL, 8, "hierarchical", H100, Assumptions()) is None
    assert predicted("fused", 64).layout.ep <= 8 < predicted("hierarchical", 64).layout.ep
    assert predicted("fused", 64).sent["ep"].far == 0 < predicted("hierarchical", 64).sent["ep"].far
    flat, fused = predicted("flat", 8), predicted("fused", 8)
    assert fused.time.total < flat.time.total and fused.sent["ep"].near == flat.sent["ep"].near  # the same bytes, fewer copies


def test_with_several_experts_a_token_fewer_bytes_cross_between_nodes():
    straight, once = (scale_model.predict("qwen3-30b-a3b", 64, way, H100, Assumptions()) for way in ("flat over nodes", "hierarchical"))
    assert straight.layout == once.layout and once.sent["ep"].far < straight.sent["ep"].far / 2


@pytest.mark.parametrize("way", scale_model.WAYS)
def test_faster_links_and_devices_never_make_a_step_longer(way):
    base = predicted(way, 64).time.total
    for better in ({"inter_node_bandwidth": 100}, {"intra_node_bandwidth": 900}, {"peak_tflops": 2000}, {"memory_bandwidth": 8000}):
        assert predicted(way, 64, replace(H100, **better)).time.total <= base
    assert predicted(way, 64, replace(H100, inter_node_bandwidth=10)).time.total > base


def test_links_without_end_leave_the_arithmetic():
    """With everything else free and all efficiencies 1, a step takes what its FLOPs take at the peak."""
    free = Assumptions(1, 1, 1, 1, 0, 0, 0, 1, 0)
    machine = replace(H100, memory_gb=1e6, memory_bandwidth=1e12, intra_node_bandwidth=1e12, inter_node_bandwidth=1e12)
    found, run = predicted("flat", 8, machine, free), scale_model.run_of(MODEL)
    row = scale_model.row_of(MODEL, 8, "flat", found, machine)
    flops = flops_per_token(run.model, run.moe, 2048, scale_model.GPT2_VOCAB_SIZE)
    assert row["model_flops_utilisation"] == pytest.approx(1.0, rel=1e-3)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(989e12 / flops, rel=1e-3)


def test_the_batch_grows_with_the_devices():
    assert [scale_model.batch_of("deepseek-v3", n) for n in (8, 2048, 16384)] == [56, 14336, 114688]  # 15360 // 2048 for each
