"""Records reach the file, the terminal and TensorBoard whole."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.output import LoggingConfig
from megatron_moe.metrics.reader import read_records, valid_history
from megatron_moe.metrics.tracker import Tracker, build_tracker, moe_layer_record, perplexity
from megatron_moe.metrics.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, scalars

STEP = {
    "iteration": 10, "consumed_samples": 80, "consumed_tokens": 10240, "lm_loss": 6.5, "kd_loss": 0.125, "moe_aux_loss": 0.02,
    "moe_z_loss": 0.0, "grad_norm": 1.25, "learning_rate": 3e-4, "weight_decay": 0.1, "global_batch_size": 8, "seq_length": 128, "loss_scale": 1.0, "skipped_iterations": 0, "iteration_time_ms": 120.0,
    "tokens_per_second": 8533.3, "tflops_per_device": 0.5, "peak_memory_bytes": 123456,
}  # fmt: skip
LAYERS = [moe_layer_record(1, [6, 2, 0, 0], 0.25, 0.9), moe_layer_record(3, [2, 2, 2, 2], 0.0, 1.3)]


class Recorder:
    def __init__(self):
        self.records, self.is_closed = [], False

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.is_closed = True


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def console_lines(*records):
    shown = []
    writer = ConsoleWriter(train_iterations=100, global_batch_size=8, show=shown.append)
    for record in records:
        writer.write(record)
    return shown


def train_record(**changes):
    recorder = Recorder()
    Tracker([recorder]).log_train(**(STEP | {"moe": LAYERS} | changes))
    return recorder.records[0]


# ---------------------------------------------------------------- records


def test_train_record_has_exactly_the_published_keys():
    record = train_record()
    assert list(record) == ["event", *STEP, "moe"]
    assert list(record["moe"][0]) == [
        "layer", "load_max_over_mean", "load_min_over_mean", "dead_experts", "dropped_fraction", "router_entropy", "load_p5_over_mean",
        "load_p50_over_mean", "load_p95_over_mean", "router_logit_rms", "bias_min", "bias_max", "sent_bytes", "sent_bytes_near", "sent_bytes_far",
        "expert_load",
    ]  # fmt: skip


def test_eval_record_has_exactly_the_published_keys():
    recorder = Recorder()
    Tracker([recorder]).log_eval(iteration=10, split="valid", lm_loss=2.0, tokens=4096)
    assert recorder.records == [
        {"event": "eval", "iteration": 10, "split": "valid", "lm_loss": 2.0, "perplexity": math.exp(2.0), "tokens": 4096}
    ]


def test_layer_record_of_a_skewed_load_matches_the_worked_example():
    assert LAYERS[0] == {
        "layer": 1, "load_max_over_mean": 3.0, "load_min_over_mean": 0.0, "dead_experts": 2, "dropped_fraction": 0.25,
        "router_entropy": 0.9, "load_p5_over_mean": 0.0, "load_p50_over_mean": 0.5, "load_p95_over_mean": pytest.approx(2.7),
        "router_logit_rms": 0.0, "bias_min": None, "bias_max": None, "sent_bytes": 0.0, "sent_bytes_near": None,
        "sent_bytes_far": None, "expert_load": [0.75, 0.25, 0.0, 0.0],
    }  # fmt: skip


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_percentiles_of_the_load_are_those_of_numpy(counts):
    record, mean = moe_layer_record(1, counts, 0.0, 1.0), max(np.mean(counts), 1e-9)
    for p in (5, 50, 95):
        assert record[f"load_p{p}_over_mean"] == pytest.approx(np.percentile(counts, p) / mean, abs=1e-9)


def test_layer_record_without_any_token_has_no_division_by_zero():
    assert moe_layer_record(0, [0, 0], 0.0, 0.0)["load_max_over_mean"] == 0


def test_perplexity_of_a_diverged_run_is_infinite_and_not_an_error():
    assert perplexity(1e5) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_other_events_carry_what_they_are_given_and_stop_wants_a_reason():
    recorder = Recorder()
    tracker = Tracker([recorder])
    tracker.event("save", iteration=5, path="iter_0000005")
    assert recorder.records == [{"event": "save", "iteration": 5, "path": "iter_0000005"}]
    with pytest.raises(AssertionError, match="wants a reason"):
        tracker.event("stop", iteration=5)
    with pytest.raises(AssertionError, match="not one of"):
        tracker.event("party")


# ---------------------------------------------------------------- metrics.jsonl


def test_every_record_is_one_line_that_is_there_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"event": "start"})
    assert lines_of(path) == [{"event": "start"}]
    writer.write(train_record())
    assert lines_of(path)[1] == train_record()


def test_reopening_cuts_off_the_half_line_of_a_crash_and_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "train", "iter')
    writer = JsonlWriter(path)
    writer.write({"event": "stop", "reason": "end"})
    assert lines_of(path) == [{"event": "start"}, {"event": "stop", "reason": "end"}]


@pytest.mark.parametrize("content", [b"", b"half", b"x" * 200_000, b"\n" + b"\0" * 100_000])
def test_a_file_without_a_whole_line_is_emptied_back_to_its_last_newline(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    JsonlWriter(path).close()
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


def test_a_record_that_finds_no_room_names_the_file_and_leaves_no_half_line(tmp_path):
    import resource

    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = JsonlWriter(path)
    writer.write({"event": "start"})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        with pytest.raises(OSError, match=f"the metrics of this step cannot be written: '{path}'"):
            writer.write({"event": "stop", "reason": "done"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert path.read_text() == '{"event": "start"}\n'


def test_the_load_of_each_expert_can_be_left_out_of_the_file_and_is_short_in_it(tmp_path):
    record = train_record(moe=[moe_layer_record(1, [1, 1, 1], 0.0, 1.0)])
    for name, left_out in (("with", ()), ("without", ("expert_load",))):
        JsonlWriter(tmp_path / name, left_out).write(record)
    ((layer,), (without,)) = (lines_of(tmp_path / name)[0]["moe"] for name in ("with", "without"))
    assert layer["expert_load"] == [0.33333] * 3
    assert list(without) == [key for key in layer if key != "expert_load"]
    assert record["moe"][0]["expert_load"] == [1 / 3] * 3  # other writers see what it was


def test_a_whole_file_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" * 50_000)
    JsonlWriter(path).close()
    assert path.stat().st_size == 150_000


def test_nan_is_null_in_the_file_and_an_alert_keeps_what_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    layer = moe_layer_record(1, [1, 1], 0.0, math.inf)
    with Tracker([JsonlWriter(path)]) as tracker:
        tracker.log_train(**(STEP | {"lm_loss": math.nan, "moe": [LAYERS[1], layer]}))
    assert "NaN" not in path.read_text()
    train, alert = lines_of(path)
    assert train["lm_loss"] is None
    assert train["moe"][1]["router_entropy"] is None
    assert alert == {
        "event": "alert", "iteration": 10, "reason": "not finite", "values": {"lm_loss": "nan", "moe[1].router_entropy": "inf"},
    }  # fmt: skip


# ---------------------------------------------------------------- terminal


def test_console_line_says_what_megatron_says_and_how_the_experts_are_loaded():
    (line,) = console_lines(train_record())
    for part in (
        "iteration       10/     100",
        "consumed samples:           80",
        "elapsed time per iteration (ms): 120.0",
        "learning rate: 3.000E-04",
        "global batch size:     8",
        "lm loss: 6.500000E+00",
        "moe loss: 2.000000E-02",
        "grad norm: 1.250",
        "tokens per second: 8533.3",
        "TFLOP/s: 0.500",
        "expert load max/mean: 3.00 (layer 1)",
        "dead experts: 2",
        "dropped: 25.0%",
        "skipped iterations:   0",
        "time left: 0:00:11",
    ):
        assert part in line


def test_console_line_of_a_dense_run_leaves_experts_out():
    (line,) = console_lines(train_record(moe=[]))
    assert "moe" not in line
    assert "expert" not in line


def test_console_shows_nan_as_it_is():
    (line,) = console_lines(train_record(lm_loss=math.nan, grad_norm=math.inf, iteration_time_ms=math.nan))
    assert "lm loss: NAN" in line
    assert "grad norm: inf" in line
    assert "time left: unknown" in line


def test_console_shows_evaluations_and_events():
    record = {"event": "eval", "iteration": 10, "split": "valid", "lm_loss": 2.0, "perplexity": 7.389, "tokens": 4096}
    shown = console_lines(record, {"event": "stop", "iteration": 10, "reason": "signal SIGTERM"})
    assert "valid loss at iteration 10 | lm loss: 2.000000E+00 | perplexity: 7.389000E+00 | tokens: 4096" in shown[0]
    assert shown[1] == " stop | iteration: 10 | reason: signal SIGTERM"


def test_console_shows_the_sentence_of_an_alert_and_not_its_fields_again():
    alert = {"event": "alert", "iteration": 7, "reason": "layer 2 drops"}
    alert |= {"condition": "dropping", "layer": 2, "layers": [2], "value": 0.5, "flag": "--x"}
    assert console_lines(alert) == [" alert | iteration: 7 | reason: layer 2 drops"]
    not_finite = {"event": "alert", "iteration": 7, "reason": "not finite", "values": {"lm_loss": "nan"}}
    assert console_lines(not_finite) == [" alert | iteration: 7 | reason: not finite | values: {'lm_loss': 'nan'}"]


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_one_scalar_per_number_and_layer():
    values = dict(scalars(train_record()))
    assert values["train/lm_loss"] == 6.5
    assert values["moe/layer_1/load_max_over_mean"] == 3.0
    assert values["moe/layer_3/dead_experts"] == 0
    assert values["moe/layer_1/load_p50_over_mean"] == 0.5
    assert not any("expert_load" in tag or tag.endswith(("/iteration", "/layer")) for tag in values)
    assert not any("bias" in tag for tag in values)
    biased = train_record(moe=[moe_layer_record(1, [1, 1], 0.0, 1.0, bias_range=(-0.5, 0.25), sent_bytes=7.0)])
    assert [dict(scalars(biased))[f"moe/layer_1/{key}"] for key in ("bias_min", "bias_max", "sent_bytes")] == [-0.5, 0.25, 7.0]
    assert not any("near" in tag or "far" in tag for tag, _ in scalars(biased)), "nobody knows which ranks share a node"
    crossing = train_record(moe=[moe_layer_record(1, [1, 1], 0.0, 1.0, sent_bytes=7.0, far_bytes=3.0)])
    assert [dict(scalars(crossing))[f"moe/layer_1/sent_bytes_{where}"] for where in ("near", "far")] == [4.0, 3.0]


def test_tensorboard_keeps_splits_apart_and_skips_other_events():
    assert dict(scalars({"event": "eval", "iteration": 1, "split": "test", "lm_loss": 2.0})) == {"eval/test/lm_loss": 2.0}
    assert not list(scalars({"event": "save", "iteration": 1}))


def test_asking_for_tensorboard_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tensorboard-dir .* needs the tensorboard package: pip install 'megatron_moe\[track\]'"):
        TensorBoardWriter(tmp_path)


def test_tensorboard_events_are_written_when_the_package_is_there(tmp_path):
    pytest.importorskip("tensorboard")
    with Tracker([TensorBoardWriter(tmp_path)]) as tracker:
        tracker.log_train(**STEP, moe=LAYERS)
    assert list(tmp_path.glob("events.*"))


# ---------------------------------------------------------------- tracker


def test_only_rank_0_writes(tmp_path):
    tracker = build_tracker(LoggingConfig(), str(tmp_path), rank=1, train_iterations=10, global_batch_size=8)
    tracker.log_train(**STEP, moe=LAYERS)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_go_to_the_run_directory_unless_a_path_is_given(tmp_path, capsys):
    for config, place in [
        (LoggingConfig(), tmp_path / "metrics.jsonl"),
        (LoggingConfig(metrics_path=str(tmp_path / "m")), tmp_path / "m"),
    ]:
        with build_tracker(config, str(tmp_path), rank=0, train_iterations=10, global_batch_size=8) as tracker:
            tracker.log_train(**STEP, moe=LAYERS)
        assert len(lines_of(place)) == 1
    out = capsys.readouterr().out
    assert out.count("lm loss") == 2
    assert out.count("max/mean min/mean dead") == 2  # the panel


def test_the_panel_and_the_load_of_each_expert_are_switched_by_flags(tmp_path, capsys):
    config = LoggingConfig(moe_panel="off", log_expert_load=False)
    with build_tracker(config, str(tmp_path), rank=0, train_iterations=10, global_batch_size=8) as tracker:
        tracker.log_train(**STEP, moe=LAYERS)
    assert "min/mean" not in capsys.readouterr().out
    assert "expert_load" not in (tmp_path / "metrics.jsonl").read_text()


def test_without_a_run_directory_the_terminal_is_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_tracker(LoggingConfig(), None, rank=0, train_iterations=10, global_batch_size=8).log_train(**STEP)
    assert list(tmp_path.iterdir()) == []


def test_closing_the_tracker_closes_its_writers():
    recorder = Recorder()
    Tracker([recorder]).close()
    assert recorder.is_closed


# ---------------------------------------------------------------- reading back


def test_reading_leaves_a_half_last_line_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n{"event": "train", "iter')
    assert read_records(path) == [{"event": "start"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\nrubbish\n{"event": "start"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_records(path)


def test_history_of_a_resumed_run_holds_each_iteration_once():
    def train(i, loss):
        return {"event": "train", "iteration": i, "lm_loss": loss}

    def evaluated(i, loss):
        return {"event": "eval", "iteration": i, "split": "valid", "lm_loss": loss}

    load = {"event": "load", "iteration": 15}
    records = [train(10, 1), evaluated(10, 1), train(20, 1), evaluated(20, 1), train(30, 1), load, train(20, 2), evaluated(20, 2), train(25, 2)]  # fmt: skip
    assert valid_history(records) == [train(10, 1), evaluated(10, 1), load, train(20, 2), evaluated(20, 2), train(25, 2)]
    assert valid_history([train(10, 1), evaluated(10, 1), train(10, 2)]) == [evaluated(10, 1), train(10, 2)]
