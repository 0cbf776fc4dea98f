"""From a detector and batches to COCO numbers and the files that show them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.coco_map import CocoTable, evaluate_coco
from evaluation.coco_results import CocoResults, joined, merged, results_of
from evaluation.confusion import confusion_matrix
from evaluation.plots import plot_confusion, plot_pr_curves
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.draw import draw_batch, write_png
from utils.errors import UserError
from utils.memory import empty_cache, is_out_of_memory
from utils.structures import Batch, Detections

# (images, units_px) -> Detections in input pixels. units_px: per image, the unit in which NMS measures distances
Detect = Callable[[Tensor, Sequence[tuple[float, float]]], list[Detections]]
Show = Callable[[np.ndarray], None]  # (H, W, 3) uint8


def category_of_label(
    model_names: Sequence[str], data_names: Sequence[str], category_ids: Sequence[int]
) -> dict[int, int]:
    """Label of the model -> category id of the data set, matched by class name.

    Classes of the model that the data set does not have are left out: nothing there could confirm them.
    UserError when the two have no class in common, or the data has one that the model cannot know.
    """
    category = dict(zip(data_names, category_ids, strict=True))
    strangers = [name for name in data_names if name not in set(model_names)]
    if strangers:
        raise UserError(
            f"the data set has classes that the network was not trained on: {', '.join(strangers[:5])}"
            f" (the network knows {', '.join(list(model_names)[:10])}); if they only have other names in darknet's"
            " .weights, --names FILE gives them"
        )
    return {label: category[name] for label, name in enumerate(model_names) if name in category}


@torch.no_grad()
def detections_of(
    detect: Detect, batches: Iterable[Batch], *, device: torch.device, relative: bool = False, progress: bool = False
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Each batch with what is found there, on the CPU; each image must have its placement.

    relative: NMS measures distances in shares of the image's sides, as darknet's `map` and `test`, and not in its
    pixels, as darknet's `valid` (`detector.c`, the arguments of get_network_boxes).
    """
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not progress, leave=False):
        placements = [placement for placement in batch.placements if placement is not None]
        assert len(placements) == len(batch), "only whole images can be evaluated"
        units_px = [each.image_px if relative else each.pixel_px for each in placements]
        images = batch.to(device, non_blocking=True).pixels()
        yield batch, [found.cpu() for found in _detect_in_parts(detect, images, units_px)]


def _detect_in_parts(detect: Detect, images: Tensor, units_px: Sequence[tuple[float, float]]) -> list[Detections]:
    """All at once, or where memory runs out in halves."""
    try:
        return detect(images, units_px)
    except RuntimeError as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    empty_cache()
    half = len(images) // 2
    first, second = slice(None, half), slice(half, None)
    return [
        *_detect_in_parts(detect, images[first], units_px[first]),
        *_detect_in_parts(detect, images[second], units_px[second]),
    ]


