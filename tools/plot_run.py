"""Curves and expert load of one or several runs, from their metrics.jsonl.

  python tools/plot_run.py --run runs/a                     writes runs/a/plot.png
  python tools/plot_run.py --run runs/a runs/b --output ab.png
  python tools/plot_run.py --run runs/a --show-table        the last expert load as text, no image

Resumed runs show what the final weights have seen: later records win over earlier ones of the same iteration.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.metrics.panel import expert_panel
from megatron_moe.metrics.reader import read_records, valid_history

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
MAPS_PER_ROW = 4
MOST_DOUBLINGS = 3  # of the mean load: the ends of the colour scale are 1/8 and 8


@dataclass(frozen=True)
class PlotConfig:
    """Plot."""

    run: tuple[str, ...] = flag((), "run directories, or metrics.jsonl files", metavar="DIR")
    output: str | None = flag(None, "image to write; plot.png in the first run directory when not given", metavar="PNG")
    show_table: bool = flag(False, "print the last expert load of each MoE layer as text; an image only with --output")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.run:
            yield "--run DIR is missing: the directory given to --save"
        for run in self.run:
            if not metrics_file(run).is_file():
                yield f"--run {run}: there is no {metrics_file(run)}; give the directory of --save, or the file of --metrics-path"


@dataclass(frozen=True)
class Run:
    """The records of one run that can be drawn, in order of iteration."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    alerts: list[dict[str, Any]] = field(default_factory=list)  # about a layer

    @property
    def has_tokens(self) -> bool:
        return all(r.get("consumed_tokens") for r in self.train)

    @property
    def moe_layers(self) -> list[int]:
        return sorted({m["layer"] for r in self.train for m in r.get("moe") or ()})

    @property
    def layers(self) -> list[int]:
        """MoE layers of which the load of each expert was recorded."""
        return sorted({m["layer"] for r in self.train for m in r.get("moe") or () if m.get("expert_load")})


def metrics_file(run: str) -> Path:
    return Path(run) / "metrics.jsonl" if not Path(run).is_file() else Path(run)


