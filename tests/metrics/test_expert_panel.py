"""The table of the MoE layers in the terminal."""

import io

import pytest

from megatron_moe.metrics.panel import ASCII_BLOCKS, FULL_BLOCKS, block_of, blocks_of, expert_panel, load_bars
from megatron_moe.metrics.tracker import moe_layer_record
from megatron_moe.metrics.writers import ConsoleWriter


def layer(number=2, counts=(6, 2, 0, 0), dropped=0.25, **more):
    return moe_layer_record(number, counts, dropped, 0.9, **more)


def panel(*layers, most_rows=None):
    return list(expert_panel(layers, most_rows, ASCII_BLOCKS))


def test_a_row_says_what_the_record_says():
    head, row = panel(layer(router_logit_rms=2.13, bias_range=(-0.02, 0.013), sent_bytes=3.5 * 2**20))
    assert head.split()[:10] == ["layer", "experts", "max/mean", "min/mean", "dead", "dropped", "entropy", "logits", "bias", "MiB"]
    assert row.partition("[")[0].split() == ["2", "4", "3.00", "0.00", "2", "25.0%", "0.90", "2.1", "-0.02..0.01", "3.5"]
    assert row.endswith("[@=  ]")  # 3 and 1 times the mean, and two dead


def test_columns_end_where_their_titles_end():
    head, row = panel(layer(router_logit_rms=2.13, bias_range=(-0.02, 0.013), sent_bytes=3.5 * 2**20))
    for title, value in [("max/mean", "3.00"), ("dead", "2"), ("dropped", "25.0%"), ("bias", "0.01"), ("MiB sent", "3.5")]:
        end = head.index(title) + len(title)
        assert row[:end].endswith(value), title


def test_what_no_layer_has_takes_no_room():
    head, _ = panel(layer())
    assert "bias" not in head
    assert "MiB" not in head
    assert "far" not in panel(layer(sent_bytes=2.0**21))[0] and "far" not in panel(layer(sent_bytes=2.0**21, far_bytes=0.0))[0]
    head, row = panel(layer(sent_bytes=3.0 * 2**20, far_bytes=2.0**20))
    assert [row[: head.index(title) + len(title)].split()[-1] for title in ("MiB sent", "far")] == ["3.0", "1.0"]
    assert "bias" in panel(layer(), layer(4, bias_range=(0.0, 0.0)))[0]


@pytest.mark.parametrize("experts", [2, 32, 33, 512])
def test_a_table_is_at_most_120_columns_wide(experts):
    layers = [layer(n, range(experts), bias_range=(-1.25, 1.25), sent_bytes=2e12) for n in range(1, 200, 3)]
    crossing = [layer(n, range(experts), bias_range=(-1.25, 1.25), sent_bytes=2e12, far_bytes=1e12) for n in range(1, 200, 3)]
    assert max(map(len, panel(*layers))) <= 120 and max(map(len, panel(*crossing))) <= 120
    assert panel(*layers)[1].endswith("]") and panel(*crossing)[1].endswith("]")
    assert max(map(len, panel(*layers, most_rows=8))) <= 120
    assert max(map(len, panel(layer(2, range(8))))) <= 80


def test_of_many_layers_the_busiest_are_shown_in_order_and_the_others_in_one_line():
    layers = [layer(n, (4 + n, 4, 4, 4), dropped=n / 1000) for n in range(1, 25)]
    head, *rows, rest = panel(*layers, most_rows=3)
    assert [int(row.split()[0]) for row in rows] == [22, 23, 24]
    assert rest == "21 more layers: max/mean at most 2.70, 0 dead, at most 2.1% dropped (--moe-panel all shows them)"
    assert len(panel(*layers)) == 25
    assert len(panel(*layers[:3], most_rows=3)) == 4


def test_many_experts_are_shown_from_the_busiest_to_the_idlest():
    counts = [0] * 60 + [8] * 30 + [2] * 10
    bars = load_bars([n / sum(counts) for n in counts], ASCII_BLOCKS)
    assert len(bars) == 32
    assert bars == "".join(sorted(bars, key=ASCII_BLOCKS.index, reverse=True))
    assert bars.count(" ") == pytest.approx(32 * 0.6, abs=1)
    assert "sorted" in panel(layer(2, counts))[0]
    assert load_bars([0.0, 1.0], ASCII_BLOCKS) == " @"  # few experts keep their places


def test_only_an_expert_without_a_token_is_blank():
    assert [block_of(load, ASCII_BLOCKS) for load in (0, 1e-6, 1, 2, 50)] == [" ", ".", "=", "@", "@"]


def test_a_terminal_that_cannot_print_blocks_gets_ascii():
    assert blocks_of(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == FULL_BLOCKS
    for encoding in ("ascii", "latin-1"):
        assert blocks_of(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == ASCII_BLOCKS
    assert blocks_of(io.StringIO()) == ASCII_BLOCKS  # it has no encoding


def test_numbers_that_were_not_finite_are_shown_as_such():
    (_, row) = panel(layer() | {"router_entropy": None, "dropped_fraction": float("nan")})
    assert row.split()[5:7] == ["nan%", "nan"]


def test_the_console_shows_the_table_below_the_line_of_a_training_step():
    shown = []
    record = {
        "event": "train", "iteration": 1, "consumed_samples": 1, "iteration_time_ms": 1.0, "learning_rate": 1.0, "lm_loss": 1.0,
        "moe_aux_loss": 1.0, "moe_z_loss": 0.0, "loss_scale": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0,
        "tflops_per_device": 1.0, "skipped_iterations": 0, "global_batch_size": 1, "kd_loss": None, "moe": [layer(), layer(4)],
    }  # fmt: skip
    for rows, lines in ((None, 4), (1, 4), (0, 1)):
        shown.clear()
        ConsoleWriter(10, 1, show=shown.append, panel_rows=rows).write(record)
        assert len(shown) == lines
    ConsoleWriter(10, 1, show=shown.append).write({"event": "stop", "reason": "done"})
    assert len(shown) == 2
