"""The sections of a single run's report, each of which is "" where there is nothing to say."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from evaluation.error_types import ERROR_TYPES
from evaluation.report.charts import Line, bars, line_chart
from evaluation.report.facts import ClassFacts, Measured, Run, setting_text
from evaluation.report.gallery import Gallery, best, worst
from evaluation.report.markup import DASH, Markup, element, joined, note, percent, section, table, unbroken
from models.detector import is_exported
from utils.console import counted
from utils.duration import in_words
from utils.flags import flag_of

CHANGED = "Settings that differ from the defaults (typed, from the cfg, or chosen)"
_WORST, _BEST = 20, 12
_FEW_CURVES = 20
_MATRIX_CLASSES = 12  # more do not fit beside each other
_CONFUSIONS, _PROBLEMS, _LAYERS = 10, 12, 5
_NONE_FOUND = "No object was found."
_CURVES = {  # title -> columns of results.csv, and whether they are shares
    "AP on the validation split": (("AP", "AP50"), True),
    "training loss per image": (("loss", "box", "objectness", "class"), False),
    "learning rate": (("lr",), False),
}
_EXPLAINED = {
    "classification": "right place, another class",
    "localization": "right class, box overlaps too little (IoU 0.1 to 0.5)",
    "both": "another class, and the box overlaps too little",
    "duplicate": "an object that a more confident detection has found",
    "background": "nothing is there",
    "missed": "objects that no detection, not even a wrong one, is near",
}


def header(run: Run) -> Markup:
    """What was trained on what, and the few numbers that one looks for first."""
    return joined((element("p", sentence(run), class_="lead"), element("div", *_tiles(run), class_="tiles")))


def sentence(run: Run) -> str:
    """Return such as "yolov4-pico with bn, trained for 2 epochs on digits. Measured on digits val: 200 images ..."."""
    settings, parts = run.settings, []
    data = settings.get("data", "")
    names = ", ".join(map(str, data)) if isinstance(data, list) else str(data)
    if run.is_training:
        network = str(settings.get("cfg", "")).replace("\\", "/").rpartition("/")[2].removesuffix(".cfg") or "a network"
        norm = f" with {settings['norm']}" if settings.get("norm") else ""
        start = f", from {settings['weights']}" if settings.get("weights") else ""
        epochs = f", trained for {counted(len(run.epochs), 'epoch')}" if run.epochs else ""
        parts.append(f"{network}{norm}{start}{epochs} on {names}." if names else f"{network}{norm}{start}{epochs}.")
    elif settings.get("weights"):
        parts.append(f"{settings['weights']}, evaluated on {names}.")
    if run.measured:
        objects = sum(row.objects for row in run.measured.classes)
        of = f"{counted(len(run.measured.images), 'image')} with {counted(objects, 'object')}"
        parts.append(f"Measured on {run.measured.data or 'images'}: {of} of {_classes_in_words(run.measured)}.")
    return " ".join(parts)


def _classes_in_words(measured: Measured) -> str:
    return counted(sum(row.objects > 0 for row in measured.classes), "class")


def _tiles(run: Run) -> list[Markup]:
    stats, tiles = run.stats, []
    if "AP" in stats:
        spread = f"95 %: {run.interval}" if run.interval else "IoU 0.50 to 0.95"
        tiles += [_tile("AP", percent(stats["AP"]), spread), _tile("AP50", percent(stats.get("AP50")), "IoU 0.50")]
    if run.measured and run.measured.thresholds.is_chosen:
        at = run.measured.thresholds.common
        said = f"at confidence {percent(at['confidence'], 0)} %"
        tiles += [_tile(name, percent(at[name]), said) for name in ("precision", "recall") if name in at]
    if run.seconds:
        tiles.append(_tile("training", in_words(run.seconds), counted(len(run.epochs), "epoch")))
    return tiles


def _tile(name: str, value: str, said: str) -> Markup:
    return element("div", element("span", name), element("b", value), element("small", unbroken(said)), class_="tile")


def setup(run: Run) -> Markup:
    """Settings that are not the defaults, and the machine."""
    if not run.settings:
        return Markup("")
    rows = [
        (element("code", flag_of(name)), element("code", setting_text(name, value)))
        for name, value in run.changed.items()
    ]
    machine = run.settings.get("environment")
    pairs = machine.items() if isinstance(machine, dict) else ()
    content = [
        note(f"{CHANGED}."),
        table(("setting", "value"), rows, class_="plain") if rows else note("All settings are the defaults."),
    ]
    if pairs:
        rest = table(("machine", ""), pairs, class_="plain")
        content.append(element("details", element("summary", "the machine and its software"), rest))
    return section("setup", "How it was made" if run.is_training else "How it was measured", *content)


def curves(runs: Sequence[Run]) -> Markup:
    """results.csv over the epochs, of one run or several over each other."""
    charts = []
    for title, (names, is_share) in _CURVES.items():
        shown = names if len(runs) == 1 else names[:1]
        lines = [
            _curve(run, name, name if len(runs) == 1 else run.name, number, 100 if is_share else 1)
            for number, (run, name) in enumerate((run, name) for run in runs for name in shown)
        ]
        charts.append(line_chart(title, lines, x="epoch", y="per cent" if is_share else "", from_zero=is_share))
    if not any(charts):
        return Markup("")
    return section("curves", "Over the epochs", element("div", *charts, class_="charts"))


def _curve(run: Run, column: str, name: str, number: int, scale: float) -> Line:
    rows = [row for row in run.epochs if _is_number(row.get(column)) and _is_number(row.get("epoch"))]
    ys = [scale * row[column] for row in rows]
    return Line(name=name, xs=[row["epoch"] for row in rows], ys=ys, style=f"line-{number % 4}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def classes(run: Run) -> Markup:
    """AP by class and size, precision over recall, and the thresholds."""
    if run.measured is None:
        return Markup("")
    measured, stats = run.measured, run.stats
    rows = [row for row in measured.classes if row.objects]
    if not rows:
        return section("classes", "Classes", note("The images have no objects, so there is no AP."))
    header = ("class", "objects", "AP", "AP50", "small", "medium", "large")
    total = ("all", sum(row.objects for row in rows), *(percent(stats.get(key)) for key in _KEYS))
    body = [total, *(_class_row(row) for row in sorted(rows, key=lambda row: -row.AP))] if len(rows) > 1 else [total]
    idle = len(measured.classes) - len(rows)
    said = [f"{counted(idle, 'class')} without objects here not listed. "] if idle else []
    sizes = "small: below 32 x 32 px of the image, large: from 96 x 96 px on; a dash: no such object. All in per cent."
    if measured.thresholds.common:
        sizes += " The dot counts all detections together, whatever their class, so it need not lie on a curve."
    return section(
        "classes",
        "By class and size",
        element("div", table(header, body, class_="numbers totals"), _pr_chart(run, rows), class_="beside"),
        note(*said, sizes),
        _threshold_table(run),
    )


_KEYS = ("AP", "AP50", "AP_S", "AP_M", "AP_L")


def _class_row(row: ClassFacts) -> tuple[Any, ...]:
    return (row.name, row.objects, *(percent(value) for value in (row.AP, row.AP50, *row.by_size.values())))


def _pr_chart(run: Run, rows: Sequence[ClassFacts]) -> Markup:
    assert run.measured is not None
    measured, recalls = run.measured, np.linspace(0, 100, 101).tolist()
    shown = [column for column, row in enumerate(measured.classes) if row.objects]
    faint = "faint" if len(shown) <= _FEW_CURVES else "faint faintest"
    each = [
        Line(
            name="" if number else "thin: each class",
            xs=recalls,
            ys=(100 * measured.precision[:, at]).tolist(),
            style=faint,
        )
        for number, at in enumerate(shown)
    ]
    mean = (100 * measured.precision[:, shown].mean(axis=1)).tolist()
    at, dots = measured.thresholds.common, []
    if {"precision", "recall"} <= at.keys():
        dots = [(100 * at["recall"], 100 * at["precision"], f"confidence {percent(at['confidence'], 0)} %")]
    lines = [*(each if len(each) > 1 else []), Line(name="mean of the classes", xs=recalls, ys=mean)]
    title = "precision over recall"
    return line_chart(
        title, lines, x="recall", y="per cent, at IoU 0.5", x_limits=(0, 100), y_limits=(0, 100), dots=dots
    )


def _threshold_table(run: Run) -> Markup:
    assert run.measured is not None
    thresholds = run.measured.thresholds
    if not thresholds.is_chosen:
        return note(
            f"No confidence was chosen for this network; {percent(thresholds.confidence, 0)} % is used on this page."
        )
    rows = [("all", thresholds.common), *thresholds.classes.items()]
    keys = ("confidence", "precision", "recall", "f1")
    body = [(name, *(percent(each.get(key)) for key in keys)) for name, each in rows]
    summary = element("summary", "chosen confidence, with precision and recall there")
    return element("details", summary, table(("class", *keys[:3], "F1"), body, class_="numbers"))


def errors(run: Run) -> Markup:
    """TIDE's six types, and which classes are taken for which."""
    if run.measured is None:
        return Markup("")
    found, shown = run.measured.errors, run.measured.errors.types[run.measured.is_shown]
    top = max(0.05, *found.costs.values())
    counts = [*((shown == kind).sum() for kind in range(len(ERROR_TYPES) - 1)), found.counts["missed"]]
    rows = [
        (name, found.costs[name], percent(found.costs[name]), f"{count:,}: {_EXPLAINED[name]}")
        for name, count in zip(ERROR_TYPES, counts, strict=True)
    ]
    content = [
        note(
            "What AP50 would gain, in per cent, if all errors of one kind were corrected and no other (TIDE, Bolya et "
            f"al. 2020; its AP50 is {percent(found.AP)}). Beside it how many there are at the chosen confidence."
        ),
        bars(rows, longest=top),
    ]
    both = element("div", element("div", *content), element("div", _confusion(run.measured)), class_="beside")
    return section("errors", "What is wrong", both)


