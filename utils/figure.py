"""Axes of Matplotlib in the project's style."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.atomic_file import atomic_write


def label_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path, *, dpi: int, bbox: str | None = None) -> None:
    """Write a png atomically, creating its folder. bbox: savefig's bbox_inches. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi, bbox_inches=bbox)


def literal(name: str) -> str:
    """Escape what matplotlib would take for a formula: text between two dollars."""
    return name.replace("$", r"\$")
