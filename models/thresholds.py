"""Scores from which detections count, chosen on validation images (`evaluation/best_thresholds.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

_NAMED = 6  # classes in a line


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """A score, above which detections count, with their precision, recall and F1 on validation images; all in 0..1.

    Raises TypeError or ValueError for other values.
    """

    confidence: float
    precision: float
    recall: float
    f1: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{each.name} is {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{each.name} is {value}, not in 0..1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The threshold for all classes in common, and that of each class, by name; a class may be missing."""

    common: Threshold
    classes: Mapping[str, Threshold]

    def confidences(self, class_names: Sequence[str]) -> tuple[float, ...]:
        """Return each class's; for one that is missing the common one."""
        return tuple(self.classes.get(name, self.common).confidence for name in class_names)

    def words(self, class_names: Sequence[str]) -> str:
        """Return such as "0.310 (cat 0.280, dog 0.350), the best by F1 ...", for the console."""
        values = self.confidences(class_names)
        each = ", ".join(f"{name} {value:.3f}" for name, value in zip(class_names, values, strict=True))
        of_classes = each if len(values) <= _NAMED else f"by class from {min(values):.3f} to {max(values):.3f}"
        best = "the best by F1 on validation images; --confidence sets another"
        return f"{self.common.confidence:.3f} ({of_classes}), {best}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.common), "classes": {name: asdict(each) for name, each in self.classes.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Thresholds:
        """Return what `to_json` was called on. Raises KeyError, TypeError or ValueError for anything else."""
        common, classes = _threshold(content), content["classes"]
        if not isinstance(classes, Mapping):
            raise TypeError("classes are no mapping")
        return cls(common=common, classes={str(name): _threshold(each) for name, each in classes.items()})


def _threshold(content: object) -> Threshold:
    if not isinstance(content, Mapping):
        raise TypeError("a threshold is no mapping")
    return Threshold(**{each.name: content[each.name] for each in fields(Threshold)})