def _confusion(measured: Measured) -> Markup:
    names = [*(row.name for row in measured.classes), "background"]
    matrix, background = measured.confusion, len(names) - 1
    own, common = measured.thresholds.classes, percent(measured.thresholds.confidence, 0)
    since = "each class's own chosen confidence" if own else f"a confidence of {common} %"
    said = unbroken(f"Detections from {since} on, matched at IoU 0.5.")
    parts = [element("h3", "Confusion"), note(said)]
    if background <= _MATRIX_CLASSES:
        share = matrix / np.maximum(matrix.sum(axis=0, keepdims=True), 1)
        body = [
            (names[row], *(_cell(int(matrix[row, column]), share[row, column]) for column in range(background + 1)))
            for row in range(background + 1)
        ]
        parts += [table(("found as \\ is", *names), body, class_="matrix")]
    pairs = [
        (int(matrix[row, column]), row, column)
        for row, column in np.argwhere(matrix[:background, :background]).tolist()
        if row != column
    ]
    pairs = sorted(pairs, reverse=True)[:_CONFUSIONS]
    if not pairs:
        return joined((*parts, note("No class was taken for another.")))
    lines = [
        element("li", element("b", names[column]), " taken for ", element("b", names[row]), f": {count}")
        for count, row, column in pairs
    ]
    return joined((*parts, element("ul", *lines, class_="pairs")))


