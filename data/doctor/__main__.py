"""What is in a data set, and what is wrong with it, before a training: `python -m data.doctor PATH`.

One page of text, and a folder with that page, every place of every finding, and histograms. It is a page, though it
stands in this room: nothing imports it. Exit code: 0 if nothing is wrong, 1 if something is worth a look, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cfg.parse import CfgError
from cfg.plan import load_plan
from data.box_sizes import input_sides
from data.doctor.charts import draw_charts
from data.doctor.checkup import full_checkup, quick_checkup
from data.doctor.finding import Finding
from data.doctor.labels import tiny_findings
from data.doctor.report import anchor_line, overview, verdict
from data.image_set import ImageSet
from data.source import open_image_set, splits_of
from utils.flags import parse_image_hw, positive_number
from utils.page import run_page
from utils.run_folder import free_folder

_SPLITS = ("train", "val", "test")
_WANTED = {
    "train": "train.py learns from it: name another with --train-split, or make a list of images by this name.",
    "val": "train.py chooses the best weights by it: name another with --val-split, or make it of a tenth of the "
    "images, which train then does without.",
}
_WORTH_A_LOOK = (
    "Worth a look is all that readers skip, drop or clip; images that do not open, have another size than "
    "annotated or are nearly black for their 16 bits; boxes drawn twice; images that are in two splits, or twice in "
    "one byte for byte; classes that the training split never shows or does not list; a split without any object, or "
    "that is not there. Images without objects are fine."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Ends in SystemExit(1) if something is worth a look."""
    given = parse_arguments(argv)
    plan = load_plan(given.cfg, input_hw=given.image_size)
    image_sets = open_splits(given.data, given.splits)
    letterbox = plan.net.letter_box if given.letterbox is None else given.letterbox
    sides = [input_sides(image_set, plan.net.input_hw, letterbox) for image_set in image_sets]
    anchors = np.array([anchor for head in plan.head_specs for anchor in head.head_anchors]).reshape(-1, 2)
    folder = free_folder(given.out, default=f"doctor-{image_sets[0].name}")
    findings = [] if given.splits else absent_splits(given.data)
    findings += quick_checkup(image_sets) if given.quick else full_checkup(image_sets, given.threads)
    for image_set, own in zip(image_sets, sides, strict=True):
        findings += tiny_findings(image_set, own)

    height, width = plan.net.input_hw
    name = f"{plan.name} at {height}x{width}"
    page = [f"data      {image_sets[0].name}, {'letterboxed' if letterbox else 'stretched'} for {name}", ""]
    page += overview(image_sets, sides)
    if len(anchors):
        page += ["", anchor_line(image_sets[0], sides[0], anchors, name)]
        page += [f"          python -m data.anchors --data {given.data} --cfg {given.cfg} looks for better ones"]
    whole = [*page, *verdict(findings, every_place=True)]
    (folder / "doctor.txt").write_text("\n".join(whole) + "\n", encoding="utf-8", errors="backslashreplace")
    draw_charts(image_sets, sides, folder / "doctor.png", input_hw=plan.net.input_hw, anchors=anchors)

    print("\n".join(whole if given.all else [*page, *verdict(findings, every_place=False)]))
    if given.quick:
        print("\nNo image was decoded (--quick).")
    print(f"\n{folder / 'doctor.txt'} has every place, {folder / 'doctor.png'} the histograms")
    if any(not each.is_note for each in findings):
        raise SystemExit(1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.doctor",
        description="What is in a data set, and what is wrong with it. "
        "Exit code: 0 nothing is wrong, 1 something is worth a look, 2 bad input.",
        epilog=_WORTH_A_LOOK,
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="PATH", help="a data set, as --data of train.py; digits is the built-in one")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help="which to look at, the one that is trained on first (default: train, val and test, as far as there)",
    )
    parser.add_argument("--cfg", default="yolov4-pico", help="network, as of train.py (default yolov4-pico)")
    parser.add_argument(
        "--image-size", type=parse_image_hw, metavar="PX", help="its input, as of train.py (default: the cfg's)"
    )
    parser.add_argument(
        "--letterbox",
        action=argparse.BooleanOptionalAction,
        help="whether images keep their aspect ratio (default: the cfg's letter_box)",
    )
    parser.add_argument("--quick", action="store_true", help="decode no image: what train.py does by itself")
    parser.add_argument("--all", action="store_true", help="print every place, not only the first of each kind")
    parser.add_argument("--out", metavar="FOLDER", help="for doctor.txt and doctor.png (default: runs/doctor-NAME)")
    parser.add_argument(
        "--threads",
        type=positive_number,
        default=os.cpu_count() or 1,
        metavar="N",
        help="that decode (default: all cores)",
    )
    return parser.parse_args(argv)


def absent_splits(data: str | Path) -> list[Finding]:
    """Those that a training wants; a lone COCO json need not have any."""
    there = splits_of(data)
    wanted = [] if Path(data).suffix == ".json" else [split for split in _WANTED if split not in there]
    kind = ("split that is not there", "splits that are not there")
    return [Finding(kind=kind, where=split, count=1, advice=_WANTED[split]) for split in wanted]


def open_splits(data: str | Path, wanted: Sequence[str] | None) -> list[ImageSet]:
    """Those wanted; else the usual ones that are there, else all that are. Raises UserError."""
    there = splits_of(data)
    if not wanted:
        # A json that stands for any split is one set of images.
        wanted = [split for split in _SPLITS if split in there] or there or ["train"]
    return [open_image_set(data, split) for split in dict.fromkeys(wanted)]


if __name__ == "__main__":
    run_page(main, CfgError)
