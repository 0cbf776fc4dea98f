"""Anchors for a data set: `python -m data.anchors --data PATH --cfg CFG`.

Clusters the boxes at the network's input size, shows how well the cfg's anchors and the new ones cover them, and
writes a copy of the cfg with the new ones where they are clearly better. It is a page, though it stands in this
room: it alone of the room knows cfgs, and nothing imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import count as numbers
from pathlib import Path

import numpy as np

from cfg.convolution import ConvSpec
from cfg.edit import with_values
from cfg.parse import CfgError
from cfg.plan import Plan, load_plan, parse_plan
from data.augment import AugmentOptions
from data.box_sizes import input_sides, owners
from data.clusters import RECALL_LIMITS, ShapeFit, best_iou, cluster_shapes, measure_fit, shape_iou
from data.image_set import ImageSet
from data.source import open_image_set
from utils.errors import UserError
from utils.flags import parse_image_hw, positive_number
from utils.page import run_page

# What mean best IoU must gain on images that the clustering has not seen. Other halves of the same data move that
# figure by 0.002 (BCCD, 2,804 boxes) to 0.012 (700 boxes of COCO); and who changes the anchors gives up heads that
# were trained with the old ones.
CLEAR_GAIN = 0.02


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_arguments(argv)
    image_set = open_image_set(given.data, given.split)
    text, plan = read_cfg(given.cfg, given.image_size)
    letterbox = plan.net.letter_box if given.letterbox is None else given.letterbox
    shapes, images = input_shapes(image_set, plan.net.input_hw, letterbox)
    height, width = plan.net.input_hw
    laid = f"{'letterboxed' if letterbox else 'stretched'} to {height}x{width}"
    print(f"data      {image_set.name} {image_set.split}: {len(image_set)} images, {len(shapes)} boxes, {laid}")
    shapes, images = large_enough(shapes, images)

    old = np.array([anchor for head in plan.head_specs for anchor in head.head_anchors])
    count = given.clusters or len(old)
    start = old if len(old) == count else None
    new = cluster_shapes(shapes, count, start=start).round(1)
    new_text = with_anchors(text, plan, new)
    new_plan = parse_plan(new_text, path=plan.path)

    before, after = (measure_fit(best_iou(shapes, anchors), RECALL_LIMITS) for anchors in (old, new))
    unseen = fit_on_unseen(shapes, images, count, start)
    print(f"network   {plan.name}: {len(old)} anchors in {len(plan.heads)} heads; new: {count}\n")
    print("\n".join(fit_table({"anchors of the cfg": before, "new anchors": after, "new, on unseen images": unseen})))
    print("", *head_table(shapes, plan, new_plan), "", sep="\n")

    better, judged = judge(before, unseen)
    if not (better or given.force):
        print(f"{judged}: nothing is written; --force writes them all the same.")
        return
    path = write_copy(new_text, given.out, f"{plan.name}-{image_set.name}")
    size = "" if given.image_size is None else f" --image-size {height}x{width}"
    print(f"{judged}: {path} has the new anchors, and {plan.path} stays as it is.")
    print(f"next: python train.py --data {given.data} --cfg {path}{size}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.anchors",
        description="Anchors for a data set beside those of a cfg, and a copy of it where the new are clearly better.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", default="digits", metavar="PATH", help="as of train.py (default digits)")
    parser.add_argument("--split", default="train", metavar="NAME", help="whose boxes (default train)")
    parser.add_argument("--cfg", default="yolov4-pico", help="as of train.py (default yolov4-pico)")
    parser.add_argument(
        "--image-size", type=parse_image_hw, metavar="PX", help="input to train at, as of train.py (default: the cfg's)"
    )
    parser.add_argument(
        "--letterbox",
        action=argparse.BooleanOptionalAction,
        help="whether images keep their aspect ratio (default: the cfg's letter_box)",
    )
    parser.add_argument(
        "--clusters",
        type=positive_number,
        metavar="N",
        help="anchors to make (default: as many as the cfg's heads have)",
    )
    parser.add_argument("--out", metavar="CFG", help="the copy to write (default: CFG-DATA.cfg, here)")
    parser.add_argument("--force", action="store_true", help="write it even if the new anchors are not clearly better")
    return parser.parse_args(argv)


def read_cfg(name_or_path: str, input_hw: tuple[int, int] | None) -> tuple[str, Plan]:
    """The text as it is on disk, line ends and all, and its plan. Raises CfgError."""
    path = load_plan(name_or_path).path
    # Comments may be in any encoding: what is no UTF-8 goes through unchanged.
    text = Path(path).read_bytes().decode("utf-8", errors="surrogateescape")
    plan = parse_plan(text.removeprefix("\ufeff"), path=path, input_hw=input_hw)
    if not plan.heads:
        raise CfgError(f"{path}:1: has no [yolo] layer, and so no anchors")
    return text, plan


def input_shapes(image_set: ImageSet, input_hw: tuple[int, int], letterbox: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of every object, crowds aside: (M, 2) width and height in input pixels, and (M,) the index of its image."""
    shapes = input_sides(image_set, input_hw, letterbox)
    single = ~image_set.is_crowd
    if not single.any():
        crowds = f", but {len(single)} crowd regions" if len(single) else ""
        raise UserError(f"{image_set.name}: no image of '{image_set.split}' has an object{crowds}")
    # Boxes that are equal in the annotations differ in their last digits.
    return shapes[single].round(2), owners(image_set)[single]


