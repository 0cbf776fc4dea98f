"""Cluster a data set's boxes into anchors: `python -m data.anchors --data PATH --cfg CFG`.

Clusters the boxes at the network's input size, shows how well the cfg's anchors and the new ones cover them, and
writes a copy of the cfg with the new ones where they are clearly better. A page: the only file of this room, beside
the doctor's, that knows cfgs. Nothing imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path

import numpy as np

from cfg.convolution import ConvSpec
from cfg.edit import with_values
from cfg.parse import CfgError
from cfg.plan import Plan, load_plan, parse_plan
from data.annotation_formats import open_image_set
from data.augment_options import AugmentOptions
from data.box_sizes import input_sides
from data.clusters import RECALL_LIMITS, ShapeFit, best_iou, cluster_shapes, measure_fit, shape_iou
from data.image_set import ImageSet
from utils.console import say
from utils.errors import UserError
from utils.file_name import as_file_name
from utils.flags import image_size_knob, parse_flags, resolve
from utils.knob import knob
from utils.page import run_page

# Required gain in mean best IoU on images that were not clustered. Other halves of the same data change that figure by
# 0.002 (BCCD, 2,804 boxes) to 0.012 (700 boxes of COCO); and new anchors make heads trained with the old ones useless.
CLEAR_GAIN = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorOptions:
    """python -m data.anchors

    Compare anchors made for a data set with those of a cfg, and write a copy of the cfg where the new ones are clearly
    better.
    """

    data: str = knob("digits", "data set, as in train.py", unit="PATH")
    split: str = knob("train", "split with the boxes to cluster", unit="NAME")
    cfg: str = knob("yolov4-pico", "network, as in train.py")
    image_size: tuple[int, int] | None = image_size_knob("input size to train at, as in train.py (default: the cfg's)")
    letterbox: bool | None = knob(None, "keep the images' aspect ratio (default: the cfg's letter_box)")
    clusters: int | None = knob(
        None, "number of anchors to make (default: as many as the cfg's heads have)", unit="N", low=1
    )
    out: str | None = knob(None, "copy to write (default: CFG-DATA.cfg in this folder)", unit="CFG")
    force: bool = knob(False, "write the copy even if the new anchors are not clearly better")


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(AnchorOptions, parse_flags(AnchorOptions, argv))
    image_set = open_image_set(options.data, options.split)
    text, plan = read_cfg(options.cfg, options.image_size)
    letterbox = plan.net.letter_box if options.letterbox is None else options.letterbox
    shapes, images = input_shapes(image_set, plan.net.input_hw, letterbox)
    height, width = plan.net.input_hw
    layout = f"{'letterboxed' if letterbox else 'stretched'} to {height}x{width}"
    say("data", f"{image_set.name} {image_set.split}: {len(image_set)} images, {len(shapes)} boxes, {layout}")
    shapes, images = large_enough(shapes, images)

    old = np.array([anchor for head in plan.head_specs for anchor in head.head_anchors])
    count = options.clusters or len(old)
    start = old if len(old) == count else None
    new = cluster_shapes(shapes, count, start=start).round(1)
    new_text = with_anchors(text, plan, new)
    new_plan = parse_plan(new_text, path=plan.path)

    before, after = (measure_fit(best_iou(shapes, anchors), RECALL_LIMITS) for anchors in (old, new))
    unseen = fit_on_unseen(shapes, images, count, start)
    say("network", f"{plan.name}: {len(old)} anchors in {len(plan.heads)} heads; new: {count}")
    print(
        "", *fit_table({"anchors of the cfg": before, "new anchors": after, "new, on unseen images": unseen}), sep="\n"
    )
    print("", *head_table(shapes, plan, new_plan), "", sep="\n")

    is_better, verdict = judge(before, unseen)
    if not (is_better or options.force):
        print(f"{verdict}: nothing is written; --force writes the new anchors anyway.")
        return
    path = write_copy(new_text, options.out, as_file_name(f"{plan.name}-{image_set.name}"))
    size = "" if options.image_size is None else f" --image-size {height}x{width}"
    print(f"{verdict}: {path} has the new anchors, and {plan.path} is unchanged.")
    print(f"next: python train.py --data {options.data} --cfg {path}{size}")


def read_cfg(name_or_path: str, input_hw: tuple[int, int] | None) -> tuple[str, Plan]:
    """Read a cfg as text, with its line ends, and as a plan. Raises CfgError."""
    path = load_plan(name_or_path).path
    # Comments may be in any encoding: bytes that are not UTF-8 pass through unchanged.
    text = Path(path).read_bytes().decode("utf-8", errors="surrogateescape")
    plan = parse_plan(text.removeprefix("\ufeff"), path=path, input_hw=input_hw)
    if not plan.heads:
        raise CfgError(f"{path}:1: has no [yolo] layer, and so no anchors")
    return text, plan


def input_shapes(image_set: ImageSet, input_hw: tuple[int, int], letterbox: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return, for all objects but crowds, (M, 2) width and height in input pixels and (M,) the index of their image."""
    shapes = input_sides(image_set, input_hw, letterbox)
    single = ~image_set.is_crowd
    if not single.any():
        crowds = f", but {len(single)} crowd regions" if len(single) else ""
        raise UserError(f"{image_set.name}: no image of '{image_set.split}' has an object{crowds}")
    # Rounded, because equal boxes of the annotations differ in their last digits here.
    return shapes[single].round(2), image_set.owners[single]


