"""The drawing in the README, docs/how-it-works.png: which mini-batches' statistics normalize the one at hand.

python docs/drawing.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

CUT = 4  # mini-batches of a batch
AT_HAND = 1  # t, the second one of this batch
OWN, POOLED, STANDS_IN, EMPTY, INK = "#1f6fd6", "#9cc3f2", "#dbe9fb", "#ffffff", "#222222"
ROWS = (  # norm, whose statistics, colours of the batch before and of this batch
    ("bn", "t alone", [EMPTY] * CUT, [EMPTY, OWN, EMPTY, EMPTY]),
    ("cmbn", "t and those of its batch before it", [EMPTY] * CUT, [POOLED, OWN, EMPTY, EMPTY]),
    (
        "cmbn:carry",
        "the same, and the batch before,\nat today's weights, for those to come",
        [STANDS_IN] * CUT,
        [POOLED, OWN, EMPTY, EMPTY],
    ),
)
SIDE, GAP, BETWEEN, LINE = 0.62, 0.1, 0.6, 0.95  # of a mini-batch's square; between two, two batches, two rows
TOP = LINE * (len(ROWS) - 1)


def main() -> None:
    figure = Figure(figsize=(10.4, 2.8))
    axes = figure.add_axes((0, 0, 1, 1))
    batches = [[batch * (CUT * (SIDE + GAP) + BETWEEN) + at * (SIDE + GAP) for at in range(CUT)] for batch in range(2)]
    end, head = batches[1][-1] + SIDE, TOP + SIDE + 0.25
    for title, xs in zip(("the batch before", "this batch, in 4 forwards"), batches, strict=True):
        axes.text((xs[0] + xs[-1] + SIDE) / 2, head, title, ha="center", color=INK, fontsize=11)
    axes.text(end + 0.5, head, "t is normalized by the statistics of", color=INK, fontsize=11)
    step = (batches[0][-1] + SIDE + batches[1][0]) / 2
    axes.plot([step, step], [-0.1, TOP + SIDE + 0.1], color="#999999", linewidth=1, linestyle=":")
    axes.text(step, -0.2, "optimizer step", ha="center", va="top", color="#666666", fontsize=9)
    for number, (norm, whose, *colours) in enumerate(ROWS):
        y = TOP - LINE * number
        axes.text(-0.25, y + SIDE / 2, f"--norm {norm}", ha="right", va="center", family="monospace", fontsize=11)
        axes.text(end + 0.5, y + SIDE / 2, whose, va="center", color=INK, fontsize=11)
        for xs, faces in zip(batches, colours, strict=True):
            for x, face in zip(xs, faces, strict=True):
                axes.add_patch(Rectangle((x, y), SIDE, SIDE, facecolor=face, edgecolor=INK, linewidth=1.1))
        middle = (batches[1][AT_HAND] + SIDE / 2, y + SIDE / 2)
        axes.text(*middle, "t", ha="center", va="center", color="white", fontsize=12)
    axes.set(xlim=(-2.45, 10.75), ylim=(-0.55, head + 0.4), aspect="equal")
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("how-it-works.png"), dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
