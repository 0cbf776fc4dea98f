"""From rows to the table: each recipe's AP, its gain over BN, and its cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.small_batch.grid import BATCH, Grid, TunedRates, stand_in
from benchmarks.small_batch.recipes import BORROWED, CENTRALIZED_BN, reference_of
from benchmarks.small_batch.statistics import Estimate, Gain, estimate, gain, holm, won_back

Row = Mapping[str, Any]
BySeed = dict[int, Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A recipe at a mini-batch on a data set; AP in 0..1 on the test split.

    gain: over the reference at the same mini-batch, None for the reference itself. share: of the gap from the
    reference here to the reference at 16, None where that gap is not significant. holds: whether the gain is
    significant among all recipes of its block, too (Holm). time_ratio, memory_ratio: to plain BN's.
    """

    data: str
    net: str
    mosaic: bool
    mini_batch: int
    recipe: str
    reference: str
    rate: float
    rate_is_borrowed: bool
    rate_at_edge: bool
    diverged: int
    ap: Estimate
    ap50: Estimate
    gain: Gain | None
    holds: bool
    share: Estimate | None
    step_s: float
    time_ratio: float | None
    memory_MB: float
    memory_ratio: float | None


class Results:
    """Main rows by data, net, mini-batch and recipe, then by seed.

    Only rows with the grid's number of steps count, at the rate that tuning chose; before a recipe's tuning, at a
    `BORROWED` one.
    """

    def __init__(self, rows: Iterable[Row], grid: Grid) -> None:
        self._grid, self._rates = grid, TunedRates(grid, rows := list(rows))
        self._rows: dict[tuple[Any, ...], BySeed] = {}
        for row in rows:
            if row["role"] != "main" or row["test_AP"] is None or row["steps"] != grid.steps:
                continue
            tuned, borrowed = self._rates_of(row["data"], row["net"], row["recipe"], row["mini_batch"])
            if row["rate"] == (borrowed if tuned is None else tuned):
                place = (row["data"], row["net"], row["mosaic"], row["mini_batch"], row["recipe"])
                self._rows.setdefault(place, {})[row["seed"]] = row

    def _rates_of(self, data: str, net: str, recipe: str, mini_batch: int) -> tuple[float | None, float | None]:
        """Return the tuned rate and the borrowed one, each None where there is none."""
        own, lender = self._rates.of(data, net, recipe, mini_batch), BORROWED.get(recipe)
        return own, None if lender is None else self._rates.of(data, net, lender, mini_batch)

    def scenes(self) -> list[tuple[str, str, bool]]:
        """Return (data, net, mosaic) tuples in the grid's order; data and nets that the grid lacks come last."""
        order = (*self._grid.data, *self._grid.nets)
        return sorted({place[:3] for place in self._rows}, key=lambda scene: [*_ranks(scene[:2], order), scene])

    def at(self, scene: tuple[str, str, bool], mini_batch: int, recipe: str) -> BySeed:
        """Return the rows of the recipe, or of its stand-in, by seed."""
        return self._rows.get((*scene, mini_batch, stand_in(recipe, mini_batch)), {})

    def mini_batches(self, scene: tuple[str, str, bool]) -> list[int]:
        return sorted({place[3] for place in self._rows if place[:3] == scene})

    def recipes(self, scene: tuple[str, str, bool]) -> list[str]:
        found = {place[4] for place in self._rows if place[:3] == scene}
        return sorted(found, key=lambda recipe: [*_ranks([recipe], self._grid.recipes), recipe])

    def lines(self) -> list[Line]:
        return [line for scene in self.scenes() for m in self.mini_batches(scene) for line in self._block(scene, m)]

    def _block(self, scene: tuple[str, str, bool], mini_batch: int) -> list[Line]:
        recipes = dict.fromkeys(stand_in(recipe, mini_batch) for recipe in self.recipes(scene))
        found = [self._line(scene, mini_batch, recipe) for recipe in recipes if self.at(scene, mini_batch, recipe)]
        tested = [line for line in found if line["gain"] is not None]
        for line, holds in zip(tested, holm([line["gain"].p for line in tested]), strict=True):
            line["holds"] = holds and line["gain"].is_significant
        return [Line(**line) for line in found]

    def _line(self, scene: tuple[str, str, bool], mini_batch: int, recipe: str) -> dict[str, Any]:
        rows, reference = self.at(scene, mini_batch, recipe), reference_of(recipe)
        small, large, bn = (
            self.at(scene, m, name) for m, name in ((mini_batch, reference), (BATCH, reference), (mini_batch, "bn"))
        )
        some = next(iter(rows.values()))
        timed = {seed: row for seed, row in rows.items() if not row["diverged"]}
        return {
            "data": scene[0],
            "net": scene[1],
            "mosaic": scene[2],
            "mini_batch": mini_batch,
            "recipe": recipe,
            "reference": reference,
            "rate": some["rate"],
            "rate_is_borrowed": self._rates_of(scene[0], scene[1], recipe, mini_batch)[0] is None,
            "rate_at_edge": self._rates.is_at_edge(scene[1], some["rate"]),
            "diverged": len(rows) - len(timed),
            "ap": estimate(list(_column(rows, "test_AP").values())),
            "ap50": estimate(list(_column(rows, "test_AP50").values())),
            "gain": None if recipe == reference else gain(_column(rows, "test_AP"), _column(small, "test_AP")),
            "holds": False,
            "share": None
            if recipe == reference or mini_batch == BATCH
            else won_back(*(_column(each, "test_AP") for each in (rows, small, large))),
            "step_s": median(row["step_s"] for row in timed.values()) if timed else float("nan"),
            "time_ratio": _ratio(timed, bn, "step_s"),
            "memory_MB": some["memory_MB"],
            "memory_ratio": _ratio(rows, bn, "memory_MB"),
        }


