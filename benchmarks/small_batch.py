"""What a norm is worth at few images in a forward, in users' settings: the tables and the plot of docs/small-batch.md.

    python -m benchmarks.small_batch [--rows FILE]

Reads the rows of `benchmarks.recipes` that have batches of 16 images. A table per setting: the data, the network, its
weights, the length, the optimizer. Means over seeds, 95 % intervals over seeds, and differences to batch norm at the
same number of images paired by seed, all by the statistics of `python -m study`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measured import RESULTS, ROOT, Row
from study.report import ENOUGH_SEEDS
from study.rows import read_rows
from study.statistics import Estimate, estimate, gain
from utils.errors import exit_on_error
from utils.figure import label_axes

BATCH = 16
_CUT = re.compile(r"--(batch-size|subdivisions) \d+")  # is the column
SHOWN = {"bn": "#222222", "cmbn:carry": "#1f6fd6"}
Setting = tuple[str, str, str, int, int, str]
Cells = dict[tuple[str, int], dict[int, float]]  # (what is typed, images in a forward) -> test AP by seed, in per cent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "recipes.jsonl", metavar="FILE")
    settings = by_setting(read_rows(parser.parse_args().rows))
    for setting, cells in settings.items():
        print(f"### {title(setting)}\n\n{table(cells)}\n")
    plot([(setting, cells) for setting, cells in settings.items() if is_plotted(cells)], ROOT / "docs/small-batch.png")


def by_setting(rows: Iterable[Row]) -> dict[Setting, Cells]:
    """Return the test APs of batches of 16, in the rows' order."""
    settings: dict[Setting, Cells] = {}
    for row in rows:
        if row["batch_size"] != BATCH:
            continue
        names = ("data", "cfg", "weights", "image_size", "epochs", "optimizer")
        cells = settings.setdefault(tuple(row[name] for name in names), {})  # type: ignore[arg-type]
        rate = "" if row["rate"] == "default" else f"--learning-rate {row['rate']}"
        typed = " ".join([row["norm"], _CUT.sub("", row.get("flags", "")), rate])
        cells.setdefault((" ".join(typed.split()), BATCH // row["subdivisions"]), {})[row["seed"]] = (
            100 * row["test_AP"]
        )
    return settings


def title(setting: Setting) -> str:
    data, cfg, weights, image_size, epochs, optimizer = setting
    start = f"from {weights}" if weights else f"{cfg.removesuffix('.cfg')} from scratch"
    typed = "" if optimizer == "auto" else f", --optimizer {optimizer}"
    return f"{data} {start}, {image_size} px, {epochs} epochs{typed}"


def table(cells: Cells) -> str:
    """Return a line per norm, a column per number of images in a forward."""
    sizes = sorted({images for _, images in cells})
    norms = list(dict.fromkeys(norm for norm, _ in sorted(cells, key=lambda cell: cell[0] != "bn")))
    lines = [" | ".join(["| `--norm`", *(f"{images} in a forward" for images in sizes)]) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for norm in norms:
        shown = [_shown(cells.get((norm, images), {}), cells.get(("bn", images), {}), norm) for images in sizes]
        lines.append(" | ".join([f"| `{norm}`", *shown]) + " |")
    return "\n".join(lines)


def _shown(values: dict[int, float], reference: dict[int, float], norm: str) -> str:
    """39.9 [38.4, 41.3] (5), +5.0 [3.6, 6.1]: mean with its interval, seeds, and the difference to batch norm."""
    if not values:
        return ""
    text = f"{_interval(estimate(list(values.values())))} ({len(values)})"
    difference = gain(values, reference) if norm != "bn" else None
    return text if difference is None else f"{text}, {_interval(difference, '+')}"


def _interval(found: Estimate, sign: str = "") -> str:
    reach = f" [{found.low:{sign}.1f}, {found.high:{sign}.1f}]" if found.seeds >= ENOUGH_SEEDS else ""
    return f"{found.value:{sign}.1f}{reach}"


def is_plotted(cells: Cells) -> bool:
    """Return whether both lines have intervals at one image, and there is a whole batch to compare them with."""
    needed = [(norm, 1) for norm in SHOWN] + [("bn", BATCH)]
    return all(len(cells.get(cell, {})) >= ENOUGH_SEEDS for cell in needed)


def plot(settings: Sequence[tuple[Setting, Cells]], path: Path) -> None:
    """Draw a panel per setting."""
    figure = Figure(figsize=(5.2 * max(1, len(settings)), 3.8), layout="constrained")
    for number, (setting, cells) in enumerate(settings, start=1):
        draw(figure.add_subplot(1, len(settings), number), setting, cells)
    figure.savefig(path, dpi=110)


def draw(axes: Axes, setting: Setting, cells: Cells) -> None:
    """Draw AP over the images in a forward, of batch norm and of `cmbn:carry`."""
    sizes = sorted({images for norm, images in cells if norm in SHOWN})
    for norm, colour in SHOWN.items():
        at_batch = cells.get(("bn", BATCH), {})  # where cmbn:carry is batch norm
        values = {images: cells.get((norm, images), at_batch if images == BATCH else {}) for images in sizes}
        found = {images: estimate(list(by_seed.values())) for images, by_seed in values.items() if by_seed}
        xs = [sizes.index(images) + (0.03 if norm != "bn" else -0.03) for images in found]
        ends = [
            (each.low, each.high) if each.seeds >= ENOUGH_SEEDS else (each.value, each.value) for each in found.values()
        ]
        ys = [each.value for each in found.values()]
        reach = [[abs(y - end[side]) for y, end in zip(ys, ends, strict=True)] for side in (0, 1)]
        axes.errorbar(xs, ys, yerr=reach, color=colour, marker="o", label=f"--norm {norm}", linewidth=1.8)
    axes.set_xticks(range(len(sizes)), map(str, sizes))
    data, _, weights, *_ = setting
    label_axes(
        axes,
        f"{data}, {'fine-tuned from COCO weights' if weights else 'from scratch, with mosaic'}",
        "images in a forward (batches of 16)",
        "AP on test images, %",
    )
    axes.legend(loc="best", frameon=False)


if __name__ == "__main__":
    exit_on_error(main)
