"""report.html, one file that needs nothing else, and a model card beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from evaluation.report import comparison, sections
from evaluation.report.card import MARK, model_card
from evaluation.report.facts import Run, read_run
from evaluation.report.markup import Markup, element, joined, note, percent, script_json, section, table, text
from utils.atomic_file import warn_on_disk_error, write_text
from utils.memory import peak_memory
from utils.printable import printable

_HERE = Path(__file__).parent


def write_report(folder: Path, defaults: Mapping[str, Any]) -> None:
    """Write report.html, and README.md of a training, into a run folder; say in a line what went wrong, if it did.

    Of several domains each has a report in its own folder. defaults: of the settings, to show those that differ.
    resources.json gets the most memory that was in use in this process, which has trained or evaluated.
    """
    try:
        peak = peak_memory().strip(", ").removesuffix(" so far")
        with warn_on_disk_error(folder / "resources.json"):
            write_text(folder / "resources.json", json.dumps({"peak_memory": peak}) + "\n")
        with warn_on_disk_error(folder / "report.html"):
            make_report(folder, defaults)
    except Exception as error:  # the work is done and saved: whatever is odd about it must not end in a traceback
        reason = f"{type(error).__name__}: {error}"
        print(printable(f"error: {folder / 'report.html'} was not written ({reason})"), file=sys.stderr)


def make_report(folder: Path, defaults: Mapping[str, Any]) -> None:
    """Do what `write_report` does. Raises UserError if the folder is none of a run, and OSError."""
    run = read_run(folder, defaults)
    for name in run.domains:
        if Path(name).name == name and (folder / name / "metrics.json").is_file():  # it may be deleted, or elsewhere
            make_report(folder / name, defaults)
    write_text(folder / "report.html", single_page(run))
    card = folder / "README.md"
    with suppress(OSError):
        if card.is_file() and not card.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            return  # somebody's own
    if run.is_training:
        write_text(card, model_card(run))


def make_comparison(folders: Sequence[Path], defaults: Mapping[str, Any], path: Path) -> None:
    """Write a page of several runs. Raises UserError, and OSError."""
    runs = [read_run(folder, defaults) for folder in folders]
    write_text(path, comparison_page(runs))


def single_page(run: Run) -> str:
    """Return the HTML of one run."""
    gallery, script = sections.images(run)
    parts = [
        *map(note, run.notes),
        _domains(run),
        sections.curves([run]),
        sections.classes(run),
        sections.errors(run),
        gallery,
        sections.health(run),
        sections.data(run),
        sections.speed(run),
        sections.setup(run),
        sections.onward(run),
    ]
    return _page(run.name, sections.header(run), parts, script)


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the HTML of several runs."""
    names = comparison.named_apart(runs)
    gallery, script = comparison.images(runs, names)
    lead = [
        element("p", element("b", name), ": ", sections.sentence(run)) for name, run in zip(names, runs, strict=True)
    ]
    parts = [
        comparison.differences(runs, names),
        sections.curves(runs),
        comparison.classes(runs, names),
        comparison.errors(runs, names),
        gallery,
    ]
    return _page(" and ".join(names), joined(lead), parts, script)


def _domains(run: Run) -> Markup:
    rows = [
        (element("a", name, href=f"{quote(name)}/report.html"), percent(stats.get("AP")), percent(stats.get("AP50")))
        for name, stats in run.domains.items()
    ]
    return (
        section("domains", "Domains", table(("data set", "AP", "AP50"), rows, class_="numbers")) if rows else Markup("")
    )


def _page(title: str, head: Markup, parts: Sequence[Markup], script: dict[str, Any]) -> str:
    style, program, page = ((_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    # Only this program runs: what escaping might miss is not executed either, and nothing is loaded.
    allowed = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    return Template(page).substitute(
        title=text(title),
        allowed=allowed,
        style=style,
        head=head,
        parts=joined(parts),
        data=script_json(script),
        program=program,
    )
