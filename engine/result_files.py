"""results.csv, a row per epoch, results.png, which shows it, and norm_health.csv, a row per evaluation and layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from engine.csv_rows import CsvRows
from engine.events import Listener, Record, Run
from evaluation.plots import plot_results
from utils.atomic_file import warn_on_disk_error

COLUMNS = ("step", "epoch", "lr", "loss", "box", "objectness", "class", "AP", "AP50", "seconds")
HEALTH_COLUMNS = (
    *("epoch", "step", "layer", "mean_mismatch", "sigma_mismatch"),
    *("pooled_mean_mismatch", "pooled_sigma_mismatch"),
)


class ResultFiles(Listener):
    """Writes the files into `folder`. One that cannot be written, on a full disk, is reported in a line each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results = CsvRows(folder / "results.csv", COLUMNS)
        self._health = CsvRows(folder / "norm_health.csv", HEALTH_COLUMNS)

    def start(self, run: Run) -> None:
        """Drop the rows of later epochs, which a run that was killed had written."""
        for rows in (self._results, self._health):
            with warn_on_disk_error(rows.path):
                rows.drop_after(run.epochs_done)

    def epoch(self, record: Record) -> None:
        with warn_on_disk_error(self._results.path):
            self._results.add([{"step": record.step, "epoch": record.epoch, **record.scalars}])

    def evaluation(self, record: Record) -> None:
        place = {"epoch": record.epoch, "step": record.step}
        if record.norms:
            with warn_on_disk_error(self._health.path):
                self._health.add(place | asdict(layer) for layer in record.norms)

    def end(self) -> None:
        path = self.folder / "results.png"
        if self._results.path.exists():
            with warn_on_disk_error(path):
                plot_results(self._results.path, path)
