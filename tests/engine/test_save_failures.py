"""A training whose checkpoints cannot be written ends, sooner if nothing of it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.save_failures import SaveFailures
from utils.errors import UserError

RUN = Path("run")


def test_what_was_written_is_not_failing() -> None:
    failures = SaveFailures(RUN, patience_s=0)
    for name, is_written in (("last.pt", True), ("last.pt", False), ("best.pt", False), ("last.pt", True)):
        failures.note(name, is_written=is_written)
    assert failures.failing == ("best.pt",)
    assert failures.words() == "run: best.pt could not be written; make room, and go on with --resume run"


def test_a_run_of_which_nothing_was_saved_ends_after_five_failures_of_any_file() -> None:
    failures = SaveFailures(RUN, patience_s=3600)
    for name in ("last.pt", "last.pt", "best.pt", "last.pt"):
        failures.note(name, is_written=False)
    with pytest.raises(UserError, match=r"^run: nothing that is trained here can be saved, in 5 tries"):
        failures.note("best.pt", is_written=False)


def test_a_run_that_was_saved_goes_on_for_its_patience_and_some_failures() -> None:
    quick, patient = SaveFailures(RUN, patience_s=0), SaveFailures(RUN, patience_s=3600)
    for failures in (quick, patient):
        failures.note("last.pt", is_written=True)
        for _ in range(19):
            failures.note("last.pt", is_written=False)
    patient.note("last.pt", is_written=False)
    with pytest.raises(UserError, match=r"^run: last\.pt could not be written; .* --resume run, in 20 tries$"):
        quick.note("last.pt", is_written=False)
