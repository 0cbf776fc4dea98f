"""The table of a study, made of its rows: each recipe's AP, its gain over BN, its cost, and what to type."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean, median
from typing import Any

from study.grid import ChosenRates, Grid, Row, Task, cell_of
from study.recipes import BN
from study.statistics import Estimate, Gain, estimate, gain, holm, won_back
from utils.console import counted

BySeed = dict[int, Row]
ENOUGH_SEEDS = 3  # for an interval: of fewer it would say nothing
LEARNT_AP = 0.05  # below it networks have hardly begun to learn, and differences between them say nothing


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

    @property
    def task(self) -> Task:
        return Task(self.data, self.net, self.mosaic)


class Results:
    """Main rows by task, mini-batch and recipe, then by seed.

    Only rows with the grid's number of steps count, at the rate that tuning chose; before a recipe's tuning, at a
    borrowed one.
    """

    def __init__(self, rows: Iterable[Row], grid: Grid) -> None:
        self._grid, self._rates = grid, ChosenRates(grid, rows := list(rows))
        self._rows: dict[tuple[Task, int, str], BySeed] = {}
        for row in rows:
            if row["role"] != "main" or row["test_AP"] is None or row["steps"] != grid.steps:
                continue
            cell = cell_of(row)
            tuned, borrowed = self._rates_of(cell.task, cell.recipe, cell.mini_batch)
            if cell.rate == (borrowed if tuned is None else tuned):
                self._rows.setdefault((cell.task, cell.mini_batch, cell.recipe), {})[cell.seed] = row

    def lines(self) -> list[Line]:
        """Return the lines in the grid's order; tasks and recipes that the grid lacks come last."""
        tasks = {task for task, _, _ in self._rows}
        return [
            line
            for task in sorted(tasks, key=lambda task: (_rank(task, self._grid.tasks), task))
            for mini_batch in sorted({size for at, size, _ in self._rows if at == task})
            for line in self._block(task, mini_batch)
        ]

    def _rates_of(self, task: Task, recipe: str, mini_batch: int) -> tuple[float | None, float | None]:
        """Return the tuned rate and the borrowed one, each None where there is none."""
        own, lender = self._rates.of(task, recipe, mini_batch), self._grid.borrowed.get(recipe)
        return own, None if lender is None else self._rates.of(task, lender, mini_batch)

    def _at(self, task: Task, mini_batch: int, recipe: str) -> BySeed:
        """Return the rows of the recipe, or of its stand-in, by seed."""
        return self._rows.get((task, mini_batch, self._grid.stand_in(recipe, mini_batch)), {})

    def _recipes(self, task: Task) -> list[str]:
        found = {recipe for at, _, recipe in self._rows if at == task}
        return sorted(found, key=lambda recipe: (_rank(recipe, self._grid.recipes), recipe))

    def _block(self, task: Task, mini_batch: int) -> list[Line]:
        recipes = dict.fromkeys(self._grid.stand_in(recipe, mini_batch) for recipe in self._recipes(task))
        found = [self._line(task, mini_batch, recipe) for recipe in recipes if self._at(task, mini_batch, recipe)]
        tested = [line for line in found if line["gain"] is not None]
        for line, holds in zip(tested, holm([line["gain"].p for line in tested]), strict=True):
            line["holds"] = holds and line["gain"].is_significant
        return [Line(**line) for line in found]

    def _line(self, task: Task, mini_batch: int, recipe: str) -> dict[str, Any]:
        rows, reference = self._at(task, mini_batch, recipe), self._grid.reference_of(recipe)
        whole = self._grid.batch_size
        small, large, bn = (
            self._at(task, m, name) for m, name in ((mini_batch, reference), (whole, reference), (mini_batch, BN))
        )
        some = next(iter(rows.values()))
        timed = {seed: row for seed, row in rows.items() if not row["diverged"]}
        return {
            **task._asdict(),
            "mini_batch": mini_batch,
            "recipe": recipe,
            "reference": reference,
            "rate": some["rate"],
            "rate_is_borrowed": self._rates_of(task, recipe, mini_batch)[0] is None,
            "rate_at_edge": self._rates.is_at_edge(recipe, mini_batch, some["rate"]),
            "diverged": len(rows) - len(timed),
            "ap": estimate(list(_column(rows, "test_AP").values())),
            "ap50": estimate(list(_column(rows, "test_AP50").values())),
            "gain": None if recipe == reference else gain(_column(rows, "test_AP"), _column(small, "test_AP")),
            "holds": False,
            "share": None
            if recipe == reference or mini_batch == whole
            else won_back(*(_column(each, "test_AP") for each in (rows, small, large))),
            "step_s": median(row["step_s"] for row in timed.values()) if timed else float("nan"),
            "time_ratio": _ratio(timed, bn, "step_s"),
            "memory_MB": some["memory_MB"],
            "memory_ratio": _ratio(rows, bn, "memory_MB"),
        }


def _rank(name: Any, order: Sequence[Any]) -> int:
    """Return the index in `order`; what is not in it comes last."""
    return order.index(name) if name in order else len(order)


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


def leading(lines: Sequence[Line], most: int) -> list[str]:
    """Return the recipes that a plot can show: the references and the best.

    A recipe is ranked by its AP at the smallest mini-batch that it was trained at.
    """
    smallest: dict[str, int] = {}
    for line in lines:
        smallest[line.recipe] = min(line.mini_batch, smallest.get(line.recipe, line.mini_batch))
    aps: dict[str, list[float]] = {}
    for line in lines:
        if line.mini_batch == smallest[line.recipe]:
            aps.setdefault(line.recipe, []).append(line.ap.value)
    references = {line.reference for line in lines}
    return sorted(aps, key=lambda recipe: (recipe != BN, recipe not in references, -fmean(aps[recipe])))[:most]


