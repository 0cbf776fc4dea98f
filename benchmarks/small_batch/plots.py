"""The images of the study: AP over mini-batch, AP over training images, statistics gaps over layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.small_batch.grid import stand_in
from benchmarks.small_batch.report import BySeed, Line, Results

Scene = tuple[str, str, bool]
_DOTS_PER_INCH = 120

# By the beginning of the recipe's base, the longest that fits; what is added shows in the line.
_COLOURS = {
    "bn": "#222222",
    "bn-pooled": "#8a8a8a",
    "cmbn-weights": "#1f6fd6",
    "cmbn-carry": "#d6281f",
    "cmbn-share": "#7db4f0",
    "cmbn-renorm": "#12a3a3",
    "cmbn-darknet": "#9a6b3f",
    "cbn": "#2f9e44",
    "cbn-taylor": "#8fce5a",
    "cbn-none": "#b8b800",
    "cbn-std-weights": "#0b6b3a",
    "cbn-lite": "#5fd3a6",
    "mabn": "#8e44ad",
    "brn": "#e05fa8",
    "gn": "#e8590c",
}
_LINES = {"freeze": "--", "precise": ":", "burn": "-."}


def _style(recipe: str) -> dict[str, Any]:
    """Colour: the base. Dashed: frozen late; dotted: exact statistics in the end; dash-dotted: a burn-in. Hollow:
    centralized weights."""
    base, *added = recipe.split("+")
    colour = _COLOURS[max((name for name in _COLOURS if base.startswith(name)), key=len)]
    return {
        "color": colour,
        "linestyle": next((style for name, style in _LINES.items() if name in added), "-"),
        "marker": "s" if "wc" in added else "o",
        "markerfacecolor": "white" if "wc" in added else colour,
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def plot_mini_batches(lines: Sequence[Line], path: Path) -> None:
    """AP on the test split over the mini-batch, a panel a data set, bands of 95 %."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        panels.setdefault(_title((line.data, line.net, line.mosaic)), []).append(line)
    figure, axes = _figure(len(panels), height_inches=4.6)
    for axis, (title, inside) in zip(axes, panels.items(), strict=True):
        for recipe in dict.fromkeys(line.recipe for line in inside):
            mine = [line for line in inside if line.recipe == stand_in(recipe, line.mini_batch)]
            mine.sort(key=lambda line: line.mini_batch)
            sizes = [line.mini_batch for line in mine]
            style = _style(recipe)
            axis.plot(sizes, [100 * line.ap.value for line in mine], label=recipe, **style)
            low, high = ([100 * getattr(line.ap, side) for line in mine] for side in ("low", "high"))
            axis.fill_between(sizes, low, high, color=style["color"], alpha=0.1, linewidth=0)
        axis.set_xscale("log", base=2)
        ticks = sorted({line.mini_batch for line in inside})
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        _label(axis, title, "images in a mini-batch (batch 16)", "AP on test, %")
    _legend(figure, axes)
    _save(figure, path)


def plot_images(results: Results, shown: set[str], path: Path) -> None:
    """AP on val over training images, mean of seeds: a row a data set, a panel a mini-batch."""
    _grid(results, shown, path, _draw_curves, "training images", "AP on val, %")


def plot_gaps(results: Results, shown: set[str], path: Path) -> None:
    """Statistics that the norm trained with against the running ones, over layers: a panel a mini-batch."""
    _grid(results, shown, path, _draw_gaps, "number of the normalized layer", "rms of sigma_b / sigma - 1, %")


def _draw_curves(axis: Axes, rows: BySeed, recipe: str) -> None:
    curves = [row["curve"] for row in rows.values() if row.get("curve")]
    if not curves or any(len(curve) != len(curves[0]) for curve in curves):
        return
    images = [point[0] for point in curves[0]]
    means = 100 * np.mean([[point[1] for point in curve] for curve in curves], axis=0)
    axis.plot(images, means, label=recipe, **_style(recipe))


def _draw_gaps(axis: Axes, rows: BySeed, recipe: str) -> None:
    """Frozen norms and those without batch statistics have no line: they are tested as they were trained."""
    mine = [row for row in rows.values() if row.get("gap") and row.get("statistics_of")]
    if not mine:
        return
    sizes = [int(size) for size in mine[0]["gap"] if int(size) <= mine[0]["statistics_of"]]
    values = 100 * np.mean([row["gap"][str(max(sizes))] for row in mine], axis=0)
    axis.plot(range(1, len(values) + 1), values, label=recipe, **_style(recipe))


def _grid(
    results: Results,
    shown: set[str],
    path: Path,
    draw: Callable[[Axes, BySeed, str], None],
    xlabel: str,
    ylabel: str,
) -> None:
    rows = [(scene, results.mini_batches(scene)) for scene in results.scenes()]
    columns = max(len(sizes) for _, sizes in rows)
    figure, axes = _figure(len(rows) * columns, columns=columns, height_inches=3.5)
    for place, (scene, sizes) in enumerate(rows):
        mine = axes[place * columns : (place + 1) * columns]
        for axis, mini_batch in zip(mine, sizes, strict=False):
            for recipe in results.recipes(scene):
                if recipe in shown and recipe == stand_in(recipe, mini_batch):
                    draw(axis, results.at(scene, mini_batch, recipe), recipe)
            _label(axis, f"{_title(scene)}: mini-batch {mini_batch}", xlabel, ylabel if axis is mine[0] else "")
        highest = max(axis.get_ylim()[1] for axis in mine[: len(sizes)])
        for axis in mine:
            axis.set_ylim(0, highest)
            axis.set_visible(axis in mine[: len(sizes)])
    _legend(figure, axes)
    _save(figure, path)


def _title(scene: Scene) -> str:
    data, net, mosaic = scene
    name = data.replace("digits-", "digits, shift ")
    return name + ("" if net == "small" else f", {net} net") + (", mosaic" if mosaic else "")


def _figure(panels: int, *, columns: int | None = None, height_inches: float) -> tuple[Figure, list[Axes]]:
    """No pyplot, so no window and no global state."""
    columns = columns or min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns + 1.6, height_inches * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]


def _label(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=10)
    axis.grid(color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, beside them."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, bbox_inches="tight")