def _ranks(names: Iterable[str], order: Sequence[str]) -> list[int]:
    """Return each name's index in `order`; a name that is not in it comes last."""
    return [order.index(name) if name in order else len(order) for name in names]


def _column(rows: BySeed, name: str) -> dict[int, float]:
    return {seed: row[name] for seed, row in rows.items()}


def _ratio(rows: BySeed, reference: BySeed, name: str) -> float | None:
    """Return the median over seeds of the ratios of rows from one machine."""
    ratios = [
        row[name] / other[name]
        for seed, row in rows.items()
        if (other := reference.get(seed)) and not other["diverged"] and other["machine"] == row["machine"]
    ]
    return median(ratios) if ratios else None


def leading(lines: Sequence[Line], most: int = 14) -> set[str]:
    """Return the recipes that a plot can show: the references and the best, and their stand-ins.

    A recipe is ranked by its AP at the smallest mini-batch that it was trained at.
    """
    smallest: dict[str, int] = {}
    for line in lines:
        smallest[line.recipe] = min(line.mini_batch, smallest.get(line.recipe, BATCH))
    aps: dict[str, list[float]] = {}
    for line in lines:
        if line.mini_batch == smallest[line.recipe]:
            aps.setdefault(line.recipe, []).append(line.ap.value)
    references = {line.reference for line in lines}
    ranked = sorted(aps, key=lambda recipe: (recipe not in references, -fmean(aps[recipe])))
    shown = ranked[:most]
    return {*shown, *(stand_in(recipe, BATCH) for recipe in shown)} & aps.keys()


HEAD = ("recipe", "rate", "n", "AP", "AP50", "gain over BN", "p", "gap won back", "step", "memory")


def cells_of(line: Line, *, markdown: bool) -> tuple[str, ...]:
    """Return the texts of a line, in the order of HEAD. markdown: mark a significant gain in bold, else by a star."""
    gain_text, p = "", ""
    if line.gain is not None:
        gain_text, p = _percent(line.gain, sign="+"), f"{line.gain.p:.3f}" + (" †" if line.holds else "")
        if line.gain.is_significant:
            gain_text = f"**{gain_text}**" if markdown else f"{gain_text} *"
    return (
        (f"`{line.recipe}`" if markdown else line.recipe) + (f" ({line.diverged} diverged)" if line.diverged else ""),
        f"{line.rate:g}" + ("~" if line.rate_is_borrowed else "") + ("!" if line.rate_at_edge else ""),
        str(line.ap.seeds),
        _percent(line.ap),
        f"{100 * line.ap50.value:.1f}",
        gain_text,
        p,
        "" if line.share is None else _percent(line.share, digits=0) + " %",
        "" if line.time_ratio is None else f"{line.time_ratio:.2f}",
        "" if line.memory_ratio is None else f"{line.memory_ratio:.2f}",
    )


def _percent(value: Estimate, *, digits: int = 1, sign: str = "") -> str:
    """Format in per cent: 41.2 [40.1, 42.0]"""
    shown = f"{100 * value.value:{sign}.{digits}f}"
    if value.seeds < 2:
        return shown
    return f"{shown} [{100 * value.low:.{digits}f}, {100 * value.high:.{digits}f}]"


NOTES = (
    "recipe: what is typed after `train.py --norm`.",
    "AP (COCO, 50:95) and AP50 in per cent on the test split: mean over n seeds [95 % interval: expanded percentile "
    "bootstrap over seeds; of 2 or 3 seeds it is their range, which covers only 50 or 75 %].",
    "gain over BN: paired by seed, at the same mini-batch; recipes with centralized weights (mabn's, too) "
    f"against {CENTRALIZED_BN}. p: exact sign-flip permutation, one-sided (larger than 0), per comparison.",
    "{mark}: p <= .05 and the interval excludes 0; †: also after Holm's correction over the recipes of the block, for "
    "which 5 seeds (p >= .031) do not suffice where there are two or more.",
    "gap won back: of that from BN at the mini-batch to BN at 16, where the gap's own interval excludes 0.",
    "At 16 images a batch is one mini-batch: cmbn's gradients share and renorm, carry and burn-in change nothing, to "
    "the last bit.",
    "step, memory: relative to bn at the same mini-batch and seed. rate: learning rate, ! at the edge of those tried, "
    "~ not tuned but that of cmbn.",
)


