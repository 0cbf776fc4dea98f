"""Time of the COCO evaluation at the size of val2017, and whether both implementations agree.

    python -m benchmarks.evaluate [--images 5000] [--detections 500000] [--rounds 2]

Synthetic images of 80 classes, as unevenly spread over them as COCO's, with sizes and crowds like theirs. Half of
the detections are noisy copies of the objects, scored by their accuracy, some of the wrong class; the others are
anywhere, scored low: as from a network at a low confidence, at most 100 per image. Both implementations take turns in
every round; a time is the process time of `evaluate_coco`, from arrays to the table. A ratio is the median over rounds
of t(pycocotools) / t(faster-coco-eval).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measured import RESULTS, circumstances, write
from evaluation.coco_backends import FASTER, PYCOCOTOOLS
from evaluation.coco_map import CocoTable, evaluate_coco
from evaluation.coco_results import CocoResults

WIDTH_PX, HEIGHT_PX = 640, 480
BOXES_PER_IMAGE = 7.27  # val2017: 36,335 in 5,000
MOST_PER_IMAGE = 100
CROWD_SHARE = 0.012
CLASSES = 80


def make_ground_truth(images: int, random: np.random.Generator) -> dict[str, Any]:
    """Return ground truth in COCO's format; boxes per image are geometrically distributed, so some images have none."""
    counts = np.minimum(random.geometric(1 / (BOXES_PER_IMAGE + 1), images) - 1, 60)
    total = int(counts.sum())
    share = 1 / np.arange(1, CLASSES + 1)  # Zipf's law: a third of COCO's boxes are persons
    sides = np.exp(random.normal(4, 1.1, (total, 2))).clip(4, [[WIDTH_PX, HEIGHT_PX]])
    corners = random.random((total, 2)) * ([[WIDTH_PX, HEIGHT_PX]] - sides)
    bboxes = np.concatenate([corners, sides], axis=1).round(2)
    columns = (
        np.repeat(np.arange(images), counts),
        random.choice(CLASSES, total, p=share / share.sum()),
        bboxes,
        bboxes[:, 2] * bboxes[:, 3] * random.uniform(0.3, 1, total),  # of the mask, as in COCO
        (random.random(total) < CROWD_SHARE).astype(int),
    )
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {
        "images": [{"id": image} for image in range(images)],
        "annotations": [{"id": number, **dict(zip(names, row, strict=True))} for number, row in enumerate(rows, 1)],
        "categories": [{"id": label, "name": f"class {label}"} for label in range(CLASSES)],
    }


def make_results(gt: dict[str, Any], count: int, random: np.random.Generator) -> CocoResults:
    """Return `count` detections in the order of the images, those of one image best first."""
    images, rows = len(gt["images"]), gt["annotations"]
    image = np.repeat(np.arange(images), count // images)
    image = np.append(image, np.arange(count - len(image)))
    objects = np.array([row["bbox"] for row in rows])
    of_object, classes = (np.array([row[name] for row in rows]) for name in ("image_id", "category_id"))
    starts = np.searchsorted(of_object, np.arange(images + 1))
    here = np.diff(starts)[image]
    is_copy = (random.random(count) < 0.5) & (here > 0)
    source = np.minimum(starts[image] + (random.random(count) * here).astype(int), len(rows) - 1)
    noise = np.abs(random.normal(0, 0.15, count)) * is_copy
    sides = np.where(is_copy[:, None], objects[source, 2:], np.exp(random.normal(4, 1, (count, 2))))
    anywhere = random.random((count, 2)) * [WIDTH_PX, HEIGHT_PX]
    corners = np.where(is_copy[:, None], objects[source, :2], anywhere)
    corners = corners + random.normal(0, 1, (count, 2)) * noise[:, None] * sides
    sides = sides * np.exp(random.normal(0, 1, (count, 2)) * noise[:, None])
    is_confused = ~is_copy | (random.random(count) < 0.1)
    scores = np.where(is_copy, np.exp(-6 * noise) * random.beta(5, 2, count), random.beta(1, 12, count))
    found = CocoResults(
        image_ids=image,
        category_ids=np.where(is_confused, random.integers(CLASSES, size=count), classes[source]),
        bboxes=np.concatenate([corners, sides], axis=1).round(3),
        scores=scores.round(6),
    )
    return found.where(np.lexsort((-scores, image)))


def same(one: CocoTable, other: CocoTable) -> bool:
    """Return whether all numbers agree to 1e-12, as `evaluation.coco_backends` promises."""
    first, second = ([*table.stats.values(), *table.precision.flat] for table in (one, other))
    return np.allclose(first, second, rtol=0, atol=1e-12)


def measure(gt: dict[str, Any], results: CocoResults, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {PYCOCOTOOLS: [], FASTER: []}
    tables: dict[str, CocoTable] = {}
    for _ in range(rounds):
        for backend, times in seconds.items():
            start = time.process_time()
            tables[backend] = evaluate_coco(gt, results, backend=backend)
            times.append(time.process_time() - start)
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    return {
        "images": len(gt["images"]),
        "boxes": len(gt["annotations"]),
        "detections": len(results),
        "classes": len(gt["categories"]),
        "identical": same(*tables.values()),
        "time_ratio": round(statistics.median(ratios), 2),
        "time_ratios": [round(ratio, 2) for ratio in ratios],
        "seconds": {backend: [round(s, 2) for s in times] for backend, times in seconds.items()},
        "numbers": tables[PYCOCOTOOLS].stats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluate.json")
    args = parser.parse_args()
    if args.detections > MOST_PER_IMAGE * args.images:
        parser.error(f"COCO counts {MOST_PER_IMAGE} detections an image: ask for fewer or for more images")
    random = np.random.default_rng(0)
    gt = make_ground_truth(args.images, random)
    row = measure(gt, make_results(gt, args.detections, random), args.rounds)
    counts = ", ".join(f"{row[name]:,} {name}" for name in ("images", "boxes", "detections", "classes"))
    print(f"{counts}: AP {row['numbers']['AP']:.3f}")
    print(f"the twelve numbers and the precision array {'agree' if row['identical'] else 'do NOT agree'} to 1e-12")
    for backend, times in row["seconds"].items():
        print(f"{backend:<18}{statistics.median(times):>8.1f} s")
    print(f"{'ratio':<18}{row['time_ratio']:>8.1f}")
    versions = {name: importlib.metadata.version(name) for name in (PYCOCOTOOLS, FASTER, "numpy")}
    write(args.out, row, circumstances(torch.device("cpu"), **versions))
    if not row["identical"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
