"""Evaluation of a network that was trained on several domains: each domain's images, with its norms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from evaluation.coco_map import CocoTable
from evaluation.evaluator import Evaluator
from models.detector import Detector
from models.norms.domains import choose
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainTable:
    """COCO's numbers of each domain, by its name; AP and AP50 are means over the domains."""

    tables: Mapping[str, CocoTable]

    @property
    def AP(self) -> float:
        return fmean(table.AP for table in self.tables.values())

    @property
    def AP50(self) -> float:
        return fmean(table.AP50 for table in self.tables.values())

    def words(self) -> str:
        """Return such as "AP 0.300  AP50 0.500 (mean of a: AP 0.200  AP50 0.400, b: AP 0.400  AP50 0.600)"."""
        each = ", ".join(f"{name}: {table.words()}" for name, table in self.tables.items())
        return f"AP {self.AP:.3f}  AP50 {self.AP50:.3f} (mean of {each})"

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
            means = {"AP": table.AP, "AP50": table.AP50}
            stats = {name: each.stats for name, each in table.tables.items()}
            with warn_on_disk_error(folder / "metrics.json"):
                write_text(folder / "metrics.json", json.dumps({**means, "domains": stats}, indent=2))
        return table

    def _each(self, measure: Callable[[int, Evaluator], CocoTable]) -> DomainTable:
        tables = {}
        for domain, (name, evaluator) in enumerate(self.evaluators.items()):
            choose(self.detector.network, domain)
            tables[name] = measure(domain, evaluator)
        return DomainTable(tables=tables)
