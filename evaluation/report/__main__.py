"""Make the report of a run again, or one of several: `python -m evaluation.report RUN...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from evaluation.report.report import make_comparison, make_report
from options import EvaluateOptions, TrainOptions
from utils.console import say
from utils.flags import flatten, parse_flags, resolve
from utils.knob import knob
from utils.page import run_page


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """python -m evaluation.report

    Make report.html, and README.md of a training, from the files of a run folder. Of several folders make one page that
    compares them: curves over each other, differences to the first, images where they disagree most.
    """

    runs: tuple[str, ...] = knob(MISSING, "folders of train.py or evaluate.py", unit="RUN", positional=True)
    out: str | None = knob(None, "file for the page of several runs (default: comparison.html)", unit="FILE")


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(ReportOptions, parse_flags(ReportOptions, argv))
    folders = [Path(run) for run in options.runs]
    is_training = (folders[0] / "results.csv").is_file()
    defaults = flatten(TrainOptions() if is_training else EvaluateOptions(weights=""))
    path = folders[0] / "report.html"
    if len(folders) == 1 and options.out is None:
        make_report(folders[0], defaults)
    else:
        path = Path(options.out or "comparison.html")
        make_comparison(folders, defaults, path)
    say("report", str(path))


if __name__ == "__main__":
    run_page(main)