def _cell(count: int, share: float) -> Markup:
    ink = "dark" if share > 0.55 else "light"
    return element("span", count or "\N{MIDDLE DOT}", style=f"--share:{share:.2f}", class_=ink)


def images(run: Run) -> tuple[Markup, dict[str, Any]]:
    """Return the galleries, and what report.js draws into them."""
    if run.measured is None or not run.measured.images:
        return Markup(""), {}
    gallery = Gallery([(run.name, run.measured)])
    bad = worst(run.measured, _WORST)
    good = best(run.measured, _BEST, without=bad)
    none = (
        "In no other image was an object found." if any(image.found for image in run.measured.images) else _NONE_FOUND
    )
    parts = [
        element("h3", "Worst"),
        note("Lowest F1 at the chosen confidence first."),
        gallery.cards(bad) if bad else note("Every object was found, and nothing else."),
        element("h3", "Best"),
        gallery.cards(good) if good else note(none),
    ]
    return section("images", "Images", controls(gallery), *parts), gallery.script()


def controls(gallery: Gallery) -> Markup:
    """Return switches and the slider that report.js listens to, and a legend."""
    first = gallery.runs[0][1].thresholds
    switches = [
        _switch("truth", "ground truth", True),
        _switch("found", "detections", True),
        _switch("names", "names", False),
    ]
    if first.classes:
        switches.append(_switch("own", "each class's own threshold", True))
    if len(gallery.runs) > 1:
        choices = [element("option", name, value=number) for number, (name, _) in enumerate(gallery.runs)]
        switches.append(element("label", "of ", element("select", *choices, id="run")))
    slider = element(
        "input", type="range", id="threshold", min=0.01, max=1, step=0.001, value=f"{first.confidence:.3f}"
    )
    value = element("output", f"{100 * first.confidence:.0f} %", id="threshold-value")
    legend = [
        element("span", element("i", class_=f"key {kind}"), said)
        for kind, said in (("truth", "object"), ("missed", "missed object"), ("right", "right"), ("wrong", "wrong"))
    ]
    return joined(
        (
            element("div", *switches, element("label", "confidence ", slider, value), class_="controls"),
            element("div", *legend, class_="legend"),
            element("noscript", note("Boxes are drawn by JavaScript, which is off.")),
        )
    )


def _switch(name: str, said: str, is_on: bool) -> Markup:
    checked = {"checked": ""} if is_on else {}
    return element("label", element("input", type="checkbox", id=name, **checked), " ", said)