def large_enough(shapes: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the boxes that training drops by default, and print how many."""
    least_px = AugmentOptions().min_side_px
    large = (shapes >= least_px).all(axis=1)
    if not large.any():
        raise UserError(f"all {len(shapes)} boxes have a side below {least_px:g} px at this input size")
    if not large.all():
        say("", f"{(~large).sum()} with a side below {least_px:g} px are left out, as in training")
    return shapes[large], images[large]


def fit_on_unseen(shapes: np.ndarray, images: np.ndarray, count: int, start: np.ndarray | None) -> ShapeFit | None:
    """Measure anchors made from each half of the images on the other half's boxes; None if there are too few boxes."""
    half = np.random.default_rng(0).permutation(images.max() + 1)[images] % 2
    overlaps = []
    for seen, unseen in ((half == 0, half == 1), (half == 1, half == 0)):
        if len(np.unique(shapes[seen], axis=0)) < count:
            return None
        overlaps.append(best_iou(shapes[unseen], cluster_shapes(shapes[seen], count, start=start)))
    return measure_fit(np.concatenate(overlaps), RECALL_LIMITS)


def deal_masks(count: int, sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Assign anchors 0..count-1, ascending by area, to heads: the smallest to the finest stride.

    sizes: anchors that each head has now; if they do not add up to `count`, it is split evenly. Raises UserError if a
    head would have none.
    """
    finest_first = sorted(range(len(strides)), key=lambda head: strides[head])
    sizes = [sizes[head] for head in finest_first]
    if sum(sizes) != count:
        sizes = [len(part) for part in np.array_split(np.arange(count), len(strides))]
    if min(sizes) == 0:
        raise UserError(f"{count} anchors are too few for {len(strides)} heads: give each at least one (--clusters)")
    masks: list[tuple[int, ...]] = [()] * len(strides)
    for head, size, stop in zip(finest_first, sizes, np.cumsum(sizes).tolist(), strict=True):
        masks[head] = tuple(range(stop - size, stop))
    return masks


def with_anchors(text: str, plan: Plan, anchors: np.ndarray) -> str:
    """Return the cfg's text with these anchors, (A, 2) by ascending area; other lines stay. Raises CfgError."""
    written = ", ".join(f"{width:g},{height:g}" for width, height in anchors.tolist())
    masks = deal_masks(len(anchors), [len(head.mask) for head in plan.head_specs], plan.strides)
    changes: dict[int, dict[str, object]] = {}
    for index, head, mask in zip(plan.heads, plan.head_specs, masks, strict=True):
        values = changes.setdefault(plan.nodes[index].line, {"anchors": written})
        if mask != head.mask:
            values["mask"] = ",".join(map(str, mask))
        if len(anchors) != len(head.anchors):
            values["num"] = len(anchors)
        if len(mask) != len(head.mask):
            feeder = plan.nodes[index - 1]
            if not isinstance(feeder.spec, ConvSpec):
                line = plan.nodes[index].line
                raise CfgError(f"{plan.path}:{line}: [yolo] can be resized only right after a [convolutional]")
            changes[feeder.line] = {"filters": len(mask) * (5 + head.classes)}
    body = text.removeprefix("\ufeff")
    return text[: len(text) - len(body)] + with_values(body, changes)


def judge(before: ShapeFit, unseen: ShapeFit | None) -> tuple[bool, str]:
    """Return whether the new anchors are clearly better, and the reason as text."""
    if unseen is None:
        return False, "Too few boxes to judge the new anchors on unseen images"
    gain = unseen.mean_iou - before.mean_iou
    is_better = gain >= CLEAR_GAIN
    verdict = f"{'' if is_better else 'not '}clearly better (from {CLEAR_GAIN:+g})"
    return is_better, f"Mean best IoU {gain:+.3f} on unseen images, {verdict}"


def fit_table(fits: dict[str, ShapeFit | None]) -> Iterator[str]:
    yield f"{'':24}{'mean best IoU':>15}" + "".join(f"{f'IoU > {limit}':>13}" for limit in RECALL_LIMITS)
    for name, fit in fits.items():
        if fit is None:
            yield f"{name:24}{'too few':>15}"
        else:
            yield f"{name:24}{fit.mean_iou:15.3f}" + "".join(f"{share:13.3f}" for share in fit.recall)


def head_table(shapes: np.ndarray, *plans: Plan) -> Iterator[str]:
    """Yield a line per head: for each plan the boxes whose best anchor is one of the head's, and its anchors."""
    columns = []
    for plan in plans:
        own = [np.isin(shape_iou(shapes, np.array(h.anchors)).argmax(axis=1), h.mask) for h in plan.head_specs]
        cells = [_cell(head.head_anchors, boxes.sum()) for head, boxes in zip(plan.head_specs, own, strict=True)]
        columns.append([*cells, _cell((), (~np.any(own, axis=0)).sum())])
    names = [f"stride {stride}" for stride in plans[0].strides] + ["no head"]
    width = max(len(cell) for cell in columns[0])
    yield "boxes whose best anchor is the head's, and its anchors:"
    yield f"{'':11}{'of the cfg':{width}}   new"
    for name, old, new in zip(names, *columns, strict=True):
        yield f"{name:11}{old:{width}}   {new}".rstrip()


def write_copy(text: str, name: str | None, default: str) -> Path:
    """Write a new file: `name`, else `default`.cfg, with a number if that exists."""
    for number in numbers(1) if name is None else [1]:
        path = Path(name or (f"{default}.cfg" if number == 1 else f"{default}-{number}.cfg"))
        try:
            with open(path, "xb") as file:
                file.write(text.encode("utf-8", errors="surrogateescape"))
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be written, {error.strerror}") from error
    raise UserError(f"{name}: already exists and is not overwritten; name another file with --out")


def _cell(anchors: Sequence[tuple[float, float]], boxes: int) -> str:
    return f"{boxes:6} " + " ".join(f"{width:g},{height:g}" for width, height in anchors)


if __name__ == "__main__":
    run_page(main, CfgError)
