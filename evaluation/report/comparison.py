"""The sections of a report of several runs, side by side; differences are to the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from evaluation.error_types import ERROR_TYPES
from evaluation.report.facts import METRICS, Measured, Run, setting_text
from evaluation.report.gallery import Gallery
from evaluation.report.markup import DASH, Markup, element, note, percent, section, table
from evaluation.report.sections import controls
from utils.duration import in_words
from utils.flags import flag_of

MINUS = "\N{MINUS SIGN}"
_DISAGREEMENTS = 20

Value = Callable[[Run], float | None]


def named_apart(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, with as much of their paths as tells them apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def differences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """COCO's numbers, and the settings in which the runs differ."""
    rows = [_row(name, runs, lambda run, key=key: _known(run.stats.get(key))) for key, name in METRICS.items()]  # type: ignore[misc]
    times = ("training", *(in_words(run.seconds) if run.seconds else DASH for run in runs), *[""] * (len(runs) - 1))
    header = ("per cent", *names, *(f"{name} {MINUS} {names[0]}" for name in names[1:]))
    said = "Differences of one run each: python evaluate.py --compare says which of them are sure."
    return section(
        "numbers", "Differences", table(header, [*rows, times], class_="numbers"), note(said), _settings(runs, names)
    )


def _row(name: str, runs: Sequence[Run], value: Value) -> tuple[Any, ...]:
    values = [value(run) for run in runs]
    return (name, *map(percent, values), *(_difference(values[0], each) for each in values[1:]))


def _difference(first: float | None, other: float | None) -> str:
    return DASH if first is None or other is None else f"{100 * (other - first):+.1f}"


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value >= 0 else None


def _settings(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    settings = [{name: run.settings.get(name) for name in run.settings if name not in _OWN} for run in runs]
    every = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in every if any(each.get(name) != settings[0].get(name) for each in settings)]
    rows = [
        (element("code", flag_of(name)), *(setting_text(name, each.get(name)) for each in settings))
        for name in differing
    ]
    if not rows:
        return note("All settings are equal.")
    return table(("setting", *names), rows, class_="plain")


_OWN = ("out", "resume", "run_id", "environment", "total_steps")


def classes(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """AP of each class, of the runs that have it."""
    aps = [{row.name: row.AP for row in run.measured.classes} if run.measured else {} for run in runs]
    every = [
        name
        for name in dict.fromkeys(name for each in aps for name in each)
        if any(_known(each.get(name)) is not None for each in aps)
    ]
    if not every:
        return Markup("")
    rows = []
    for name in every:
        values = [_known(each.get(name)) for each in aps]
        rows.append((name, *map(percent, values), *(_difference(values[0], each) for each in values[1:])))
    header = ("AP", *names, *(f"{name} {MINUS} {names[0]}" for name in names[1:]))
    return section("classes", "By class", table(header, rows, class_="numbers"))


def errors(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """What each type of error costs in each run."""
    if not any(run.measured for run in runs):
        return Markup("")
    rows = [
        _row(kind, runs, lambda run, kind=kind: run.measured.errors.costs[kind] if run.measured else None)  # type: ignore[misc]
        for kind in ERROR_TYPES
    ]
    header = ("error", *names, *(f"{name} {MINUS} {names[0]}" for name in names[1:]))
    said = "What AP50 would gain, in per cent, if the errors of one kind were corrected (TIDE)."
    return section("errors", "What is wrong", note(said), table(header, rows, class_="numbers"))


def images(runs: Sequence[Run], names: Sequence[str]) -> tuple[Markup, dict[str, Any]]:
    """Return the images whose F1 differs most, and what report.js draws into them."""
    measured = [(name, run.measured) for name, run in zip(names, runs, strict=True) if run.measured]
    if len(measured) < 2:
        return Markup(""), {}
    shared = _on_the_same_images(measured)
    if shared is None:
        said = "The runs were measured on different images, so that none can be shown with the detections of both."
        return section("images", "Where they disagree", note(said)), {}
    gallery = Gallery(shared)
    f1 = [[each.images[at].f1 for _, each in shared] for at in range(len(shared[0][1].images))]
    order = sorted(range(len(f1)), key=lambda at: min(f1[at]) - max(f1[at]))
    at = [index for index in order if max(f1[index]) > min(f1[index])][:_DISAGREEMENTS]
    if not at:
        return section("images", "Where they disagree", note("They find the same in every image.")), {}
    said = "The images whose F1, each run at its own chosen confidence, differs most."
    return section("images", "Where they disagree", note(said), controls(gallery), gallery.cards(at)), gallery.script()


def _on_the_same_images(runs: Sequence[tuple[str, Measured]]) -> list[tuple[str, Measured]] | None:
    """Return the runs with their images in the first one's order; None if these are others, or have other objects."""
    known = [{image.row["id"]: image for image in each.images} for _, each in runs]
    first = list(known[0])
    contents = [{at: (image.name, len(image.objects)) for at, image in images.items()} for images in known]
    if (
        any(each != contents[0] for each in contents)
        or len({tuple(row.category_id for row in each.classes) for _, each in runs}) > 1
    ):
        return None
    return [
        (name, replace(each, images=tuple(images[at] for at in first)))
        for (name, each), images in zip(runs, known, strict=True)
    ]
