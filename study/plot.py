"""The study's plot: AP on the test images over the images in a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.report import ENOUGH_SEEDS, Line, leading
from utils.figure import label_axes, literal, save_figure

_MOST = 8  # lines; more could not be told apart
_COLOURS = ("#222222", "#1f6fd6", "#d6281f", "#0b7a3b", "#e8890c", "#8e44ad", "#12a3a3", "#e05fa8")
_LABEL_HEIGHT, _LETTER_WIDTH = 0.055, 0.015  # of the axes


def plot(lines: Sequence[Line], stand_in: Callable[[str, int], str], path: Path) -> None:
    """Plot a panel per task, a line per norm with its 95 % intervals; of many norms the references and the best.

    stand_in: (recipe, mini-batch) -> the recipe whose figures are its own.
    """
    shown = dict(zip(leading(lines, _MOST), _COLOURS, strict=False))
    tasks = list(dict.fromkeys(line.task for line in lines))
    bars = " (bars: 95 % over seeds)" if any(line.ap.seeds >= ENOUGH_SEEDS for line in lines) else ""
    figure = Figure(figsize=(6.5 * len(tasks), 4.5), layout="constrained")
    for number, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(1, len(tasks), number)
        _draw(axes, [line for line in lines if line.task == task], shown, stand_in)
        label_axes(axes, literal(task.title), "images in a forward", f"AP on test images, %{bars}")
    save_figure(figure, path, dpi=120)


def _draw(axes: Axes, lines: Sequence[Line], colours: dict[str, str], stand_in: Callable[[str, int], str]) -> None:
    sizes = sorted({line.mini_batch for line in lines})
    labels: list[tuple[float, str, str]] = []
    for number, (recipe, colour) in enumerate(colours.items()):
        mine = [line for line in lines if line.recipe == stand_in(recipe, line.mini_batch)]
        if not mine:
            continue
        aside = number - (len(colours) - 1) / 2  # so that intervals stand side by side
        xs = [sizes.index(line.mini_batch) + 0.03 * aside for line in mine]
        ys = [100 * line.ap.value for line in mine]
        reach = [
            [100 * abs(line.ap.value - end) if line.ap.seeds >= ENOUGH_SEEDS else 0 for line, end in ends]
            for ends in ([(line, line.ap.low) for line in mine], [(line, line.ap.high) for line in mine])
        ]
        axes.errorbar(xs, ys, yerr=reach, color=colour, marker="o", markersize=5, linewidth=1.8, elinewidth=1.2)
        labels.append((ys[0], recipe, colour))
    axes.set_xticks(range(len(sizes)), map(str, sizes))
    _label(axes, labels, len(sizes))


def _label(axes: Axes, labels: Sequence[tuple[float, str, str]], sizes: int) -> None:
    """Write the norms left of their lines, where these differ most, as far apart as text needs."""
    share = min(0.6, _LETTER_WIDTH * max((len(name) for _, name, _ in labels), default=0))
    lines = sizes - 0.75  # the axis from the first number of images on, which is at 0
    axes.set_xlim(-(0.25 + share * lines) / (1 - share), lines)
    labels = sorted(labels)
    heights = [height for height, _, _ in labels]
    bottom, top = axes.get_ylim()
    apart = _LABEL_HEIGHT * (top - bottom)
    upwards, downwards = _spread(heights, apart), [-at for at in _spread([-at for at in reversed(heights)], apart)]
    for one, other, (_, name, colour) in zip(upwards, reversed(downwards), labels, strict=True):
        axes.text(-0.18, (one + other) / 2, literal(name), color=colour, ha="right", va="center", fontsize=9)


def _spread(ascending: Sequence[float], apart: float) -> list[float]:
    """Return the heights, moved up as far as they need to be to stand apart."""
    spread: list[float] = []
    for height in ascending:
        spread.append(max([height, *(at + apart for at in spread[-1:])]))
    return spread
