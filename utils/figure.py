"""Axes of Matplotlib in the project's style."""

from __future__ import annotations

from matplotlib.axes import Axes


def label_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def literal(name: str) -> str:
    """Escape what matplotlib would take for a formula: text between two dollars."""
    return name.replace("$", r"\$")
