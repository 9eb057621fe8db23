"""The report's figures, each with its main numbers in words and all of them in a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .drawing import AFTER, BEFORE, GATE, LEVELS, Figure, as_svg, draw_gate, new_axes, styled
from .folder import is_number
from .words import percent

_BINS = 36
_MOST = 1e15  # a score beyond is no score, and cannot be drawn beside others
_TAIL = 0.005  # of the values at either end may lie outside what is drawn


@styled
def histogram(
    name: str,
    title: str,
    unit: str,
    before: np.ndarray,
    after: np.ndarray,
    labels: tuple[str, str],
    gate: float | None = None,
    logarithmic: bool = False,
) -> Figure | None:
    """Two distributions over each other, as shares of their rows; None where there is nothing to draw.

    before, after: one value a row, (rows,). NaN and infinite ones are counted in words, and not drawn.
    """
    sides = {"before": before, "after": after}
    drawn = {side: values[_drawable(values) & ((values > 0) | (not logarithmic))] for side, values in sides.items()}
    every = np.concatenate(list(drawn.values()))
    if not len(every):
        return None
    edges = _edges(drawn, gate, logarithmic)
    counts = {side: np.histogram(values, edges)[0] for side, values in drawn.items()}
    words = " ".join(
        _summary(label, values, drawn[side], counts[side], gate, logarithmic)
        for (side, values), label in zip(sides.items(), labels, strict=True)
        if len(values)
    )
    figure, axes = new_axes()
    for side, label in zip(sides, labels, strict=True):
        share = 100 * counts[side] / max(len(drawn[side]), 1)
        style: dict[str, Any] = {"fill": True, "color": BEFORE, "alpha": 0.55, "linewidth": 0}
        if side == "after":
            style = {"fill": False, "edgecolor": AFTER, "linewidth": 1.8}
        if len(drawn[side]):
            axes.stairs(share, edges, label=f"{label}: {len(drawn[side]):,}", **style)
    axes.set_xlabel(unit)
    axes.set_ylabel("% of rows")
    axes.set_xscale("log" if logarithmic else "linear")
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] / edges[0] < 300 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    if gate is not None and edges[0] <= gate <= edges[-1]:
        draw_gate(axes, gate, "x")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderpad=0, handlelength=1.3, columnspacing=1.2
    )
    digits = 0 if logarithmic else 3
    rows = [
        [f"{low:,.{digits}f} to {high:,.{digits}f}", int(old), int(new)]
        for low, high, old, new in zip(edges[:-1], edges[1:], counts["before"], counts["after"], strict=True)
        if old or new
    ]
    return Figure(name, title, words, as_svg(figure, name, f"{title}. {words}"), (unit, *labels), rows)


@styled
def density(
    name: str,
    titles: tuple[str, str],
    sides: Mapping[str, tuple[np.ndarray, np.ndarray]],
    gates: tuple[float | None, float | None],
) -> list[Figure]:
    """IFD against r-IFD of all rows, one figure a side ("before", "after"), in the same shades, on the same axes."""
    drawn = {}
    for side, pair in sides.items():
        finite = _drawable(pair[0]) & _drawable(pair[1])
        drawn[side] = (pair[0][finite], pair[1][finite])
    if not any(len(pair[0]) for pair in drawn.values()):
        return []
    ends = [_edges({s: p[n] for s, p in drawn.items()}, gates[n], False)[[0, -1]] for n in (0, 1)]
    figures: list[tuple[str, str, Any, Any, int, int]] = []
    for (side, (x, y)), title in zip(drawn.items(), titles, strict=True):
        inside = (x >= ends[0][0]) & (x <= ends[0][1]) & (y >= ends[1][0]) & (y <= ends[1][1])
        figure, axes = new_axes(grid=False)
        cells = axes.hexbin(
            x[inside], y[inside], gridsize=(34, 12), extent=(*ends[0], *ends[1]), mincnt=1, linewidths=0.2
        )
        axes.set(xlim=ends[0], ylim=ends[1], xlabel="IFD", ylabel="r-IFD")
        for value, axis, (low, high) in zip(gates, "xy", ends, strict=True):
            if value is not None and low <= value <= high:
                draw_gate(axes, value, axis)
        figures.append((side, title, figure, cells, len(x), int(inside.sum())))
    bounds = _bounds(max((int(cells.get_array().max()) for *_, cells, _, n in figures if n), default=1))
    from matplotlib.colors import BoundaryNorm, ListedColormap

    levels = [f"{a:,}" if a == b - 1 else f"{a:,} to {b - 1:,}" for a, b in zip(bounds, bounds[1:], strict=False)]
    found = []
    for side, title, figure, cells, count, inside in figures:
        if not len(sides[side][0]):  # nothing was kept
            continue
        # the strongest shades, so that few rows show as well
        cells.set_cmap(ListedColormap(LEVELS[-len(levels) :]))
        cells.set_norm(BoundaryNorm(bounds, len(levels)) if len(levels) > 1 else None)
        cells.set_edgecolor("face")
        rows = _quadrants(*drawn[side], gates)
        missing = len(sides[side][0]) - count
        words = f"{count:,} rows; {rows[0][1]:,} ({percent(rows[0][1], count)}) are {rows[0][0]}."
        words += f" {missing:,} without both scores, or with an infinite one, are not drawn." if missing else ""
        words += f" {count - inside:,} lie outside what is drawn." if count > inside else ""
        key = f"{name}-{side}"
        svg = as_svg(figure, key, f"{title}. {words}")
        found.append(Figure(key, title, words, svg, ("Where", "Rows"), rows, levels))
    return found


@styled
def curve(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The loss over the steps of a training, as the Trainer logged it."""
    lines = {}
    for key in ("loss", "eval_loss"):
        points = [(entry["step"], entry[key]) for entry in history if is_number(entry.get(key))]
        if points:
            lines[key] = points
    if not lines:
        return None
    figure, axes = new_axes()
    words = []
    for key, points in lines.items():
        label = "training loss" if key == "loss" else "evaluation loss"
        style: dict[str, Any] = {
            "color": AFTER,
            "linewidth": 1.8,
            "marker": "o" if len(points) < 30 else "",
            "markersize": 3,
        }
        if key == "eval_loss":
            style = {"color": GATE, "linewidth": 1.4, "linestyle": "--", "marker": "s", "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=label, **style)
        (first, start), (last, end) = points[0], points[-1]
        words.append(f"The {label} went from {start:.3f} (step {first:,}) to {end:.3f} (step {last:,}).")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderpad=0, handlelength=1.8)
    steps = sorted({step for points in lines.values() for step, _ in points})
    if len(steps) > 200:
        steps = [steps[n] for n in np.linspace(0, len(steps) - 1, 200).round().astype(int)]
        words.append("The table has 200 of the logged steps.")
    by_step = {key: dict(points) for key, points in lines.items()}
    rows = [[step, *(_cell(by_step[key].get(step)) for key in lines)] for step in steps]
    said = " ".join(words)
    return Figure("loss", "Loss", said, as_svg(figure, "loss", f"Loss over the steps. {said}"), ("step", *lines), rows)


