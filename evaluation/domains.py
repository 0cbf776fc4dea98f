"""Evaluation of a network that was trained on several domains: each domain's images, with its norms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from evaluation.best_thresholds import best_thresholds
from evaluation.coco_map import CocoTable, per_cent
from evaluation.evaluator import Evaluator
from models.detector import Detector
from models.norms.domains import choose
from models.thresholds import Thresholds
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainTable:
    """COCO's numbers of each domain, by its name; AP and AP50 are means over the domains.

    thresholds: on the images of all domains, where they were computed.
    """

    tables: Mapping[str, CocoTable]
    thresholds: Thresholds | None = None

    @property
    def AP(self) -> float:
        return fmean(table.AP for table in self.tables.values())

    @property
    def AP50(self) -> float:
        return fmean(table.AP50 for table in self.tables.values())

    def words(self) -> str:
        """Return such as "AP 30.0  AP50 50.0 (mean of a: AP 20.0  AP50 40.0, b: AP 40.0  AP50 60.0)", in per cent."""
        each = ", ".join(f"{name}: {table.words()}" for name, table in self.tables.items())
        return f"AP {per_cent(self.AP)}  AP50 {per_cent(self.AP50)} (mean of {each})"

    def summary(self) -> str:
        """Return each domain's twelve lines, and the mean."""
        parts = [f"{name}:\n{table.summary()}" for name, table in self.tables.items()]
        return "\n\n".join([*parts, self.words()])

    def class_table(self) -> str:
        """Return each domain's table of classes."""
        return "\n\n".join(f"{name}:\n{table.class_table()}" for name, table in self.tables.items())


class DomainEvaluator:
    """Evaluators of one detector, by the name of the domain whose images they have, in the order of the domains."""

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self.evaluators = evaluators

    @property
    def detector(self) -> Detector:
        return next(iter(self.evaluators.values())).detector

    def measure(self, *, progress: bool = False, show: Callable[[np.ndarray], None] | None = None) -> DomainTable:
        """Compute COCO's AP of each domain. progress, show: see `Evaluator.detect`; show: of the first domain."""
        return self._each(lambda domain, evaluator: evaluator.measure(progress=progress, show=None if domain else show))

    def report(self, folder: Path) -> DomainTable:
        """Compute COCO's AP, and write what an `Evaluator` writes into a folder per domain, and the means beside."""
        names = list(self.evaluators)
        table = self._each(lambda domain, evaluator: evaluator.report(folder / names[domain]))
        if ranks.is_rank_zero():
            thresholds = best_thresholds([each.matches for each in table.tables.values() if each.matches is not None])
            table = replace(table, thresholds=thresholds)
            common = None if thresholds is None else thresholds.to_json()
            means = {"AP": table.AP, "AP50": table.AP50, "thresholds": common}
            stats = {name: each.metrics() for name, each in table.tables.items()}
            with warn_on_disk_error(folder / "metrics.json"):
                write_text(folder / "metrics.json", json.dumps({**means, "domains": stats}, indent=2))
        return table

    def _each(self, measure: Callable[[int, Evaluator], CocoTable]) -> DomainTable:
        tables = {}
        for domain, (name, evaluator) in enumerate(self.evaluators.items()):
            choose(self.detector.network, domain)
            tables[name] = measure(domain, evaluator)
        return DomainTable(tables=tables)
