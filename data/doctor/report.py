"""The text of the report: what is in a data set, then the findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
    yield from _table({"": [image_set.split for image_set in image_sets], **_amounts(image_sets)})
    yield ""
    yield from _table(_boxes(image_sets, sides))
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


def _amounts(image_sets: Sequence[ImageSet]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for image_set in image_sets:
        counts = np.bincount(image_set.owners[~image_set.is_crowd], minlength=len(image_set))
        by_area = image_set.hws[np.argsort(image_set.hws.prod(axis=1, dtype=np.int64), kind="stable")]
        aspects = image_set.hws[:, 1] / image_set.hws[:, 0]
        cells = {
            "images": f"{len(image_set):,}",
            "  without objects": f"{(counts == 0).sum():,}",
            "objects": f"{counts.sum():,}",
            "  per image, mean": f"{counts.mean():.1f}",
            "  per image, most": f"{counts.max():,}",
            "crowd and difficult, not learned": f"{image_set.is_crowd.sum():,}",
            "height x width, smallest": _size(by_area[0]),
            "  median": _size(by_area[len(by_area) // 2]),
            "  largest": _size(by_area[-1]),
            "width / height": f"{aspects.min():.2f} to {aspects.max():.2f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return rows


def _boxes(image_sets: Sequence[ImageSet], sides: Sequence[np.ndarray]) -> dict[str, list[str]]:
    small, large = COCO_LIMITS_PX
    rows: dict[str, list[str]] = {"box side, share of the image's": ["" for _ in image_sets]}
    for image_set, own in zip(image_sets, sides, strict=True):
        single = ~image_set.is_crowd
        relative, areas = relative_sides(image_set)[single], own[single].prod(axis=1)
        kinds = {
            f"  small, below {small} x {small} px": areas < small**2,
            "  medium": (areas >= small**2) & (areas < large**2),
            f"  large, from {large} x {large} px": areas >= large**2,
        }
        for percent, name in ((5, "  5 % are below"), (50, "  median"), (95, "  5 % are above")):
            rows.setdefault(name, []).append(f"{np.percentile(relative, percent):.1%}" if len(relative) else "-")
        rows.setdefault("boxes at the network's input", []).append("")
        for name, chosen in kinds.items():
            rows.setdefault(name, []).append(f"{chosen.mean():.1%}" if len(chosen) else "-")
    return rows


def _classes(image_sets: Sequence[ImageSet]) -> dict[str, list[str]]:
    """Return the objects of each class; of many classes, the most frequent and the rarest ones of the first split."""
    names = all_class_names(image_sets)
    counts = np.stack([class_counts(image_set, names) for image_set in image_sets], axis=1)
    order = np.argsort(-counts[:, 0], kind="stable").tolist()
    rows = {f"objects of {len(names)} classes": ["" for _ in image_sets]}
    half = _CLASSES_SHOWN // 2
    left_out = order[half:-half] if len(order) > _CLASSES_SHOWN else []
    for position, label in enumerate(order):
        if label not in left_out:
            rows[f"  {names[label]}"] = [f"{count:,}" for count in counts[label]]
        elif position == half:
            rows[f"  {len(left_out)} more"] = [f"{count:,}" for count in counts[left_out].sum(axis=0)]
    return rows


def _size(hw: Iterable[int]) -> str:
    return "x".join(map(str, hw))


def _table(rows: dict[str, list[str]]) -> Iterator[str]:
    for name, cells in rows.items():
        yield f"{name:34}{''.join(f'{cell:>14}' for cell in cells)}".rstrip()
