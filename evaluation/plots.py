"""Plots: precision-recall curves, a confusion matrix, gaps of norm statistics, the curves of a run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from evaluation.coco_map import CocoTable
from utils.draw import class_colour
from utils.errors import UserError
from utils.figure import label_axes, literal

_DOTS_PER_INCH = 120
_LEGEND_CLASSES = 10  # more colours could not be told apart
_PANELS = (  # columns of results.csv that share a unit share a panel; every other column has its own
    ("loss", ("loss", "box", "objectness", "class")),
    ("average precision", ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")),
    ("average recall", ("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L")),
    ("learning rate", ("lr",)),
)


def plot_pr_curves(table: CocoTable, class_names: Sequence[str], path: str | Path) -> None:
    """Plot precision over recall at IoU 0.5: the mean in bold, and each class that has boxes.

    class_names: in the order of the table's classes. Of more than ten, the best and the worst five are named.
    """
    assert len(class_names) == len(table.classes), "a name for each class of the table"
    figure, axes = _figure(1, width_inches=7.5, height_inches=5.0)
    recall = np.linspace(0, 1, len(table.precision))
    shown = [column for column, row in enumerate(table.classes) if row.boxes]
    shown.sort(key=lambda column: -table.classes[column].AP50)
    named = shown
    if len(shown) > _LEGEND_CLASSES:
        named = shown[: _LEGEND_CLASSES // 2] + shown[-_LEGEND_CLASSES // 2 :]
    for column in shown:
        label = f"{literal(class_names[column])}  {table.classes[column].AP50:.3f}" if column in named else None
        colour = _unit_colour(column if named is shown else named.index(column)) if label else "0.85"
        order = 2 if label else 1
        axes[0].plot(recall, table.precision[:, column], color=colour, label=label, zorder=order)
    if shown:
        mean = table.precision[:, shown].mean(axis=1)
        axes[0].plot(recall, mean, color="black", linewidth=2.5, label=f"mean  {table.AP50:.3f}", zorder=3)
        axes[0].legend(title="AP at IoU 0.5", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    label_axes(axes[0], "precision and recall at IoU 0.5", "recall", "precision")
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02))
    _save(figure, path)


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Plot `confusion_matrix`'s counts, each true class (column) as fractions of its objects.

    The background column has the fractions of all detections on background. With few classes, cells show fraction
    and count.
    """
    classes = len(class_names)
    assert matrix.shape == (classes + 1, classes + 1), "a name for each class, and the background"
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
    panels: Mapping[str, np.ndarray], layer_names: Sequence[str], column_names: Sequence[str], path: str | Path
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


def plot_results(csv_path: str | Path, png_path: str | Path) -> None:
    """Plot the columns of a run's `results.csv` over its `step` column (or its rows), one panel for each unit.

    Columns may be missing, and cells empty. Raises UserError if the file is missing or holds no numbers.
    """
    columns = _read_columns(Path(csv_path))
    steps = columns.pop("step", None)
    columns.pop("epoch", None)
    panels = [(title, [name for name in names if name in columns]) for title, names in _PANELS]
    in_panels = {name for _, names in panels for name in names}
    panels = [panel for panel in panels if panel[1]]
    panels += [(name, [name]) for name in columns if name not in in_panels]
    if not panels:
        raise UserError(f"{csv_path}: no row holds a number to plot")

    figure, axes = _figure(len(panels), width_inches=5.0, height_inches=3.4)
    for axis, (title, names) in zip(axes, panels, strict=True):
        for position, name in enumerate(names):
            values = columns[name]
            places = np.arange(len(values), dtype=float) if steps is None else steps
            known = ~np.isnan(values) & ~np.isnan(places)
            order = np.argsort(places[known], kind="stable")  # a resumed run may have written a step twice
            curve = places[known][order], values[known][order]
            _draw_curve(axis, *curve, f"C{position}", name, noisy=title == "loss")
        if title == "loss":
            _choose_scale(axis)
        label_axes(axis, title, "row" if steps is None else "step", "")
        if len(names) > 1:
            axis.legend(frameon=False)
    _save(figure, png_path)


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


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """Return the columns with at least one finite number; every other cell is NaN."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    names = [name for name in (rows[0] if rows else ()) if name]
    columns = {name.strip(): np.array([_number(row[name]) for row in rows]) for name in names}
    return {name: values for name, values in columns.items() if not np.isnan(values).all()}


def _number(cell: str | None) -> float:
    try:
        value = float(cell or "nan")
    except ValueError:
        return np.nan
    return value if np.isfinite(value) else np.nan


def _figure(panels: int, *, width_inches: float, height_inches: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of `panels` axes in at most three columns; without pyplot: no window and no global state."""
    columns = min(panels, 3 if panels != 4 else 2)
    rows = -(-panels // columns)
    size = (width_inches * columns, height_inches * rows)
    figure = Figure(figsize=size, layout="constrained" if panels > 1 else None)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]


def _unit_colour(label: int) -> tuple[float, float, float]:
    red, green, blue = class_colour(label)
    return red / 255, green / 255, blue / 255


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Either makes room for all labels. Only the constrained layout makes room between panels.
    bbox = "tight" if figure.get_layout_engine() is None else None
    figure.savefig(path, dpi=_DOTS_PER_INCH, bbox_inches=bbox)
