"""Histograms of a data set's classes and boxes, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from data.box_sizes import relative_sides
from data.doctor.classes import all_class_names, class_counts
from data.doctor.report import COCO_LIMITS_PX
from data.image_set import ImageSet
from utils.figure import label_axes, literal, save_figure

_DOTS_PER_INCH = 110
_NAMED_CLASSES = 100  # more names would not be legible
_LETTERS = 18  # of a class name
_DOTS = 4000  # boxes in the scatter plot
_BINS = 40


def draw_charts(
    image_sets: Sequence[ImageSet],
    sides: Sequence[np.ndarray],
    path: Path,
    *,
    input_hw: tuple[int, int],
    anchors: np.ndarray,
) -> None:
    """Write the image. sides: (M, 2) from `input_sides`, for each set. anchors: (A, 2) in input pixels; A may be 0."""
    figure = Figure(figsize=(15, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    height, width = input_hw
    single = [own[~image_set.is_crowd] for image_set, own in zip(image_sets, sides, strict=True)]
    relative = [relative_sides(image_set)[~image_set.is_crowd] for image_set in image_sets]
    splits = [f"{image_set.split}: {len(own):,} boxes" for image_set, own in zip(image_sets, single, strict=True)]

    _draw_classes(figure.add_subplot(grid[0, :2]), image_sets)
    _draw_crowding(figure.add_subplot(grid[0, 2]), image_sets)
    axes = figure.add_subplot(grid[1, 0])
    _draw_shares(axes, relative, splits, np.linspace(0, 1, _BINS + 1))
    label_axes(axes, "box size relative to the image", "side of a square of its area / the image's", "share of boxes")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes = figure.add_subplot(grid[1, 1])
    _draw_input_sizes(axes, single, splits, longest_px=max(input_hw))
    label_axes(axes, f"box size at {height}x{width}", "side of a square of its area, px", "share of boxes")
    axes = figure.add_subplot(grid[1, 2])
    _draw_shapes(axes, single, anchors)
    label_axes(axes, f"boxes and anchors at {height}x{width}", "width, px", "height, px")
    axes.set(xlim=(0, width), ylim=(0, height))
    save_figure(figure, path, dpi=_DOTS_PER_INCH)


def _draw_classes(axes: Axes, image_sets: Sequence[ImageSet]) -> None:
    """Draw bars by class, the most frequent class of the first split first."""
    names = all_class_names(image_sets)
    counts = np.stack([class_counts(image_set, names) for image_set in image_sets])
    order = np.argsort(-counts[0], kind="stable")
    width = 0.84 / len(image_sets)
    for row, (image_set, count) in enumerate(zip(image_sets, counts, strict=True)):
        places = np.arange(len(names)) + (row - (len(image_sets) - 1) / 2) * width
        axes.bar(places, count[order], width, color=f"C{row}", label=image_set.split)
    if counts.max() > 50 * max(1, counts.min()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(names) <= _NAMED_CLASSES:
        many = len(names) > 12
        short = [name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…" for name in names]
        ticks = [literal(short[label]) for label in order]
        axes.set_xticks(range(len(names)), ticks, rotation=90 if many else 0, fontsize=6.5 if many else 9)
    axes.margins(x=0.01)
    label_axes(axes, f"objects of {len(names)} classes", "", "objects")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(image_sets), borderpad=0)


def _draw_crowding(axes: Axes, image_sets: Sequence[ImageSet]) -> None:
    counts = [np.bincount(image_set.owners[~image_set.is_crowd], minlength=len(image_set)) for image_set in image_sets]
    most = max(int(count.max()) for count in counts)
    step = most // _BINS + 1
    names = [f"{image_set.split}: {len(image_set):,} images" for image_set in image_sets]
    _draw_shares(axes, counts, names, np.arange(0, most + step + 1, step) - 0.5)
    label_axes(axes, "objects in an image", "objects", "share of images")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def _draw_input_sizes(axes: Axes, sides: Sequence[np.ndarray], names: Sequence[str], *, longest_px: int) -> None:
    small, large = COCO_LIMITS_PX
    values = [np.sqrt(own.prod(axis=1)) for own in sides]
    axes.set_xscale("log")
    _draw_shares(axes, values, names, np.geomspace(1, longest_px, _BINS + 1))
    for limit, name in ((small, "small"), (large, "medium")):
        axes.axvline(limit, color="0.6", linewidth=0.8, linestyle="--")
        text = axes.text(limit, 0.99, f"{name} < {limit} ", fontsize=8, color="0.4", rotation=90, ha="right", va="top")
        text.set_transform(axes.get_xaxis_transform())
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if tick <= longest_px]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_shapes(axes: Axes, sides: Sequence[np.ndarray], anchors: np.ndarray) -> None:
    for row, own in enumerate(sides):
        shown = own[:: -(-len(own) // _DOTS) or 1]
        axes.scatter(shown[:, 0], shown[:, 1], s=4, alpha=0.25, color=f"C{row}", linewidths=0)
    if len(anchors):
        axes.scatter(anchors[:, 0], anchors[:, 1], s=60, marker="+", color="black", label="anchors", zorder=3)
        axes.legend(frameon=False)


def _draw_shares(axes: Axes, values: Sequence[np.ndarray], names: Sequence[str], bins: np.ndarray) -> None:
    """Draw an outline per split, as shares of that split, so that sizes of splits do not matter. Clips to `bins`."""
    for row, (value, name) in enumerate(zip(values, names, strict=True)):
        weights = np.full(len(value), 1 / max(len(value), 1))
        clipped = np.clip(value, bins[0], bins[-1])
        axes.hist(
            clipped, bins=bins.tolist(), weights=weights, histtype="step", linewidth=1.6, color=f"C{row}", label=name
        )
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, loc="upper right", fontsize=9)
