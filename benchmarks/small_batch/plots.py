"""The study's plots: AP over mini-batch, AP over training images, statistics gaps over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.small_batch.grid import stand_in
from benchmarks.small_batch.report import BySeed, Line, Results

Scene = tuple[str, str, bool]
Style = dict[str, Any]
_DOTS_PER_INCH = 120

_COLOURS = (
    *("#222222", "#1f6fd6", "#0b6b3a", "#d6281f", "#7db4f0", "#12a3a3", "#9a6b3f", "#2f9e44", "#8fce5a", "#8e44ad"),
    *("#e8590c", "#e05fa8", "#b8b800", "#8a8a8a", "#5fd3a6"),
)
_LINES = {"--norm-freeze-after": "--", "--precise-bn": ":"}


def styles_of(recipes: Iterable[str]) -> dict[str, Style]:
    """Return matplotlib's arguments by recipe.

    Colour: the norm with its options. Dashed: frozen late; dotted: exact statistics in the end. Hollow: centralized
    weights.
    """
    styles: dict[str, Style] = {}
    colours: dict[str, str] = {}
    for recipe in recipes:
        norm, *flags = recipe.split()
        colour = colours.setdefault(norm, _COLOURS[len(colours) % len(_COLOURS)])
        is_centralized = "--weight-centralization" in flags
        styles[recipe] = {
            "color": colour,
            "linestyle": next((style for flag, style in _LINES.items() if flag in flags), "-"),
            "marker": "s" if is_centralized else "o",
            "markerfacecolor": "white" if is_centralized else colour,
            "markersize": 4.5,
            "linewidth": 1.6,
        }
    return styles


def plot_mini_batches(lines: Sequence[Line], styles: Mapping[str, Style], path: Path) -> None:
    """Plot AP on the test split over the mini-batch: a panel per data set, bands of 95 %. styles: by recipe to show."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        if line.recipe in styles:
            panels.setdefault(_title((line.data, line.net, line.mosaic)), []).append(line)
    figure, axes = _figure(len(panels), height_inches=4.6)
    for axis, (title, inside) in zip(axes, panels.items(), strict=True):
        for recipe in dict.fromkeys(line.recipe for line in inside):
            mine = [line for line in inside if line.recipe == stand_in(recipe, line.mini_batch)]
            mine.sort(key=lambda line: line.mini_batch)
            sizes = [line.mini_batch for line in mine]
            style = styles[recipe]
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


def plot_images(results: Results, styles: Mapping[str, Style], path: Path) -> None:
    """Plot AP on val over training images, mean of seeds: a row per data set, a panel per mini-batch."""
    _grid(results, styles, path, _draw_curves, "training images", "AP on val, %")


def plot_gaps(results: Results, styles: Mapping[str, Style], path: Path) -> None:
    """Plot how far the statistics in training are from the running ones, over layers: a panel per mini-batch."""
    _grid(results, styles, path, _draw_gaps, "number of the normalized layer", "rms of sigma_b / sigma - 1, %")


def _draw_curves(axis: Axes, rows: BySeed, recipe: str, style: Style) -> None:
    curves = [row["curve"] for row in rows.values() if row.get("curve")]
    if not curves or any(len(curve) != len(curves[0]) for curve in curves):
        return
    images = [point[0] for point in curves[0]]
    means = 100 * np.mean([[point[1] for point in curve] for curve in curves], axis=0)
    axis.plot(images, means, label=recipe, **style)


def _draw_gaps(axis: Axes, rows: BySeed, recipe: str, style: Style) -> None:
    """Draw a line, but for frozen norms and those without batch statistics, which are tested as they were trained."""
    mine = [row for row in rows.values() if row.get("gap") and row.get("statistics_of")]
    if not mine:
        return
    sizes = [int(size) for size in mine[0]["gap"] if int(size) <= mine[0]["statistics_of"]]
    values = 100 * np.mean([row["gap"][str(max(sizes))] for row in mine], axis=0)
    axis.plot(range(1, len(values) + 1), values, label=recipe, **style)


def _grid(
    results: Results,
    styles: Mapping[str, Style],
    path: Path,
    draw: Callable[[Axes, BySeed, str, Style], None],
    xlabel: str,
    ylabel: str,
) -> None:
    rows = [(scene, results.mini_batches(scene)) for scene in results.scenes()]
    columns = max(len(sizes) for _, sizes in rows)
    figure, axes = _figure(len(rows) * columns, columns=columns, height_inches=3.5)
    for index, (scene, sizes) in enumerate(rows):
        mine = axes[index * columns : (index + 1) * columns]
        for axis, mini_batch in zip(mine, sizes, strict=False):
            for recipe in results.recipes(scene):
                if recipe in styles and recipe == stand_in(recipe, mini_batch):
                    draw(axis, results.at(scene, mini_batch, recipe), recipe, styles[recipe])
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
    """Return a figure with its axes; without pyplot, so without a window or global state."""
    columns = columns or min(panels, 3)
    rows = -(-panels // columns)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = Figure(figsize=(4.6 * columns + 1.6, height_inches * rows), layout=layout)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]


def _label(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=10)
    axis.grid(color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Add one legend for all panels, beside them."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, bbox_inches="tight")