def data(run: Run) -> Markup:
    """data_problems.txt, by kind."""
    if not run.is_training:
        return Markup("")
    kinds = Counter(line.partition(": ")[0] for line in run.problems)
    if not kinds:
        return section("data", "Data set", note("No problem was found when it was read."))
    rows = []
    for kind, count in kinds.most_common(_PROBLEMS):
        first = next(line.partition(": ")[2] for line in run.problems if line.startswith(kind))
        rows.append((kind, count, element("code", first)))
    listed = f"All of them are in {run.folder / 'data_problems.txt'}; python -m data.doctor says what to do."
    return section("data", "Data set", table(("problem", "times", "first"), rows, class_="plain"), note(listed))


def health(run: Run) -> Markup:
    """norm_health.csv: each of its numbers over the steps, the median and the worst layer."""
    rows = [row for row in run.health if _is_number(row.get("step")) and "layer" in row]
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    names = [name for name in columns if name not in ("epoch", "step", "layer")]
    if not names:
        return Markup("")
    steps = sorted({row["step"] for row in rows})
    charts, last = [], [row for row in rows if row["step"] == steps[-1]]
    for name in names:
        at = {step: [row[name] for row in rows if row["step"] == step and _is_number(row.get(name))] for step in steps}
        known = [step for step in steps if at[step]]
        middle = Line(name="median layer", xs=known, ys=[median(at[step]) for step in known], style="line-1")
        most = Line(name="worst layer", xs=known, ys=[max(at[step]) for step in known])
        charts.append(line_chart(name.replace("_", " "), [most, middle], x="step"))
    last = sorted((row for row in last if _is_number(row.get(names[0]))), key=lambda row: -row[names[0]])[:_LAYERS]
    cells = [
        (f"{row['layer']:g}" if _is_number(row["layer"]) else row["layer"], *(_short(row.get(name)) for name in names))
        for row in last
    ]
    return section(
        "norm",
        "Health of the norm",
        note(
            "How far the statistics of a mini-batch, and pooled ones where the norm pools, are from the running "
            "statistics, which hold after the training."
        ),
        element("div", *charts, class_="charts"),
        table(("worst layers at the end", *(name.replace("_", " ") for name in names)), cells, class_="numbers"),
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else DASH if value is None else str(value)


def speed(run: Run) -> Markup:
    """Time, memory and size."""
    rows: list[tuple[str, str]] = []
    timed = [row for row in run.epochs if _is_number(row.get("seconds"))]
    if timed:
        seconds = run.seconds
        rows.append(("training, without evaluations", f"{in_words(seconds)}, {seconds / len(timed):.0f} s an epoch"))
        counts: list[Any] = [timed[-1].get("step"), run.settings.get("batch_size")]
        if all(map(_is_number, counts)) and seconds > 0:
            rows.append(("images a second in training", f"{math.prod(counts) / seconds:.1f}"))
    if run.peak_memory:
        rows.append(("most memory in use", run.peak_memory))
    if run.parameters:
        rows.append(("parameters", f"{run.parameters:,}"))
    weights = run.folder / "best.pt"
    if weights.is_file():
        rows.append(("best.pt", f"{weights.stat().st_size / 2**20:.1f} MiB"))
    return section("speed", "Speed and memory", table(("", ""), rows, class_="plain")) if rows else Markup("")


def onward(run: Run) -> Markup:
    """Commands to type next."""
    rows = [element("div", element("small", what), element("pre", command)) for what, command in commands(run)]
    return section("next", "How to go on", *rows) if rows else Markup("")


def commands(run: Run) -> list[tuple[str, str]]:
    """Return what each command does, and the command."""
    folder, settings = shlex.quote(str(run.folder)), run.settings
    weights = f"{folder}/best.pt" if run.is_training else shlex.quote(str(settings.get("weights") or ""))
    if weights == "''":
        return []
    needed = {name: settings.get(name) for name in ("cfg", "names", "domain")}  # to read the weights
    if run.is_training:
        is_own = "own" in (settings.get("domain_statistics"), settings.get("domain_affine"))
        needed = {"domain": next(iter(run.domains), None) if is_own else None}
    weights += "".join(f" {flag_of(name)} {shlex.quote(str(value))}" for name, value in needed.items() if value)
    data = settings.get("data") or "PATH"
    data = shlex.quote(str(data[0] if isinstance(data, list) else data))
    found = [("go on after an interruption", f"python train.py --resume {folder}")] if run.is_training else []
    found += [
        ("measure on other images", f"python evaluate.py --weights {weights} --data {data} --split test"),
        ("detect in images and videos", f"python detect.py --weights {weights} IMAGES"),
    ]
    if run.is_training or not is_exported(str(settings["weights"])):
        told = "take it to another program, and prove that it does the same"
        found.append((told, f"python export.py --weights {weights} --to onnx --check {data}"))
    return [*found, ("make this page again", f"python -m evaluation.report {folder}")]