def large_enough(shapes: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without those that training drops by default, and a line that says so."""
    least_px = AugmentOptions().min_side_px
    large = (shapes >= least_px).all(axis=1)
    if not large.any():
        raise UserError(f"all {len(shapes)} boxes have a side below {least_px:g} px at this input size")
    if not large.all():
        print(f"          {(~large).sum()} with a side below {least_px:g} px are left out, as in training")
    return shapes[large], images[large]


def fit_on_unseen(shapes: np.ndarray, images: np.ndarray, count: int, start: np.ndarray | None) -> ShapeFit | None:
    """Of anchors made from one half of the images on the other half's boxes, and vice versa; None for too few."""
    half = np.random.default_rng(0).permutation(images.max() + 1)[images] % 2
    overlaps = []
    for seen, unseen in ((half == 0, half == 1), (half == 1, half == 0)):
        if len(np.unique(shapes[seen], axis=0)) < count:
            return None
        overlaps.append(best_iou(shapes[unseen], cluster_shapes(shapes[seen], count, start=start)))
    return measure_fit(np.concatenate(overlaps), RECALL_LIMITS)


def deal_masks(count: int, places: Sequence[int], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Anchors 0..count-1, ascending by area, dealt to heads: the smallest to the finest stride.

    places: how many each head has now; where they do not add up to `count`, it is split evenly. Raises UserError
    where a head would have none.
    """
    finest_first = sorted(range(len(strides)), key=lambda head: strides[head])
    sizes = [places[head] for head in finest_first]
    if sum(sizes) != count:
        sizes = [len(part) for part in np.array_split(np.arange(count), len(strides))]
    if min(sizes) == 0:
        raise UserError(f"{count} anchors are too few for {len(strides)} heads: give each at least one (--clusters)")
    masks: list[tuple[int, ...]] = [()] * len(strides)
    for head, size, stop in zip(finest_first, sizes, np.cumsum(sizes).tolist(), strict=True):
        masks[head] = tuple(range(stop - size, stop))
    return masks


def with_anchors(text: str, plan: Plan, anchors: np.ndarray) -> str:
    """The cfg's text with these anchors, (A, 2) by ascending area: of other lines, none changes. Raises CfgError."""
    written = ", ".join(f"{width:g},{height:g}" for width, height in anchors.tolist())
    masks = deal_masks(len(anchors), [len(head.mask) for head in plan.head_specs], plan.strides)
    changes: dict[int, dict[str, object]] = {}
    for index, head, mask in zip(plan.heads, plan.head_specs, masks, strict=True):
        here = changes.setdefault(plan.nodes[index].line, {"anchors": written})
        if mask != head.mask:
            here["mask"] = ",".join(map(str, mask))
        if len(anchors) != len(head.anchors):
            here["num"] = len(anchors)
        if len(mask) != len(head.mask):
            feeder = plan.nodes[index - 1]
            if not isinstance(feeder.spec, ConvSpec):
                line = plan.nodes[index].line
                raise CfgError(f"{plan.path}:{line}: [yolo] can be resized only right after a [convolutional]")
            changes[feeder.line] = {"filters": len(mask) * (5 + head.classes)}
    body = text.removeprefix("\ufeff")
    return text[: len(text) - len(body)] + with_values(body, changes)


def judge(before: ShapeFit, unseen: ShapeFit | None) -> tuple[bool, str]:
    """Whether the new anchors are clearly better, and why, in words."""
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
    """A line per head: stride, anchors, and how many boxes have their best anchor among these; for each plan."""
    columns = []
    for plan in plans:
        mine = [np.isin(shape_iou(shapes, np.array(h.anchors)).argmax(axis=1), h.mask) for h in plan.head_specs]
        cells = [_cell(head.head_anchors, of.sum()) for head, of in zip(plan.head_specs, mine, strict=True)]
        columns.append([*cells, _cell((), (~np.any(mine, axis=0)).sum())])
    names = [f"stride {stride}" for stride in plans[0].strides] + ["no head"]
    width = max(len(cell) for cell in columns[0])
    yield "boxes whose best anchor is the head's, and its anchors:"
    yield f"{'':11}{'of the cfg':{width}}   new"
    for name, old, new in zip(names, *columns, strict=True):
        yield f"{name:11}{old:{width}}   {new}".rstrip()


def write_copy(text: str, wanted: str | None, default: str) -> Path:
    """Into a file that was not there: `wanted`, else `default`.cfg, with a number if that is taken."""
    free = numbers(1) if wanted is None else [1]
    for number in free:
        path = Path(wanted or (f"{default}.cfg" if number == 1 else f"{default}-{number}.cfg"))
        try:
            with open(path, "xb") as file:
                file.write(text.encode("utf-8", errors="surrogateescape"))
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be written, {error.strerror}") from error
    raise UserError(f"{wanted}: is there already, and nothing is written over; name another file with --out")


def _cell(anchors: Sequence[tuple[float, float]], boxes: int) -> str:
    return f"{boxes:6} " + " ".join(f"{width:g},{height:g}" for width, height in anchors)


if __name__ == "__main__":
    run_page(main, CfgError)
