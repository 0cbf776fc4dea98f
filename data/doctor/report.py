"""The text of the report: what is in a data set, then the findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data.box_sizes import relative_sides
from data.clusters import RECALL_LIMITS, best_iou, measure_fit
from data.doctor.classes import all_class_names, class_counts
from data.doctor.finding import Finding
from data.image_set import ImageSet
from utils.console import line

COCO_LIMITS_PX = (32, 96)  # sides of a square: COCO's small, medium and large objects
_CLASSES_SHOWN = 20
_PLACES_SHOWN = 5


def overview(image_sets: Sequence[ImageSet], sides: Sequence[np.ndarray]) -> Iterator[str]:
    """Yield tables with a column for each split. sides: (M, 2) from `input_sides`, for each."""
    yield from _table([{"": image_set.split, **_amounts(image_set)} for image_set in image_sets])
    yield ""
    yield from _table([_boxes(image_set, own) for image_set, own in zip(image_sets, sides, strict=True)])
    yield ""
    yield from _table(_classes(image_sets))


def anchor_line(image_set: ImageSet, sides: np.ndarray, anchors: np.ndarray, name: str) -> str:
    """Tell how well anchors (A, 2) in input pixels cover a split's boxes `sides` (M, 2), without its crowds."""
    single = sides[~image_set.is_crowd]
    if not len(single):
        return line("anchors", f"of {name}: no box to compare them with")
    fit = measure_fit(best_iou(single, anchors), RECALL_LIMITS)
    recall = ", ".join(f"{share:.1%} above {limit:g}" for share, limit in zip(fit.recall, RECALL_LIMITS, strict=True))
    text = f"of {name}, best IoU with the boxes of {image_set.split}: mean {fit.mean_iou:.3f}, {recall}"
    return line("anchors", text)


def verdict(findings: Sequence[Finding], *, every_place: bool) -> Iterator[str]:
    """Yield the findings as text: defects first, then notes."""
    most = None if every_place else _PLACES_SHOWN
    defects = [each for each in findings if not each.is_note]
    notes = [each for each in findings if each.is_note]
    if not defects:
        yield from ("", "Nothing is wrong.")
    for title, group in ((f"Worth a look ({len(defects)})", defects), (f"Good to know ({len(notes)})", notes)):
        if group:
            yield from ("", title, "-" * len(title))
            for each in group:
                yield from each.lines(most)


def _amounts(image_set: ImageSet) -> dict[str, str]:
    counts = np.bincount(image_set.owners[~image_set.is_crowd], minlength=len(image_set))
    by_area = image_set.hws[np.argsort(image_set.hws.prod(axis=1, dtype=np.int64), kind="stable")]
    aspects = image_set.hws[:, 1] / image_set.hws[:, 0]
    return {
        "images": f"{len(image_set):,}",
        "  without objects": f"{(counts == 0).sum():,}",
        "objects": f"{counts.sum():,}",
        "  per image, mean": f"{counts.mean():.1f}",
        "  per image, most": f"{counts.max():,}",
        "crowd and difficult, not learned": f"{image_set.is_crowd.sum():,}",
        "height x width, smallest": "x".join(map(str, by_area[0])),
        "  median": "x".join(map(str, by_area[len(by_area) // 2])),
        "  largest": "x".join(map(str, by_area[-1])),
        "width / height": f"{aspects.min():.2f} to {aspects.max():.2f}",
    }


def _boxes(image_set: ImageSet, sides: np.ndarray) -> dict[str, str]:
    small, large = COCO_LIMITS_PX
    single = ~image_set.is_crowd
    if single.any():
        percentiles = np.percentile(relative_sides(image_set)[single], (5, 50, 95))
        sizes = np.digitize(sides[single].prod(axis=1), (small**2, large**2))
        cells = [f"{share:.1%}" for share in (*percentiles, *np.bincount(sizes, minlength=3) / len(sizes))]
    else:
        cells = ["-"] * 6
    return {
        "box side, share of the image's": "",
        "  5 % are below": cells[0],
        "  median": cells[1],
        "  5 % are above": cells[2],
        "boxes at the network's input": "",
        f"  small, below {small} x {small} px": cells[3],
        "  medium": cells[4],
        f"  large, from {large} x {large} px": cells[5],
    }


def _classes(image_sets: Sequence[ImageSet]) -> list[dict[str, str]]:
    """Return the objects of each class; of many classes, the most frequent and the rarest ones of the first split."""
    names = all_class_names(image_sets)
    counts = [class_counts(image_set, names) for image_set in image_sets]
    order = np.argsort(-counts[0], kind="stable").tolist()
    rows = [(names[label], [label]) for label in order]
    if len(rows) > _CLASSES_SHOWN:
        middle = slice(_CLASSES_SHOWN // 2, -_CLASSES_SHOWN // 2)
        rows[middle] = [(f"{len(order[middle])} more", order[middle])]
    title = f"objects of {len(names)} classes"
    return [{title: "", **{f"  {name}": f"{own[labels].sum():,}" for name, labels in rows}} for own in counts]


def _table(columns: Sequence[dict[str, str]]) -> Iterator[str]:
    for name in columns[0]:
        yield f"{name:34}{''.join(f'{column[name]:>14}' for column in columns)}".rstrip()