def text_report(lines: Sequence[Line], rows: Sequence[Row]) -> str:
    parts = []
    for title, block in _blocks(lines):
        table = [HEAD, *(cells_of(line, markdown=False) for line in block)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        printed = (
            "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)).rstrip() for texts in table
        )
        parts.append("\n".join([title, *printed]))
    parts.append("\n".join(note.format(mark="*") for note in NOTES))
    parts.append("\n".join(provenance(rows)))
    return "\n\n".join(parts)


def markdown_report(lines: Sequence[Line], rows: Sequence[Row], *, title: str, images: Sequence[str]) -> str:
    parts = [f"# {title}"]
    for heading, table in _overviews(lines):
        parts += [f"## {heading}", "\n".join(f"| {' | '.join(texts)} |" for texts in table)]
    parts.append(
        "AP on the test split, mean over seeds (their number, where others of the table have more), and the interval "
        "of the gain over BN at the same mini-batch; bold: a significant gain. All of it in the tables that follow."
    )
    for heading, block in _blocks(lines):
        table = [HEAD, ("---",) * len(HEAD), *(cells_of(line, markdown=True) for line in block)]
        parts.append(f"## {heading}")
        parts.append("\n".join(f"| {' | '.join(texts)} |" for texts in table))
    parts += [f"![{name}]({name})" for name in images]
    parts.append("\n".join(f"- {note.format(mark='bold')}" for note in NOTES))
    parts.append("\n".join(f"- {line}" for line in provenance(rows)))
    return "\n\n".join(parts) + "\n"


def _overviews(lines: Sequence[Line]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield (heading, rows of texts) by data set: a row per recipe, a column per mini-batch."""
    scenes = dict.fromkeys((line.data, line.net, line.mosaic) for line in lines)
    for scene in scenes:
        here = [line for line in lines if (line.data, line.net, line.mosaic) == scene]
        sizes = sorted({line.mini_batch for line in here})
        cells = {(line.recipe, line.mini_batch): _overview(line, max(each.ap.seeds for each in here)) for line in here}
        table = [("recipe", *(f"mini-batch {size}" for size in sizes)), ("---",) * (1 + len(sizes))]
        for recipe in dict.fromkeys(line.recipe for line in here):
            others = {size: stand_in(recipe, size) for size in sizes}
            texts = (
                cells.get((recipe, size), "") if others[size] == recipe else f"as `{others[size]}`" for size in sizes
            )
            table.append((f"`{recipe}`", *texts))
        yield _heading(*scene), table


def _overview(line: Line, most_seeds: int) -> str:
    """Format AP and the interval of the gain: 42.3 (5) [-0.3, +5.9]"""
    text = f"{100 * line.ap.value:.1f}" + (f" ({line.ap.seeds})" if line.ap.seeds < most_seeds else "")
    if line.gain is None:
        return text
    text = f"**{text}**" if line.gain.is_significant else text
    return text if line.gain.seeds < 2 else f"{text} [{100 * line.gain.low:+.1f}, {100 * line.gain.high:+.1f}]"


def _heading(data: str, net: str, mosaic: bool) -> str:
    return f"{data}, {net} net" + (", mosaic" if mosaic else "")


def json_report(lines: Sequence[Line]) -> str:
    return json.dumps([_without_nan(asdict(line)) for line in lines], indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """Replace NaN, such as the interval of one seed, by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _blocks(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    blocks: dict[str, list[Line]] = {}
    for line in lines:
        heading = f"{_heading(line.data, line.net, line.mosaic)}, mini-batch {line.mini_batch}"
        blocks.setdefault(heading, []).append(line)
    return list(blocks.items())


def provenance(rows: Sequence[Row]) -> list[str]:
    """Return lines on when, with which code and on which machines the rows were measured."""
    dates = sorted({row["date"] for row in rows})
    machines = Counter(tuple(row["machine"].items()) for row in rows)
    pairs = _unpaired(rows)
    return [
        f"{len(rows)} trainings, {sum(row['seconds'] for row in rows) / 3600:.1f} process hours, "
        f"{dates[0]} to {dates[-1]}, commits {', '.join(sorted({row['commit'] for row in rows}))}",
        *(
            f"{count} on: " + ", ".join(f"{name} {value}" for name, value in machine)
            for machine, count in machines.items()
        ),
        f"pairs that did not see the same first batch: {len(pairs)}" + (f" ({pairs[0]} ...)" if pairs else ""),
    ]


def _unpaired(rows: Iterable[Row]) -> list[str]:
    """Return the groups of rows that should have seen the same images, and did not."""
    seen: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        if "first_batch" in row:
            group = (row["data"], row["net"], row["mosaic"], row["seed"], row["scenes"])
            seen.setdefault(group, set()).add(row["first_batch"])
    return [f"{group[0]} seed {group[3]}" for group, hashes in seen.items() if len(hashes) > 1]
