"""Real runs: the panel, metrics.jsonl and the alerts say what the MoE layers did."""

from __future__ import annotations

import contextlib
import io
import re
from unittest import mock

import pytest
from distributed_pool import run_distributed

from megatron_moe.metrics.panel import ASCII_BLOCKS, load_bars
from megatron_moe.metrics.reader import read_records
from megatron_moe.moe.layer import MoELayer
from training import runs

pytestmark = pytest.mark.distributed

MICROBATCHES, LAYERS = 1, {2: 2, 3: 4}  # experts by layer
SHORT_OF_ROOM = "--moe-train-capacity-factor 0.4 --moe-min-capacity 1"


def train_and_watch(flags: str) -> dict:
    """A run of this rank: what it printed, and by layer what was routed in each training forward: counts, and how much was kept."""
    routed: dict[int, list[tuple[list[int], int]]] = {}
    printed, route = io.StringIO(), MoELayer.route

    def watched(self, *args):
        routing, limits = route(self, *args)
        if self.training:
            routed.setdefault(self.layer, []).append((routing.counts_E.tolist(), int((routing.ids_TK >= 0).sum())))
        return routing, limits

    with mock.patch.object(MoELayer, "route", watched), contextlib.redirect_stdout(printed):
        runs.train_here(flags)
    return {"printed": printed.getvalue(), "routed": routed}


def loads_of(ranks: list[dict], layer: int, iteration: int) -> tuple[list[int], float]:
    """Over all ranks and micro-batches of a step: assignments of each expert, dropped share."""
    at = slice((iteration - 1) * MICROBATCHES, iteration * MICROBATCHES)
    seen = [entry for rank in ranks for entry in rank["routed"][layer][at]]
    counts = [sum(column) for column in zip(*(counts for counts, _ in seen))]
    return counts, 1 - sum(kept for _, kept in seen) / sum(counts)


def panels(printed: str) -> dict[int, dict[int, tuple[dict[str, str], str]]]:
    """Of the terminal: iteration -> layer -> (cells by title, bars)."""
    found, iteration, titles = {}, None, []
    for line in printed.splitlines():
        if match := re.match(r" iteration +(\d+)/", line):
            iteration = int(match[1])
        elif " max/mean" in line and line.split()[0] == "layer":
            titles = re.sub(" load.*", "", line.replace("MiB sent", "MiB_sent")).split()
        elif match := re.match(r"( +\d+ .*)  \[(.*)\]$", line):
            cells = dict(zip(titles, match[1].split(), strict=True))
            found.setdefault(iteration, {})[int(cells["layer"])] = (cells, match[2])
    return found


def test_panel_metrics_and_alerts_of_a_run_say_what_the_layers_did(tmp_path):
    flags = f"--mock-data --vocab-size 64 --train-iters 20 --log-interval 5 --moe-expert-parallel-size 2 {SHORT_OF_ROOM}"
    ranks = run_distributed(train_and_watch, 2, f"{flags} --save {tmp_path}/run")
    shown, records = panels(ranks[0]["printed"]), read_records(tmp_path / "run" / "metrics.jsonl")
    logged = {r["iteration"]: {m["layer"]: m for m in r["moe"]} for r in records if r["event"] == "train"}
    assert list(shown) == list(logged) == [1, 5, 10, 15, 20]
    for iteration, layers in shown.items():
        assert list(layers) == list(LAYERS)
        for layer, (cells, bars) in layers.items():
            counts, dropped = loads_of(ranks, layer, iteration)
            mean, record = sum(counts) / len(counts), logged[iteration][layer]
            assert sum(counts) == 4 * 16  # every token of the global batch, once
            assert record["expert_load"] == pytest.approx([n / sum(counts) for n in counts], rel=1e-4)
            assert record["dropped_fraction"] == pytest.approx(dropped)
            assert cells["max/mean"] == f"{max(counts) / mean:.2f}"
            assert cells["min/mean"] == f"{min(counts) / mean:.2f}"
            assert cells["dead"] == str(counts.count(0))
            assert cells["dropped"] == f"{100 * dropped:.1f}%"
            assert cells["experts"] == str(len(counts)) == str(LAYERS[layer])
            assert cells["entropy"] == f"{record['router_entropy']:.2f}"
            assert cells["logits"] == f"{record['router_logit_rms']:.1f}"
            assert bars == load_bars([n / sum(counts) for n in counts], ASCII_BLOCKS)
            # 32 wide, float32, rows there and back and their gradients: of the rows that were kept no more can travel
            assert 0 < record["sent_bytes"] <= (1 - dropped) * sum(counts) * (4 * 32 * 4 + 2 * 4) / 2
    check_dropping_alerts(records, ranks[0]["printed"], logged)
    assert "alert" not in ranks[1]["printed"]


def check_dropping_alerts(records, printed, logged):
    """Of both layers at the third logged step, in one line, and never again."""
    (alert,) = [r for r in records if r["event"] == "alert" and r["condition"] == "dropping"]
    worst = max(LAYERS, key=lambda layer: logged[10][layer]["dropped_fraction"])
    dropped = logged[10][worst]["dropped_fraction"]
    assert (alert["iteration"], alert["layer"], alert["layers"], alert["value"]) == (10, worst, list(LAYERS), dropped)
    assert alert["flag"] == "--moe-train-capacity-factor"
    assert alert["reason"].startswith(f"layer {worst}, the worst of 2 layers (2, 3), drops {100 * dropped:.1f}% of its assignments")
    assert f" alert | iteration: 10 | reason: {alert['reason']}\n" in printed


def test_flags_switch_panel_expert_loads_and_alerts_off(tmp_path):
    flags = f"--mock-data --vocab-size 64 --train-iters 4 --log-interval 1 {SHORT_OF_ROOM} --save {tmp_path}/run"
    (rank,) = run_distributed(train_and_watch, 1, f"{flags} --moe-panel off --no-log-expert-load --no-moe-alerts")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert "min/mean" not in rank["printed"]
    assert not [r for r in records if r["event"] == "alert"]
    layers = [m for r in records if r["event"] == "train" for m in r["moe"]]
    assert len(layers) == 8
    assert all("expert_load" not in m and m["dropped_fraction"] > 0.1 for m in layers)


def test_an_expert_bias_is_in_panel_and_metrics(tmp_path):
    flags = f"--mock-data --vocab-size 64 --train-iters 3 --log-interval 1 --moe-router-enable-expert-bias --save {tmp_path}/run"
    ranks = run_distributed(train_and_watch, 2, f"{flags} --moe-router-bias-update-rate 0.01")
    shown = panels(ranks[0]["printed"])
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train"]
    biases = {layer: [0.0] * experts for layer, experts in LAYERS.items()}
    for r in records:
        for m in r["moe"]:
            counts, _ = loads_of(ranks, m["layer"], r["iteration"])
            mean = sum(counts) / len(counts)
            biases[m["layer"]] = [b + 0.01 * ((n < mean) - (n > mean)) for b, n in zip(biases[m["layer"]], counts)]
            low, high = min(biases[m["layer"]]), max(biases[m["layer"]])
            assert (m["bias_min"], m["bias_max"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
            assert shown[r["iteration"]][m["layer"]][0]["bias"] == f"{low:.2f}..{high:.2f}"
    assert records[-1]["moe"][0]["bias_max"] > 0.005
