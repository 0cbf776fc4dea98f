"""Evaluation of a detector on an image set: COCO's AP (computed in `coco_map.py`), and the files that show it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data.image_set import ImageSet
from evaluation.coco_backends import choose_backend
from evaluation.coco_map import CocoTable, evaluate_coco
from evaluation.coco_results import CocoResults, merged, results_of
from evaluation.confusion import confusion_matrix
from evaluation.ground_truth import measured_truth
from evaluation.inference import detect_batches, image_batches
from evaluation.matches import match_coco
from evaluation.plots import plot_confusion, plot_pr_curves
from models.detector import Detector
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text
from utils.draw import draw_batch, write_png
from utils.errors import UserError
from utils.stop import Stop, Stopped

_SHOWN_SCORE = 0.25  # of the detections that are drawn


class Evaluator:
    """A detector and the image set that it is evaluated on.

    With several ranks all of them call each method; each rank detects in its share of the images, rank 0 measures and
    writes, and the numbers are those of a single process.
    """

    def __init__(
        self,
        detector: Detector,
        image_set: ImageSet,
        *,
        batch_size: int,
        workers: int,
        rect: bool = False,
        backend: str = "auto",
        stop: Stop | None = None,
    ) -> None:
        """rect: see `make_eval_loader`. backend: of `coco_backends.BACKENDS`. stop: is heeded between batches.

        Raises UserError if the backend is not installed or the classes do not match (`category_of_label`).
        """
        image_set = _without_idle_classes(image_set, detector.class_names)
        self.detector, self.image_set, self.backend, self.stop = detector, image_set, choose_backend(backend), stop
        self.batches = image_batches(
            detector, image_set, batch_size=batch_size, workers=workers, is_sharded=True, rect=rect
        )
        self.ground_truth = image_set.ground_truth()
        names, ids = image_set.class_names, image_set.category_ids
        self.categories = category_of_label(detector.class_names, names, ids, source=image_set.source)

    def measure(self, *, progress: bool = False, show: Callable[[np.ndarray], None] | None = None) -> CocoTable:
        """Compute COCO's AP. progress, show: see `detect`."""
        return self._table(self.detect(progress=progress, show=show))

    def report(self, folder: Path) -> CocoTable:
        """Compute COCO's AP, and write tables, curves, detections and some annotated images into `folder`.

        On rank 0 the table has intervals and thresholds: a training evaluates often with `measure`, where nobody
        waits for them, and ends with a report.
        Write ground_truth.json, too: pycocotools can be run on it and detections.json.
        """
        results = self.detect(progress=True, show=partial(_write_image, folder / "predictions.png"))
        table = self._table(results)
        if ranks.is_rank_zero():
            table = table.with_matches(match_coco(self.ground_truth, results, self.image_set.image_ids))
            confusion = confusion_matrix(self.ground_truth, results, image_ids=self.image_set.image_ids)
            texts = {
                "metrics.txt": f"{table.text()}\n",
                "metrics.json": json.dumps(table.metrics(), indent=2),
                "detections.json": json.dumps(results.rows()),
                "ground_truth.json": json.dumps(measured_truth(self.ground_truth, self.image_set)),
            }
            for name, text in texts.items():
                with warn_on_disk_error(folder / name):
                    write_text(folder / name, text)
            with warn_on_disk_error(folder / "pr_curves.png"):
                plot_pr_curves(table, folder / "pr_curves.png")
            with warn_on_disk_error(folder / "confusion.png"):
                plot_confusion(confusion, [row.name for row in table.classes], folder / "confusion.png")
        return table

    def detect(self, *, progress: bool = False, show: Callable[[np.ndarray], None] | None = None) -> CocoResults:
        """Return the best `max_detections` of each image, among those of classes that the image set has.

        progress: is shown. show: is called on rank 0 with a drawing, (H, W, 3) uint8, of the first batch and its
        detections.
        """
        most, labels = self.detector.options.max_detections, torch.tensor(list(self.categories))
        detector = self.detector
        if len(self.categories) < len(detector.class_names):  # the best of these classes only
            detector = detector.with_options(max_detections=None)
        show = show if ranks.is_rank_zero() else None
        own_images = len(self.image_set) // ranks.world_size()
        shown_of = own_images if progress and ranks.is_rank_zero() else None
        parts: list[CocoResults] = []
        batches = self.batches if self.stop is None else self.stop.until_requested(self.batches)
        for batch, found in detect_batches(detector, batches, shown_of=shown_of):
            if show is not None and not parts:
                confident = [each.where((each.scores > _SHOWN_SCORE).nonzero()[:most, 0]) for each in found]
                show(draw_batch(batch, detector.class_names, confident))
            for detections, placement, image_id in zip(found, batch.placements, batch.image_ids, strict=True):
                assert placement is not None
                best = torch.isin(detections.labels, labels).nonzero()[:most, 0]
                parts.append(results_of(detections.where(best), placement, image_id, self.categories))
        (is_stopped,) = ranks.any_rank(
            self.stop is not None and self.stop.requested
        )  # a signal may reach one rank only
        if is_stopped:
            raise Stopped
        return merged(list(chain.from_iterable(ranks.all_gather(parts))), self.image_set.image_ids)

    def _table(self, results: CocoResults) -> CocoTable:
        """Measure on rank 0, for all ranks."""
        table = None
        if ranks.is_rank_zero():
            image_ids = self.image_set.image_ids
            measure = partial(evaluate_coco, self.ground_truth, results, image_ids=image_ids, backend=self.backend)
            table, most = measure(), self.detector.options.max_detections
            if most is not None and most > table.max_detections:
                table = replace(table, beyond=measure(max_detections=most))
        table = ranks.broadcast(table)
        assert table is not None
        return table


def _without_idle_classes(image_set: ImageSet, known: Sequence[str]) -> ImageSet:
    """Leave out the classes that the network does not know and no object has: they cannot be measured."""
    counts = np.bincount(image_set.labels, minlength=len(image_set.class_names))
    names = [name for name, count in zip(image_set.class_names, counts, strict=True) if count or name in known]
    return image_set if len(names) == len(counts) else image_set.of_classes(names)


def category_of_label(
    model_names: Sequence[str], data_names: Sequence[str], category_ids: Sequence[int], *, source: str = ""
) -> dict[int, int]:
    """Return label of the model -> category id of the data set, matched by class name.

    Classes of the model that the data set does not have are left out: nothing there could confirm them.
    source: the data set's file, for messages. Raises UserError if it has a class that the model was not trained on.
    """
    category = dict(zip(data_names, category_ids, strict=True))
    unknown = [name for name in data_names if name not in set(model_names)]
    if unknown:
        folded = {name.casefold(): name for name in model_names}
        alike = next((name for name in unknown if name.casefold() in folded), None)
        raise UserError(
            f"{source + ': ' if source else ''}the data set has classes that the network was not trained on: "
            f"{', '.join(unknown[:5])} (the network knows {', '.join(list(model_names)[:10])}): evaluate.py --classes "
            "measures the others alone; if they only have other names in darknet's .weights, --names FILE gives them"
            + (f"; rename '{alike}' to '{folded[alike.casefold()]}'" if alike is not None else "")
        )
    return {label: category[name] for label, name in enumerate(model_names) if name in category}


def _write_image(path: Path, rgb: np.ndarray) -> None:
    with warn_on_disk_error(path):
        write_png(path, rgb)
