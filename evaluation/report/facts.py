"""What the files of a run folder say, for its report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.coco_backends import run_coco_eval
from evaluation.coco_results import CocoResults, positions_by_image
from evaluation.confusion import confusion_matrix
from evaluation.error_types import CORRECT, ErrorAnalysis, find_errors
from evaluation.report.markup import DASH, percent
from utils.errors import UserError
from utils.printable import printable

METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_S": "AP small",
    "AP_M": "AP medium",
    "AP_L": "AP large",
}  # key in metrics.json -> name
USUAL_CONFIDENCE = 0.25  # where none was chosen
_NOT_LEARNED = ("__metadata__", "running_mean", "running_var", "num_batches_tracked")
_SIZES = ("small", "medium", "large")  # COCO's areas, after all


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFacts:
    """A class of the data set: its objects, and AP, AP50 and AP by size, in 0..1, -1 where there is no object."""

    name: str
    category_id: int
    objects: int
    AP: float
    AP50: float
    by_size: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The confidence from which on a detection counts, for all classes and for each, with precision, recall and f1.

    is_chosen: whether metrics.json had it; otherwise it is the usual one, with nothing measured there.
    """

    common: dict[str, float]
    classes: dict[str, dict[str, float]]
    is_chosen: bool

    @property
    def confidence(self) -> float:
        return self.common["confidence"]

    def of_class(self, name: str) -> float:
        return self.classes.get(name, self.common)["confidence"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageFacts:
    """An image: its annotations and detections by index; what was found, missed and wrong at the thresholds."""

    row: Mapping[str, Any]
    objects: np.ndarray
    detections: np.ndarray
    found: int
    missed: int
    wrong: int

    @property
    def path(self) -> str:
        return str(self.row.get("path", ""))

    @property
    def name(self) -> str:
        return printable(str(self.row.get("file_name") or self.row["id"]))

    @property
    def hw(self) -> tuple[int, int] | None:
        match self.row.get("height"), self.row.get("width"):
            case int(height), int(width) if height > 0 and width > 0:
                return height, width
        return None

    @property
    def f1(self) -> float:
        """1 for an image without objects and detections: nothing is wrong with it."""
        total = 2 * self.found + self.missed + self.wrong
        return 2 * self.found / total if total else 1.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """An evaluation, from ground_truth.json and detections.json.

    truth: COCO's form. precision: (101, C) at IoU 0.5, by `classes`. confusion: see `confusion_matrix`, of what is
    shown. is_shown: (D,) whether a detection reaches its class's threshold.
    """

    truth: dict[str, Any]
    results: CocoResults
    classes: tuple[ClassFacts, ...]
    precision: np.ndarray
    errors: ErrorAnalysis
    confusion: np.ndarray
    thresholds: Thresholds
    is_shown: np.ndarray
    images: tuple[ImageFacts, ...]

    @property
    def data(self) -> str:
        """The data set and split in words."""
        info = self.truth.get("info")
        return " ".join(str(info[key]) for key in ("data", "split") if key in info) if isinstance(info, dict) else ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """A run folder of train.py or evaluate.py; what it lacks is empty.

    stats: metrics.json. changed: settings that differ from the defaults. epochs, health: the rows of results.csv and
    norm_health.csv with their finite numbers. problems: the lines of data_problems.txt. domains: by name, the AP of
    each, whose own files are in folders of these names. notes: why something is not there.
    """

    folder: Path
    stats: dict[str, Any]
    settings: dict[str, Any]
    changed: dict[str, Any]
    epochs: list[dict[str, Any]]
    health: list[dict[str, Any]]
    problems: list[str]
    measured: Measured | None
    parameters: int | None
    peak_memory: str
    notes: list[str]

    @property
    def name(self) -> str:
        return printable(self.folder.resolve().name)

    @property
    def is_training(self) -> bool:
        return bool(self.epochs) or "run_id" in self.settings

    @property
    def interval(self) -> str:
        """AP's 95 % interval over images, such as "40.0 to 46.0", or "" if there is none."""
        limits: Any = self.stats.get("AP_interval")
        is_pair = isinstance(limits, list) and len(limits) == 2 and all(isinstance(each, float) for each in limits)
        return " to ".join(map(percent, limits)) if is_pair else ""

    @property
    def seconds(self) -> float:
        """Training time of all epochs, without evaluations; 0 if unknown."""
        return sum(row["seconds"] for row in self.epochs if isinstance(row.get("seconds"), float))

    @property
    def domains(self) -> dict[str, dict[str, float]]:
        domains = self.stats.get("domains")
        found = domains.items() if isinstance(domains, dict) else ()
        return {name: stats for name, stats in found if isinstance(stats, dict)}


def read_run(folder: Path, defaults: Mapping[str, Any]) -> Run:
    """Read a run folder. defaults: of the settings. Raises UserError if it is none of a training or an evaluation."""
    settings, stats = (_read_dict(folder / name) for name in ("settings.json", "metrics.json"))
    epochs = _read_rows(folder / "results.csv")
    if not (settings or stats or epochs):
        raise UserError(
            f"{folder}: has no settings.json, metrics.json or results.csv: name a folder that train.py or "
            "evaluate.py wrote"
        )
    usual = json.loads(json.dumps(dict(defaults), default=str))
    idle = {"out", "resume", "max_steps" if settings.get("epochs") or settings.get("time_budget") else ""}
    measured, notes = None, []
    try:
        measured = _measure(folder, stats)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if not isinstance(stats.get("domains"), dict):
            missing = [name for name in ("ground_truth.json", "detections.json") if not (folder / name).is_file()]
            why = f"{' and '.join(missing)} not there" if missing else f"{type(error).__name__}: {error}"
            notes = [f"Images, errors and curves need ground_truth.json and detections.json ({why}): evaluate again."]
    problems = folder / "data_problems.txt"
    return Run(
        folder=folder,
        stats=stats,
        settings=settings,
        changed={
            name: value
            for name, value in settings.items()
            if name in usual and name not in idle and value not in (usual[name], None, [])
            if usual[name] is not None or value is not False
        },
        epochs=epochs,
        health=_read_rows(folder / "norm_health.csv"),
        problems=problems.read_text(encoding="utf-8", errors="replace").splitlines() if problems.is_file() else [],
        measured=measured,
        parameters=_parameters(folder / "best.safetensors"),
        peak_memory=str(_read_dict(folder / "resources.json").get("peak_memory", "")),
        notes=notes,
    )


def setting_text(name: str, value: Any) -> str:
    """Return a setting's value as it is typed; a dash for none."""
    if isinstance(value, list):
        return ("x" if name == "image_size" else " ").join(map(str, value)) or DASH
    return DASH if value is None else {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _measure(folder: Path, stats: Mapping[str, Any]) -> Measured:
    """Raises OSError and what malformed files lead to."""
    truth = json.loads((folder / "ground_truth.json").read_text(encoding="utf-8"))
    if not np.isfinite([row["bbox"] for row in truth["annotations"]]).all():
        raise ValueError("a box is not finite")
    results = CocoResults.from_rows(json.loads((folder / "detections.json").read_text(encoding="utf-8")))
    classes, precision = _classes(truth, results)
    errors, thresholds = find_errors(truth, results), _thresholds(stats)
    limit = {row.category_id: thresholds.of_class(row.name) for row in classes}
    limits = np.array([limit.get(label, USUAL_CONFIDENCE) for label in results.category_ids.tolist()])
    is_shown = results.scores >= limits
    return Measured(
        truth=truth,
        results=results,
        classes=classes,
        precision=precision,
        errors=errors,
        confusion=confusion_matrix(truth, results.where(np.flatnonzero(is_shown)), min_score=0.0),
        thresholds=thresholds,
        is_shown=is_shown,
        images=_images(truth, results, errors, is_shown),
    )


def _classes(truth: dict[str, Any], results: CocoResults) -> tuple[tuple[ClassFacts, ...], np.ndarray]:
    """Return the classes by ascending id, and (101, C) their precision at IoU 0.5."""
    objects = {**truth, "annotations": [dict(row, id=n) for n, row in enumerate(truth["annotations"], start=1)]}
    found = [
        dict(row, id=number, iscrowd=0, area=row["bbox"][2] * row["bbox"][3])
        for number, row in enumerate(results.rows(), start=1)
    ]
    images = [image["id"] for image in truth["images"]]
    _, precision = run_coco_eval(objects, {**truth, "annotations": found}, images, backend="auto")
    precision = precision[..., 2]  # (IoU, recall, class, area): most detections
    counted = [row["category_id"] for row in truth["annotations"] if not row["iscrowd"]]
    return tuple(
        ClassFacts(
            name=category["name"],
            category_id=category["id"],
            objects=counted.count(category["id"]),
            AP=_mean_known(precision[:, :, column, 0]),
            AP50=_mean_known(precision[0, :, column, 0]),
            by_size={name: _mean_known(precision[:, :, column, area]) for area, name in enumerate(_SIZES, start=1)},
        )
        for column, category in enumerate(sorted(truth["categories"], key=lambda category: category["id"]))
    ), precision[0, :, :, 0]


def _mean_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _thresholds(stats: Mapping[str, Any]) -> Thresholds:
    chosen = stats.get("thresholds") or {}
    common = _numbers(chosen)
    if "confidence" not in common:
        return Thresholds(common={"confidence": USUAL_CONFIDENCE}, classes={}, is_chosen=False)
    classes = {name: _numbers(each) for name, each in chosen.get("classes", {}).items()}
    classes = {name: each for name, each in classes.items() if "confidence" in each}
    return Thresholds(common=common, classes=classes, is_chosen=True)


def _images(
    truth: Mapping[str, Any], results: CocoResults, errors: ErrorAnalysis, is_shown: np.ndarray
) -> tuple[ImageFacts, ...]:
    ids = [image["id"] for image in truth["images"]]
    owner = np.array([row["image_id"] for row in truth["annotations"]], np.int64)
    countable = np.array([not row["iscrowd"] for row in truth["annotations"]], bool)
    is_found = is_shown & (errors.types == CORRECT)
    is_wrong = is_shown & (errors.types >= 0) & ~errors.is_ignored
    rows = []
    for image, objects, detections in zip(
        truth["images"], positions_by_image(owner, ids), positions_by_image(results.image_ids, ids), strict=True
    ):
        found = int(is_found[detections].sum())
        missed, wrong = int(countable[objects].sum()) - found, int(is_wrong[detections].sum())
        rows.append(
            ImageFacts(row=image, objects=objects, detections=detections, found=found, missed=missed, wrong=wrong)
        )
    return tuple(rows)


def _read_dict(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} if the file is not there or no such thing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV with their finite numbers, and text that is none; [] if the file is not there."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
    return [{name: each for name, text in row.items() if name and (each := _cell(text)) is not None} for row in rows]


def _cell(text: Any) -> float | str | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return text if isinstance(text, str) and text else None
    return number if math.isfinite(number) else None


def _numbers(values: Any) -> dict[str, float]:
    found = values.items() if isinstance(values, dict) else ()
    return {name: float(value) for name, value in found if isinstance(value, int | float) and math.isfinite(value)}


def _parameters(path: Path) -> int | None:
    """Return how many numbers the weights are, from the header of best.safetensors."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        learned = (each for name, each in header.items() if not name.endswith(_NOT_LEARNED))
        return sum(math.prod(each["shape"]) for each in learned)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
