"""The plot tool, on metrics that a run could have left behind."""

import builtins
import importlib.util
import json
import struct
from pathlib import Path

import pytest

from megatron_moe.metrics.tracker import moe_layer_record
from tools import plot_run

draws = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def train(iteration, loads=((3, 1), (2, 2, 0, 4)), dropped=0.1, lm_loss=3.0):
    moe = [moe_layer_record(2 * i + 1, counts, dropped, 1.0) for i, counts in enumerate(loads)]
    return {
        "event": "train", "iteration": iteration, "consumed_tokens": 100 * iteration, "lm_loss": lm_loss, "grad_norm": 1.0,
        "learning_rate": 1e-3, "tokens_per_second": 1000.0, "moe": moe,
    }  # fmt: skip


def evaluated(iteration, split="valid"):
    return {"event": "eval", "iteration": iteration, "split": split, "lm_loss": 3.1}


def write_run(directory, records, tail=""):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(directory)


def size_of_png(path):
    head = Path(path).read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


@draws
def test_a_resumed_and_interrupted_run_is_drawn_beside_its_metrics(tmp_path, capsys):
    records = [train(10), train(20), evaluated(20), train(30, lm_loss=None), {"event": "load", "iteration": 15}, train(20), evaluated(25)]
    run = write_run(tmp_path / "a", records, tail='{"event": "tra')
    assert plot_run.main(["--run", run]) == 0
    width, height = size_of_png(tmp_path / "a" / "plot.png")
    assert width == 1600
    assert height > 900  # curves and one row of heat maps
    assert "plot.png" in capsys.readouterr().out


@draws
def test_a_dense_run_has_no_heat_map_and_two_runs_share_one_image(tmp_path):
    dense = write_run(tmp_path / "dense", [train(i, loads=()) for i in (10, 20)])
    sparse = write_run(tmp_path / "sparse", [train(10, dropped=0.0)])
    assert plot_run.main(["--run", dense, "--output", str(tmp_path / "dense.png")]) == 0
    assert plot_run.main(["--run", dense, sparse, "--output", str(tmp_path / "new" / "both.png")]) == 0
    assert size_of_png(tmp_path / "dense.png")[1] < size_of_png(tmp_path / "new" / "both.png")[1]


@draws
def test_without_the_load_of_each_expert_the_layers_are_drawn_all_the_same(tmp_path):
    records = [train(i) for i in (10, 20, 30)]
    whole = write_run(tmp_path / "whole", records)
    for r in records:
        for m in r["moe"]:
            del m["expert_load"]
    short = write_run(tmp_path / "short", records)
    for run in (whole, short):
        assert plot_run.main(["--run", run]) == 0
    heights = [size_of_png(tmp_path / name / "plot.png")[1] for name in ("whole", "short")]
    assert heights[0] > heights[1] > 900  # curves and the layers over time, without the maps of the experts


@draws
def test_an_alert_is_a_cross_at_its_layer_and_iteration(tmp_path):
    alert = {"event": "alert", "iteration": 20, "layer": 3, "layers": [3], "condition": "dead", "reason": "layer 3 ..."}
    other = {"event": "alert", "iteration": 20, "reason": "not finite", "values": {}}
    run = plot_run.load_run(write_run(tmp_path / "a", [train(10), train(20), alert, alert | {"condition": "collapse"}, other]))
    axis = plot_run._pyplot().figure().subplots()
    plot_run._draw_alerts(axis, run)
    (cross,), (text,) = axis.get_lines(), axis.texts
    assert [list(v) for v in cross.get_data()] == [[20], [1]]  # the second of layers 1 and 3
    assert text.get_text() == "dead, collapse"


def test_a_layer_that_was_not_recorded_is_a_gap():
    records = [train(10), train(20, loads=((3, 1),))]
    found = [plot_run._of_layer(r, 3, "dead_experts") for r in records]
    assert found[0] == 1
    assert found[1] != found[1]


def test_show_table_prints_one_character_per_expert_and_draws_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "a", [train(10)])
    assert plot_run.main(["--run", run, "--show-table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:6] == ["1", "2", "1.50", "0.50", "0", "10.0%"]
    assert lines[3].endswith("[\u2584\u2584 \u2588]")  # loads 1, 1, 0, 2 over the mean
    assert not (tmp_path / "a" / "plot.png").exists()


def test_show_table_of_a_dense_run_says_so(tmp_path, capsys):
    assert plot_run.main(["--run", write_run(tmp_path / "a", [train(10, loads=())]), "--show-table"]) == 0
    assert "the run is dense" in capsys.readouterr().out


def test_missing_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    run = write_run(tmp_path / "a", [train(10)])
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert plot_run.main(["--run", run]) == 2
    assert "pip install 'megatron_moe[plot]'" in capsys.readouterr().err


def test_a_run_without_metrics_names_the_file_that_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plot_run.main(["--run", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "nowhere/metrics.jsonl" in capsys.readouterr().err


def test_a_run_that_has_not_logged_yet_is_refused(tmp_path, capsys):
    assert plot_run.main(["--run", write_run(tmp_path / "a", [{"event": "start"}])]) == 2
    assert "no training record yet" in capsys.readouterr().err


def test_evaluations_between_two_log_lines_are_placed_between_them():
    tokens = {10: 1000.0, 20: 3000.0}
    assert [plot_run._interpolated(tokens, i) for i in (10, 15, 20, 40, 5)] == [1000, 2000, 3000, 6000, 500]


def test_heat_map_cells_meet_half_way_between_log_lines():
    assert plot_run._edges([10, 20, 40]) == [5, 15, 30, 50]
    assert plot_run._edges([7]) == [6.5, 7.5]
