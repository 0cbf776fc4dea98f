"""Plots: precision-recall curves, a confusion matrix, gaps of norm statistics, the curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from evaluation.coco_map import CocoTable, per_cent
from utils.draw import class_colour
from utils.figure import label_axes, literal, save_figure

_DOTS_PER_INCH = 120
_LEGEND_CLASSES = 10  # more colours could not be told apart
_PANELS = {  # columns of results.csv that share a unit share a panel
    "loss": ("loss", "box", "objectness", "class"),
    "average precision": ("AP", "AP50"),
    "learning rate": ("lr",),
    "seconds of training per epoch": ("seconds",),
}


def plot_pr_curves(table: CocoTable, path: Path) -> None:
    """Plot precision over recall at IoU 0.5: the mean in bold, and each class that has boxes.

    Of more than ten classes, the best and the worst five are named.
    """
    figure, axes = _figure(1, width_inches=7.5, height_inches=5.0)
    recall = np.linspace(0, 1, len(table.precision))
    shown = [column for column, row in enumerate(table.classes) if row.boxes]
    shown.sort(key=lambda column: -table.classes[column].AP50)
    named = shown
    if len(shown) > _LEGEND_CLASSES:
        named = shown[: _LEGEND_CLASSES // 2] + shown[-_LEGEND_CLASSES // 2 :]
    for column in shown:
        row, is_named = table.classes[column], column in named
        colour = class_colour(named.index(column) if is_named and named is not shown else column)
        axes[0].plot(
            recall,
            table.precision[:, column],
            color=np.divide(colour, 255) if is_named else "0.85",
            label=f"{literal(row.name)}  {per_cent(row.AP50)}" if is_named else None,
            zorder=1 + is_named,
        )
    if shown:
        mean = table.precision[:, shown].mean(axis=1)
        axes[0].plot(recall, mean, color="black", linewidth=2.5, label=f"mean  {per_cent(table.AP50)}", zorder=3)
        axes[0].legend(title="AP at IoU 0.5", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    label_axes(axes[0], "precision and recall at IoU 0.5", "recall", "precision")
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02))
    _save(figure, path)


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Plot `confusion_matrix`'s counts, each true class (column) as fractions of its objects.

    The background column has the fractions of all detections on background. With few classes, cells show fraction
    and count.
    """
    classes = len(class_names)
    share = matrix / np.maximum(matrix.sum(axis=0, keepdims=True), 1)
    side = float(np.clip(3.2 + 0.55 * classes, 4.5, 14))
    figure, (axes,) = _figure(1, width_inches=side * 1.08, height_inches=side)
    shown = np.where(share > 0, share, np.nan)
    image = axes.pcolormesh(shown, cmap="Blues", vmin=0, vmax=1, edgecolors="0.92", linewidth=0.6)
    ticks = [*map(literal, class_names), "background"]
    size = float(np.clip(11 - classes / 12, 5, 10))
    middle = np.arange(classes + 1) + 0.5
    axes.set_xticks(middle, ticks, rotation=90 if classes > 8 else 0, fontsize=size)
    axes.set_yticks(middle, ticks, fontsize=size)
    axes.tick_params(length=0)
    axes.set(xlabel="true class", ylabel="predicted class", title="confusion, shares of each true class")
    axes.set(aspect="equal", ylim=(classes + 1, 0))
    if classes <= 20:
        _write_cells(axes, share, matrix, size)
    figure.colorbar(image, ax=axes, shrink=0.8, fraction=0.04)
    _save(figure, path)


def _write_cells(axes: Axes, share: np.ndarray, matrix: np.ndarray, size: float) -> None:
    for row, column in np.argwhere(matrix > 0):
        text = f"{share[row, column]:.2f}\n{matrix[row, column]}"
        ink = "white" if share[row, column] > 0.55 else "black"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=size - 1)


