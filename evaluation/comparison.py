"""Two detectors on the same images: their difference in AP, and whether chance in the choice of images explains it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.image_set import ImageSet
from evaluation.bootstrap import Difference, difference, drawn_AP
from evaluation.coco_map import CocoTable, evaluate_coco, interval_text, per_cent
from evaluation.coco_results import CocoResults
from evaluation.ground_truth import measured_truth
from evaluation.matches import match_coco, mean_AP
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """B less A. tables: of A and B, on the same images. classes: by name, of those with objects."""

    tables: tuple[CocoTable, CocoTable]
    difference: Difference
    classes: dict[str, Difference]
    draws: int

    @classmethod
    def of(cls, one: CocoTable, other: CocoTable) -> Comparison:
        """Compare tables that have matches, on the same images. Raises UserError without objects."""
        assert one.matches is not None and other.matches is not None
        drawn_one, drawn_other = drawn_AP(one.matches, other.matches)
        images = one.matches.images_with_objects
        whole = difference(one.AP, other.AP, mean_AP(drawn_one), mean_AP(drawn_other), images=images)
        if whole is None:
            raise UserError("there is no object on the images: nothing can be compared")
        place = {row.name: column for column, row in enumerate(other.classes)}
        classes = {}
        for column, row in enumerate(one.classes):
            if row.boxes:
                theirs = place[row.name]
                columns = drawn_one[:, column], drawn_other[:, theirs]
                own = difference(row.AP, other.classes[theirs].AP, *columns, images=row.images)
                assert own is not None
                classes[row.name] = own
        return cls(tables=(one, other), difference=whole, classes=classes, draws=len(drawn_one))

    def sentence(self) -> str:
        """Return such as "B is better than A by 1.8 AP [0.4, 3.1], p = .01", in per cent."""
        found = self.difference
        if not found.is_shown:
            return f"no difference shown between A and B: {_signed(found)}, {p_text(found.p)}"
        better, worse, sign = ("B", "A", 1) if found.value > 0 else ("A", "B", -1)
        low, high = sorted(sign * end for end in found.interval)
        gain = f"{per_cent(sign * found.value)} AP {interval_text((low, high))}"
        return f"{better} is better than {worse} by {gain}, {p_text(found.p)}"

    def text(self) -> str:
        """Return a table of the classes, and the sentence."""
        rows = [["class", "AP of A", "AP of B", "B less A", "p"]]
        one, other = self.tables
        AP_of_other = {row.name: row.AP for row in other.classes}
        for row in one.classes:
            if (own := self.classes.get(row.name)) is not None:
                rows.append([row.name, per_cent(row.AP), per_cent(AP_of_other[row.name]), _signed(own), p_text(own.p)])
        whole = self.difference
        rows.append(["all", per_cent(one.AP), per_cent(other.AP), _signed(whole), p_text(whole.p)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([*lines, "", self.sentence()])

    def to_json(self) -> dict[str, Any]:
        """Return AP in 0..1."""
        sides = {
            name: {"AP": table.AP, "AP_interval": table.interval} for name, table in zip("AB", self.tables, strict=True)
        }
        classes = {name: asdict(each) for name, each in self.classes.items()}
        whole = {"difference": asdict(self.difference), "sentence": self.sentence()}
        return {**sides, **whole, "classes": classes, "draws": self.draws}


def p_text(p: float) -> str:
    """0.012 -> "p = .01", 0.002 -> "p < .01"."""
    return "p = 1" if p >= 0.995 else f"p = {p:.2f}".replace("0.", ".") if p >= 0.01 else "p < .01"


def _signed(found: Difference) -> str:
    return f"{100 * found.value:+.1f} {interval_text(found.interval)}"


def measure_detections(folder: Path, image_set: ImageSet, *, backend: str) -> CocoTable:
    """Measure the detections.json that an evaluation on this image set wrote into a folder, and match its boxes.

    Raises UserError if it is missing, damaged or of other images.
    """
    results, truth, image_ids = _read(folder, image_set), image_set.ground_truth(), image_set.image_ids
    table = evaluate_coco(truth, results, image_ids=image_ids, backend=backend)
    return table.with_matches(match_coco(truth, results, image_ids))


def _read(folder: Path, image_set: ImageSet) -> CocoResults:
    path, where = folder / "detections.json", f"{image_set.name} {image_set.split}"
    try:
        results = CocoResults.from_rows(json.loads(path.read_text(encoding="utf-8")))
        truth = measured_truth(image_set.ground_truth(), image_set)
        own = before = _objects(truth["annotations"], image_set)
        if (file := folder / "ground_truth.json").is_file():
            before = _objects(json.loads(file.read_text(encoding="utf-8"))["annotations"], image_set)
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}; evaluate.py and train.py write it") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: is no list of COCO results ({type(error).__name__}: {error})") from error
    is_foreign = ~np.isin(results.image_ids, image_set.image_ids)
    if is_foreign.any() or before != own:
        raise UserError(f"{path}: was not found on {where}: choose its data set and split with --data and --split")
    return results.where(np.isin(results.category_ids, image_set.category_ids))


def _objects(annotations: Iterable[Mapping[str, Any]], image_set: ImageSet) -> list[list[Any]]:
    """Return what an evaluation depends on of the annotations of the set's classes, sorted."""
    keys, known = ("image_id", "category_id", "bbox", "iscrowd"), set(image_set.category_ids)
    return sorted([row[key] for key in keys] for row in annotations if row["category_id"] in known)