def collect_results(
    detect: Detect,
    batches: Iterable[Batch],
    categories: Mapping[int, int],
    *,
    device: torch.device,
    max_detections: int | None = None,
    progress: bool = False,
    look: Callable[[Batch, list[Detections]], None] | None = None,
) -> CocoResults:
    """Of all batches, in order; each image must have its placement.

    max_detections: how many to keep per image, best first, of those whose label is in `categories`; None keeps all.
    look: is shown the first batch and what is found there.
    """
    parts: list[CocoResults] = []
    labels = torch.tensor(list(categories))
    for batch, found in detections_of(detect, batches, device=device, progress=progress):
        if look is not None and not parts:
            look(batch, found)
        for detections, placement, image_id in zip(found, batch.placements, batch.image_ids, strict=True):
            assert placement is not None
            known = torch.isin(detections.labels, labels)
            best = known.nonzero()[:max_detections, 0]
            parts.append(results_of(detections.where(best), placement, image_id, categories))
    return joined(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """A detector and the images it is examined on.

    detect: finds all there is, of which the best max_detections per image are measured: of a detector that knows
    more classes than the data set, the best of the data set's. class_names: of the detector's labels. categories:
    label -> category id (`category_of_label`). is_coco: whether ground_truth is a file the user has. backend: of
    `evaluation.coco_backends.BACKENDS`.

    In a job of several ranks all of them call each method, with batches of images of their own; the first measures
    and writes, and the numbers are those of a job of one.
    """

    detect: Detect
    batches: Iterable[Batch]
    class_names: Sequence[str]
    ground_truth: Mapping[str, Any]
    image_ids: Sequence[int]
    categories: Mapping[int, int]
    device: torch.device
    is_coco: bool
    max_detections: int | None
    backend: str = "auto"

    def results(self, *, progress: bool = False, show: Show | None = None) -> CocoResults:
        """Of all images. show: gets the first rank's first batch, drawn with what is found at a score of 0.25."""
        of_rank = collect_results(
            self.detect,
            self.batches,
            self.categories,
            device=self.device,
            max_detections=self.max_detections,
            progress=progress and ranks.is_rank_zero(),
            look=partial(self._draw, show) if show is not None and ranks.is_rank_zero() else None,
        )
        return merged(ranks.all_gather(of_rank), self.image_ids)

    def measure(self, *, show: Show | None = None) -> CocoTable:
        """show: as `results`."""
        return self._of_first(evaluate_coco, self.results(show=show), backend=self.backend)

    def report(self, folder: Path) -> CocoTable:
        """Measure, and write tables, curves, detections and some annotated images into `folder`."""
        return self._of_first(
            partial(write_report, folder),
            self.results(progress=True, show=partial(_write_image, folder / "predictions.png")),
            save_ground_truth=not self.is_coco,
            backend=self.backend,
        )

    def _of_first(self, measure: Callable[..., CocoTable], results: CocoResults, **settings: Any) -> CocoTable:
        """The table that the first rank makes, on all of them."""
        is_first = ranks.is_rank_zero()
        made = measure(self.ground_truth, results, image_ids=self.image_ids, **settings) if is_first else None
        table = ranks.broadcast(made)
        assert table is not None
        return table

    def _draw(self, show: Show, batch: Batch, found: list[Detections]) -> None:
        confident = [each.where((each.scores > 0.25).nonzero()[: self.max_detections, 0]) for each in found]
        show(draw_batch(batch, self.class_names, confident))


def _write_image(path: Path, rgb: np.ndarray) -> None:
    with warn_on_disk_error(path):
        write_png(path, rgb)


def write_report(
    folder: Path,
    ground_truth: Mapping[str, Any],
    results: CocoResults,
    *,
    image_ids: Sequence[int],
    save_ground_truth: bool,
    backend: str = "auto",
) -> CocoTable:
    """Measure, and write detections.json (COCO results form), metrics.json and .txt, pr_curves.png, confusion.png.

    What the disk does not take is said, and the table returned. With save_ground_truth also ground_truth.json, for a
    data set that is not COCO: the two files are what pycocotools takes by hand.
    """
    table = evaluate_coco(ground_truth, results, image_ids=image_ids, backend=backend)
    names = [category["name"] for category in sorted(ground_truth["categories"], key=lambda c: c["id"])]
    confusion = confusion_matrix(ground_truth, results, image_ids=image_ids)
    with warn_on_disk_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "detections.json").write_text(json.dumps(results.rows()))
        if save_ground_truth:
            (folder / "ground_truth.json").write_text(json.dumps(ground_truth))
        (folder / "metrics.json").write_text(json.dumps(table.stats(), indent=2))
        (folder / "metrics.txt").write_text(f"{table.summary()}\n\n{table.class_table()}\n")
        plot_pr_curves(table, names, folder / "pr_curves.png")
        plot_confusion(confusion, names, folder / "confusion.png")
    return table
