"""Matplotlib figures in the project's style, drawn without pyplot: no window and no global state."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width_inches: float, height_inches: float, *, layout: str | None = None) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), layout=layout)  # type: ignore[arg-type]  # a Literal
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def literal(name: str) -> str:
    """Escape what matplotlib would take for a formula: text between two dollars."""
    return name.replace("$", r"\$")