HEAD = ("norm", "seeds", "AP", "gain over bn", "p", "gap won back", "AP50", "rate", "s a step", "MB", "diverged")


def cells_of(line: Line) -> tuple[str, ...]:
    """Return the texts of a line, in the order of HEAD."""
    gain_text, p = "", ""
    if line.gain is not None:
        gain_text = _percent(line.gain, sign="+") + (" *" if line.gain.is_significant else "")
        p = f"{line.gain.p:.3f}" + (" †" if line.holds else "") if line.gain.seeds >= ENOUGH_SEEDS else ""
    return (
        line.recipe,
        str(line.ap.seeds),
        _percent(line.ap),
        gain_text,
        p,
        "" if line.share is None else _percent(line.share, digits=0) + " %",
        f"{100 * line.ap50.value:.1f}",
        f"{line.rate:g}" + ("~" if line.rate_is_borrowed else "") + ("!" if line.rate_at_edge else ""),
        "" if math.isnan(line.step_s) else _with_ratio(f"{line.step_s:.3g}", line.time_ratio),
        _with_ratio(f"{line.memory_MB:.3g}", line.memory_ratio),
        str(line.diverged or ""),
    )


def _percent(value: Estimate, *, digits: int = 1, sign: str = "") -> str:
    """Format in per cent: 41.2 [40.1, 42.0]"""
    shown = f"{100 * value.value:{sign}.{digits}f}"
    if value.seeds < ENOUGH_SEEDS:
        return shown
    return f"{shown} [{100 * value.low:.{digits}f}, {100 * value.high:.{digits}f}]"


def _with_ratio(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} ({ratio:.2f})"


NOTES = (
    "norm: what is typed after `train.py --norm`. Where a forward has the whole batch, cmbn's carry and gradients (all "
    "but darknet) change nothing.",
    "AP (COCO, 50:95) and AP50 in per cent on the test images: mean over seeds [95 % interval: expanded percentile "
    "bootstrap over seeds; of 3 seeds it is their range, which covers only 75 %; of fewer there is none].",
    "gain over bn: paired by seed, at the same number of images in a forward (in a built-in study, of norms that "
    "centralize weights: over bn that does). p: exact sign-flip permutation, one-sided (larger than 0), of each alone.",
    "*: p <= .05, which takes 5 seeds, and the interval excludes 0; †: also after Holm's correction over the norms of "
    "the table, for which 5 seeds (p >= .031) do not suffice where there are two or more.",
    "gap won back: of that from bn here to bn with the whole batch, where the gap's own interval excludes 0.",
    "rate: learning rate, ! at the edge of those tried, so a better one may lie outside; ~ not tuned but that of cmbn.",
    "s a step, MB: seconds of an optimizer step, beside whatever else ran; memory of a batch on a GPU, of a CPU what a "
    "forward saves for its backward and the norms keep. In round brackets: relative to bn.",
)


def report(lines: Sequence[Line], rows: Sequence[Row], *, title: str, sentences: Sequence[str], plot: str) -> str:
    """Return the study's page in Markdown, which can be read as text. plot: its file's name."""
    parts = [f"# {title}", *sentences]
    for (task, mini_batch), block in groupby(lines, key=lambda line: (line.task, line.mini_batch)):
        parts.append(f"## {task.title}: {counted(mini_batch, 'image')} in a forward")
        parts.append(_table([HEAD, *map(cells_of, block)]))
    parts.append(f"![AP over images in a forward]({plot})")
    parts.append("\n".join(f"- {note}" for note in (*NOTES, *provenance(rows))))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, without those that are empty."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    head, *others = zip(*columns, strict=True)
    lines = (head, ["-" * width for width in widths], *others)
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def advice(lines: Sequence[Line], command: Callable[[str, int, float], str]) -> Iterator[str]:
    """Yield what to type at each number of images in a forward, by what was measured. command: see `Study`."""
    for mini_batch in sorted({line.mini_batch for line in lines}):
        at = f"With {counted(mini_batch, 'image')} in a forward"
        block = [line for line in lines if line.mini_batch == mini_batch]
        gains = {line.recipe: line.gain for line in block if line.gain and line.gain.seeds >= ENOUGH_SEEDS}
        better = [line for line in block if line.recipe in gains and gains[line.recipe].low > 0]
        best = max(better, key=lambda line: line.ap.value, default=None)
        if {line.recipe for line in block} == {BN}:
            yield f"{at} only bn was trained."
        elif gains and 0 < max(line.ap.value for line in block) < LEARNT_AP:
            yield (
                f"{at} no norm reached {100 * LEARNT_AP:.0f} AP, too little to compare them: train longer, as with "
                "--train '--epochs 50', or look for wrong labels with `python -m data.doctor`."
            )
        elif best:
            won = gains[best.recipe]
            few = "" if won.is_significant else ", which may be an accident of few seeds"
            text = f"{at} {best.recipe} is better than bn: {_percent(won, sign='+')} AP{few}. Type:"
            yield f"{text}\n\n    {command(best.recipe, mini_batch, best.rate)}"
        elif all(line.diverged == line.ap.seeds for line in block):
            yield f"{at} every training diverged: try smaller learning rates, with --rates."
        elif gains:
            bn = next(line for line in block if line.recipe == BN)
            yield f"{at} nothing was found to be better than bn. Type:\n\n    {command(BN, mini_batch, bn.rate)}"
        else:
            yield f"{at} there are fewer than {ENOUGH_SEEDS} seeds of a norm and of bn yet, too few for advice."


def json_report(lines: Sequence[Line]) -> str:
    return json.dumps([_without_nan(asdict(line)) for line in lines], indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """Replace NaN, such as the interval of one seed, by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
