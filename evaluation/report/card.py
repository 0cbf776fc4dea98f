"""README.md of a run: a model card (Mitchell et al. 2019, arXiv:1810.03993) of what its files say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaluation.error_types import ERROR_TYPES
from evaluation.report.facts import METRICS, Run, setting_text
from evaluation.report.markup import markdown, percent
from evaluation.report.sections import CHANGED, commands, sentence
from utils.duration import in_words
from utils.flags import flag_of
from utils.printable import printable

MARK = "<!-- written by evaluation.report: remove this line, and your own text stays -->"
_FEW_OBJECTS = 50


def model_card(run: Run) -> str:
    """Return it as Markdown."""
    parts = [MARK, f"# {markdown(run.name)}", markdown(sentence(run))]
    parts += ["## Results", *_results(run), "## Weak points", *_weak_points(run)]
    rows = [(f"`{flag_of(name)}`", markdown(setting_text(name, value))) for name, value in run.changed.items()]
    if rows:
        parts += ["## Training", f"{CHANGED}:", _table(("setting", "value"), rows)]
    machine = run.settings.get("environment")
    if isinstance(machine, dict):
        parts.append("Trained on: " + markdown(", ".join(f"{name} {value}" for name, value in machine.items())) + ".")
    if run.seconds:
        parts.append(f"Training took {in_words(run.seconds)}, without evaluations.")
    parts += ["## Use", *(f"{what}:\n\n    {printable(command)}" for what, command in commands(run))]
    parts.append(
        "report.html shows curves, errors and images. Not filled in: what the network is meant for, who may "
        "use it, and the licence of its data."
    )
    return "\n\n".join(parts) + "\n"


def _results(run: Run) -> list[str]:
    keys = [key for key in METRICS if key in run.stats]
    if not keys:
        return ["Not measured."]
    parts = [_table([METRICS[key] for key in keys], [[percent(run.stats[key]) for key in keys]])]
    spread = f"; 95 % interval of AP over images: {run.interval}" if run.interval else ""
    parts.append(f"COCO's, in per cent{spread}.")
    if run.measured is None:
        return parts
    thresholds = run.measured.thresholds
    if thresholds.is_chosen:
        at = thresholds.common
        known = ", ".join(f"{name} {percent(at[name])} %" for name in ("precision", "recall") if name in at)
        parts.append(f"From a confidence of {percent(at['confidence'])} % on: {known}.")
    rows = [row for row in run.measured.classes if row.objects]
    body = [(markdown(row.name), str(row.objects), percent(row.AP), percent(row.AP50)) for row in rows]
    return [*parts, _table(("class", "objects", "AP", "AP50"), body)] if rows else parts


def _weak_points(run: Run) -> list[str]:
    if run.measured is None:
        return ["Not analysed."]
    costs = run.measured.errors.costs
    worst = sorted(ERROR_TYPES, key=lambda name: -costs[name])[:3]
    points = [f"- Errors that cost most AP50: {', '.join(f'{name} {percent(costs[name])}' for name in worst)}."]
    rows = [row for row in run.measured.classes if row.objects]
    if len(rows) > 1:
        lowest = sorted(rows, key=lambda row: row.AP)[:3]
        points.append(f"- Lowest AP: {', '.join(f'{markdown(row.name)} {percent(row.AP)}' for row in lowest)}.")
    few = [row for row in rows if row.objects < _FEW_OBJECTS]
    if few:
        names = ", ".join(f"{markdown(row.name)} ({row.objects})" for row in few[:10])
        more = f" and {len(few) - 10} more" if len(few) > 10 else ""
        points.append(f"- Measured on fewer than {_FEW_OBJECTS} objects: {names}{more}.")
    return ["\n".join(points)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