def _drawable(values: np.ndarray) -> np.ndarray:
    return np.abs(values) <= _MOST


def _edges(drawn: Mapping[str, np.ndarray], gate: float | None, logarithmic: bool) -> np.ndarray:
    """Of the bars: without the long tails of either side, with the gate unless it is far away."""
    some = [values for values in drawn.values() if len(values)]
    low = min(np.quantile(values, _TAIL, method="lower") for values in some)
    high = max(np.quantile(values, 1 - _TAIL, method="higher") for values in some)
    if gate is not None and low - (high - low) <= gate <= high + (high - low):
        low, high = min(low, gate), max(high, gate)
    if logarithmic:
        return np.geomspace(max(low, 1) * 0.98, max(high, low * 1.1, 2) * 1.02, _BINS + 1)
    room = 0.02 * (high - low) or 0.05 * max(abs(high), 1)
    low, high = low - room, high + room
    if gate is None or not low < gate < high:
        return np.linspace(low, high, _BINS + 1)
    step = (high - low) / _BINS  # the gate is where one bar ends and the next begins
    return gate + step * np.arange(np.floor((low - gate) / step), np.ceil((high - gate) / step) + 1)


def _summary(
    label: str, values: np.ndarray, drawn: np.ndarray, counts: np.ndarray, gate: float | None, logarithmic: bool
) -> str:
    digits = 0 if logarithmic else 3
    label = label.capitalize()
    words = f"{label}: no finite value"
    if len(some := values[_drawable(values)]):  # as in the statistics, empty texts count
        words = f"{label}: mean {some.mean():,.{digits}f}, median {np.median(some):,.{digits}f}"
    if gate is not None and len(drawn):
        below = int((drawn < gate).sum())
        words += f", {percent(below, len(drawn))} below the gate {gate:g}"
    absent, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    vast = len(values) - absent - infinite - int(_drawable(values).sum())
    zero = int((values == 0).sum()) if logarithmic else 0
    outside = len(drawn) - int(counts.sum())
    more = (
        f"{n:,} {what}"
        for n, what in (
            (absent, "without a value"),
            (infinite, "infinite"),
            (vast, f"beyond {_MOST:g}"),
            (zero, "empty, not drawn"),
        )
        if n
    )
    notes = [*more, *([f"{outside:,} outside what is drawn"] if outside else [])]
    return words + (f" ({', '.join(notes)})." if notes else ".")


def _bounds(most: int) -> list[int]:
    """Where the shades of a density change: about evenly on a logarithmic scale, at most six."""
    ends = np.unique(np.geomspace(1, most + 1, len(LEVELS) + 1).round().astype(int))
    return [int(end) for end in ends] if len(ends) > 1 else [1, 2]


def _quadrants(x: np.ndarray, y: np.ndarray, gates: tuple[float | None, float | None]) -> list[list[Any]]:
    """How many lie on which side of the gates; where there is none, of 1."""
    at = [1.0 if gate is None else gate for gate in gates]
    names = [f"{'below' if low else 'not below'} {{}}" for low in (True, False)]
    rows = []
    for n, left in enumerate((x < at[0], ~(x < at[0]))):
        for m, below in enumerate((y < at[1], ~(y < at[1]))):
            where = f"{names[n].format(f'{at[0]:g}')} in IFD and {names[m].format(f'{at[1]:g}')} in r-IFD"
            if at[0] == at[1] and n == m:
                where = f"{names[n].format(f'{at[0]:g}')} in both"
            rows.append([where, int((left & below).sum())])
    return rows


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