def load_run(path: str) -> Run:
    history = valid_history(read_records(metrics_file(path)))
    train = [r for r in history if r["event"] == "train"]
    if not train:
        raise ValueError(f"{metrics_file(path)} holds no training record yet; wait for the first --log-interval")
    file = metrics_file(path)
    name = file.parent.resolve().name if file.name == "metrics.jsonl" else file.stem
    of_layers = [r for r in history if r["event"] == "alert" and "layers" in r]
    return Run(name, train, [r for r in history if r["event"] == "eval"], of_layers)


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(PlotConfig, "tools/plot_run.py", argv)
    try:
        runs = [load_run(path) for path in config.run]
        if config.show_table:
            print("\n".join(line for run in runs for line in load_table(run)))
        if config.output or not config.show_table:
            output = Path(config.output) if config.output else metrics_file(config.run[0]).parent / "plot.png"
            draw(runs, output)
            print(f"wrote {output}")
    except (ValueError, OSError) as error:
        print(f"tools/plot_run.py: {error}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------- text


def load_table(run: Run) -> list[str]:
    """The panel of the last training record."""
    last = run.train[-1]
    layers = [m for m in last.get("moe") or () if m.get("expert_load")]
    if not layers:
        return [f"{run.name}: no expert load was recorded; the run is dense, or has --no-log-expert-load"]
    return [f"{run.name}: MoE layers at iteration {last['iteration']}", *expert_panel(layers)]


# ---------------------------------------------------------------- image


def draw(runs: list[Run], output: Path) -> None:
    """Curves of all runs on top, then all MoE layers of each run over time, then the experts of each layer."""
    plt = _pyplot()
    columns = min(MAPS_PER_ROW, max(len(run.layers) for run in runs))
    map_rows = sum(-(-len(run.layers) // columns) for run in runs if run.layers)
    with_layers = [run for run in runs if len(run.moe_layers) > 1]
    parts: list[tuple[float, Callable[[Any], None]]] = [(7.2, lambda part: _draw_curves(part.subplots(2, 2), runs))]
    if with_layers:
        height = sum(1.4 + 0.12 * min(len(run.moe_layers), 24) for run in with_layers) + 0.4
        parts.append((height, lambda part: _draw_layers(part, with_layers)))
    if map_rows:
        parts.append((2.6 * map_rows + 0.4, lambda part: _draw_heat_maps(part, runs, map_rows, columns)))
    heights = [height for height, _ in parts]
    figure = plt.figure(figsize=(16, sum(heights) + 0.4), dpi=100, layout="constrained")
    figure.suptitle("   ".join(f"{run.name}: iteration {run.train[-1]['iteration']:,}" for run in runs), fontsize=13)
    for (_, draw_part), part in zip(parts, figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]):
        draw_part(part)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plotting needs matplotlib: pip install 'megatron_moe[plot]', or use --show-table") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    return plt


def _draw_curves(axes: Any, runs: list[Run]) -> None:
    (loss, rate), (norm, balance) = axes
    _draw_loss(loss, runs)
    has_experts = any(run.moe_layers for run in runs)
    has_drops = any(_worst(r, "dropped_fraction") for run in runs for r in run.train)
    for run, colour in zip(runs, COLOURS * len(runs)):
        x = [r["iteration"] for r in run.train]
        rate.plot(x, _column(run.train, "learning_rate"), color=colour)
        norm.plot(x, _column(run.train, "grad_norm"), color=colour, lw=1.2)
        if not has_experts:
            balance.plot(x, _column(run.train, "tokens_per_second"), color=colour)
        elif run.moe_layers:
            balance.plot(x, [_worst(r, "load_max_over_mean") for r in run.train], color=colour, label=f"{run.name}: load / mean")
    for axis, title, unit in (
        (rate, "Learning rate", ""),
        (norm, "Gradient norm before clipping", "L2 norm"),
        (balance, *(("Busiest expert of the worst MoE layer", "load / mean") if has_experts else ("Throughput", "tokens / s"))),
    ):
        axis.set(title=title, xlabel="iteration", ylabel=unit)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _log_axis(norm, "y")
    balance.set_ylim(bottom=0)
    if has_experts:
        balance.axhline(1, color="black", lw=0.8, ls="--")  # perfect balance
    if has_drops:
        _draw_drops(balance.twinx(), balance, runs)


def _draw_loss(axis: Any, runs: list[Run]) -> None:
    by_tokens = all(run.has_tokens for run in runs)
    for run, colour in zip(runs, COLOURS * len(runs)):
        x_of = {r["iteration"]: r["consumed_tokens"] if by_tokens else r["iteration"] for r in run.train}
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        axis.plot(list(x_of.values()), _column(run.train, "lm_loss"), color=colour, lw=1.2, alpha=0.8, label=f"{prefix}training")
        for split, marker in zip(dict.fromkeys(r["split"] for r in run.evals), "oD^s"):
            records = [r for r in run.evals if r["split"] == split]
            # the evaluation before the first step has no place on a logarithmic axis: it stands where training begins
            x = [max(_interpolated(x_of, r["iteration"]), min(x_of.values())) for r in records]
            face = colour if len(runs) > 1 else "black"
            axis.plot(x, _column(records, "lm_loss"), marker, color=face, ms=6, mec="white", zorder=3, label=f"{prefix}{split}")
    axis.set(title="Language-model loss", xlabel="tokens (log scale)" if by_tokens else "iteration (log scale)", ylabel="nats / token")
    _log_axis(axis, "x")
    axis.legend(loc="upper right", fontsize=9)


def _log_axis(axis: Any, which: str) -> None:
    """Logarithmic with ticks at 1, 2, 5 x 10^n, written 200 k, 5 M, 0.5."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ticks.set_minor_formatter(NullFormatter())
    ticks.set_major_formatter(EngFormatter() if which == "x" else FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_drops(axis: Any, below: Any, runs: list[Run]) -> None:
    """Dropped tokens on the right-hand scale of the balance panel."""
    for run, colour in zip(runs, COLOURS * len(runs)):
        if not run.moe_layers:
            continue
        share = [100 * (_worst(r, "dropped_fraction") or 0) for r in run.train]
        axis.plot([r["iteration"] for r in run.train], share, color=colour, ls=":", label=f"{run.name}: dropped")
    axis.set_ylabel("dropped tokens of the worst layer (%)")
    axis.set_ylim(bottom=0)
    axis.spines["right"].set_visible(True)
    axis.grid(False)
    below.set_title("Busiest expert (line) and dropped tokens (dotted), worst MoE layer")
    lines = [line for line in below.get_lines() + axis.get_lines() if not line.get_label().startswith("_")]
    below.legend(lines, [line.get_label() for line in lines], loc="upper right", fontsize=9)


def _draw_layers(figure: Any, runs: list[Run]) -> None:
    """Layer over iteration: the busiest expert, what was dropped, how decided the router is; and where an alert was given."""
    kinds = (
        ("load_max_over_mean", "busiest expert: load / mean", "Reds", 1.0, 1.0),
        ("dropped_fraction", "dropped assignments (%)", "Purples", 0.0, 100.0),
        ("router_entropy", "router entropy (1: undecided)", "viridis", 0.0, 1.0),
    )
    axes = figure.subplots(len(runs), len(kinds), squeeze=False)
    for row, run in zip(axes, runs):
        layers, iterations = run.moe_layers, [r["iteration"] for r in run.train if r.get("moe")]
        for axis, (key, title, colours, least, scale) in zip(row, kinds):
            values = [[_of_layer(r, layer, key) * scale for r in run.train if r.get("moe")] for layer in layers]
            most = max((v for by_time in values for v in by_time if v == v), default=1.0)
            most = min(max(most, least + 1.0), 8.0) if key == "load_max_over_mean" else 1.0 if key == "router_entropy" else max(most, 1.0)
            borders = [i - 0.5 for i in range(len(layers) + 1)]
            mesh = axis.pcolormesh(_edges(iterations), borders, values, cmap=colours, vmin=least, vmax=most)
            step = -(-len(layers) // 12)
            axis.set(xlabel="iteration", ylabel="layer", title=(f"{run.name}, " if len(runs) > 1 else "") + title)
            axis.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
            axis.invert_yaxis()
            axis.grid(False)
            figure.colorbar(mesh, ax=axis, extend="max" if most == 8.0 else "neither", pad=0.01)
        _draw_alerts(row[0], run)
    figure.suptitle("All MoE layers" + (" (crosses: alerts)" if any(run.alerts for run in runs) else ""), fontsize=12)


def _draw_alerts(axis: Any, run: Run) -> None:
    places: dict[tuple[int, int], list[str]] = {}
    for alert in run.alerts:
        for layer in set(alert["layers"]) & set(run.moe_layers):
            places.setdefault((alert["iteration"], run.moe_layers.index(layer)), []).append(alert["condition"])
    middle = sum(axis.get_xlim()) / 2
    for (x, y), conditions in places.items():
        axis.plot(x, y, "x", color="black", ms=6)
        offset, side = ((6, 0), "left") if x < middle else ((-6, 0), "right")
        axis.annotate(", ".join(conditions), (x, y), offset, textcoords="offset points", fontsize=8, ha=side, va="center",
                      bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "lw": 0})  # fmt: skip


def _draw_heat_maps(figure: Any, runs: list[Run], rows: int, columns: int) -> None:
    """One map per MoE layer, all on one colour scale of powers of two, on which twice and half the mean are equally far from it."""
    axes = figure.subplots(rows, columns, squeeze=False)
    free = iter(axes.flat)
    mesh = None
    for run in runs:  # each starts a new row
        for layer in run.layers:
            mesh = _draw_heat_map(next(free), _loads(run, layer))
            mesh.axes.set_title((f"{run.name}, " if len(runs) > 1 else "") + f"layer {layer}")
        for _ in range(-len(run.layers) % columns):
            next(free).set_axis_off()
    figure.suptitle("Load of each expert over the mean load (white is balanced, black an expert without a token)", fontsize=12)
    bar = figure.colorbar(mesh, ax=axes, label="load / mean", extend="both", fraction=0.02, pad=0.01, aspect=25)
    bar.set_ticks(range(-MOST_DOUBLINGS, MOST_DOUBLINGS + 1), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])


def _draw_heat_map(axis: Any, loads: list[tuple[int, list[float]]]) -> Any:
    import matplotlib

    iterations, by_time = zip(*loads)
    num_experts = len(by_time[0])
    borders = [e - 0.5 for e in range(num_experts + 1)]
    doublings = [[math.log2(load) if load > 0 else math.nan for load in expert] for expert in zip(*by_time)]
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="black")
    mesh = axis.pcolormesh(_edges(list(iterations)), borders, doublings, vmin=-MOST_DOUBLINGS, vmax=MOST_DOUBLINGS, cmap=colours)
    step = -(-num_experts // 8)
    axis.set(xlabel="iteration", ylabel="expert", yticks=range(0, num_experts, step), facecolor="black")  # NaN cells are see-through
    axis.invert_yaxis()
    axis.grid(False)
    return mesh


# ---------------------------------------------------------------- numbers


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    """NaN where a value was not finite (null) or is missing: a gap in the curve."""
    return [float("nan") if r.get(key) is None else r[key] for r in records]


def _worst(record: dict[str, Any], key: str) -> float | None:
    return max((m[key] for m in record.get("moe") or () if m.get(key) is not None), default=None)


def _of_layer(record: dict[str, Any], layer: int, key: str) -> float:
    """NaN where it is missing or was not finite: a gap in the map."""
    value = next((m.get(key) for m in record["moe"] if m["layer"] == layer), None)
    return math.nan if value is None else value


def _loads(run: Run, layer: int) -> list[tuple[int, list[float]]]:
    """(iteration, load / mean of each expert) of one layer over time."""
    found = [(r["iteration"], m["expert_load"]) for r in run.train for m in r.get("moe") or () if m["layer"] == layer]
    found = [(i, shares) for i, shares in found if shares]
    num_experts = len(found[-1][1])
    return [(i, [(s or 0.0) * num_experts for s in shares]) for i, shares in found if len(shares) == num_experts]


def _edges(centres: list[int]) -> list[float]:
    """Cell borders half way between neighbours: (10, 20, 40) -> (5, 15, 30, 50)."""
    if len(centres) == 1:
        return [centres[0] - 0.5, centres[0] + 0.5]
    inner = [(a + b) / 2 for a, b in pairwise(centres)]
    return [centres[0] - (inner[0] - centres[0]), *inner, centres[-1] + (centres[-1] - inner[-1])]


def _interpolated(x_of: dict[int, float], iteration: int) -> float:
    """Tokens at an iteration that may lie between two logged ones; evaluations know their iteration only."""
    before = max((i for i in x_of if i <= iteration), default=None)
    after = min((i for i in x_of if i >= iteration), default=None)
    if before is None or after is None:
        near = before if after is None else after
        return x_of[near] * iteration / near
    if before == after:
        return x_of[before]
    return x_of[before] + (x_of[after] - x_of[before]) * (iteration - before) / (after - before)


if __name__ == "__main__":
    raise SystemExit(main())