def plot_layer_gaps(
    panels: Mapping[str, np.ndarray], layer_names: Sequence[str], column_names: Sequence[str], path: Path
) -> None:
    """Plot a heat map for each panel: title -> (layers, columns), relative gaps. Colours saturate at 100 %."""
    rows, columns = len(layer_names), len(column_names)
    size = float(np.clip(11 - rows / 15, 6, 9))
    figure, axes = _figure(len(panels), width_inches=2.6 + 0.55 * columns, height_inches=1.6 + 0.028 * size * rows)
    for axis, (title, gaps) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(gaps, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(columns), column_names)
        axis.set_yticks(range(rows), [*map(literal, layer_names)] if axis is axes[0] else [""] * rows, fontsize=size)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("images in a mini-batch")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        for row, column in np.ndindex(*gaps.shape):
            ink = "white" if gaps[row, column] > 0.6 else "black"
            text = f"{100 * gaps[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=size - 1)
    axes[0].set_ylabel("layer, convolution, channels")
    figure.colorbar(image, ax=axes, shrink=0.6, fraction=0.03, format=PercentFormatter(1), extend="max")
    _save(figure, path)


def plot_results(csv_path: Path, png_path: Path) -> None:
    """Plot the columns of a run's `results.csv` over its steps, one panel for each unit; nothing if all are empty.

    Raises OSError if the file is missing.
    """
    rows = np.genfromtxt(csv_path, delimiter=",", names=True, ndmin=1)  # an empty cell is NaN
    panels = {title: [name for name in names if np.isfinite(rows[name]).any()] for title, names in _PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure, axes = _figure(len(panels), width_inches=5.0, height_inches=3.4)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for position, name in enumerate(names):
            known = np.isfinite(rows[name])
            _draw_curve(axis, rows["step"][known], rows[name][known], f"C{position}", name, noisy=title == "loss")
        if title == "loss":
            _choose_scale(axis)
        label_axes(axis, title, "step", "")
        if len(names) > 1:
            axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)  # beside the curves
    _save(figure, png_path)


def plot_range_test(rates: np.ndarray, losses: np.ndarray, curve: np.ndarray, chosen: float, path: Path) -> None:
    """Plot the (N,) losses over the learning rates, of each step and smoothed as `curve`, and mark the chosen rate."""
    figure, (axes,) = _figure(1, width_inches=6.0, height_inches=4.0)
    axes.plot(rates, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(rates, curve, color="C0")
    _choose_scale(axes)
    axes.axvline(chosen, color="C1", linestyle="--", label=f"chosen: {chosen:g}")
    axes.set_xscale("log")
    axes.legend(frameon=False)
    label_axes(axes, "learning-rate range test", "learning rate", "loss / (1 + objects in an image)")
    _save(figure, path)


def _draw_curve(axis: Axes, places: np.ndarray, values: np.ndarray, colour: str, name: str, *, noisy: bool) -> None:
    """Draw a line, with markers if it has few points; a long noisy one pale beneath its running mean."""
    window = len(values) // 50
    if not noisy or window < 3:
        marker = "o" if len(values) <= 40 else ""
        axis.plot(places, values, color=colour, label=name, marker=marker, markersize=3)
        return
    axis.plot(places, values, color=colour, alpha=0.25, linewidth=0.8)
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    axis.plot(places, (sums[stop] - sums[start]) / (stop - start), color=colour, label=name)


def _choose_scale(axis: Axes) -> None:
    """Make the axis logarithmic if values are positive and span more than a factor of 20: early losses are huge."""
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()])
    if shown.size and shown.min() > 0 and shown.max() > 20 * shown.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _figure(panels: int, *, width_inches: float, height_inches: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of `panels` axes in at most three columns; without pyplot: no window and no global state."""
    columns = min(panels, 3 if panels != 4 else 2)
    rows = -(-panels // columns)
    size = (width_inches * columns, height_inches * rows)
    figure = Figure(figsize=size, layout="constrained" if panels > 1 else None)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]


def _save(figure: Figure, path: Path) -> None:
    # Either makes room for all labels. Only the constrained layout makes room between panels.
    save_figure(figure, path, dpi=_DOTS_PER_INCH, bbox="tight" if figure.get_layout_engine() is None else None)
