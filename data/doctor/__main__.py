"""Check a data set before a training: `python -m data.doctor PATH`.

Prints a report, and writes it to a folder with every place of every finding and with histograms. Nothing imports this
page. Exit code: 0 if nothing is wrong, 1 if something is worth a look, 2 for bad input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass

import numpy as np

from cfg.parse import CfgError
from cfg.plan import load_plan
from data.annotation_formats import open_image_set, splits_of
from data.box_sizes import input_sides
from data.doctor.charts import draw_charts
from data.doctor.checkup import full_checkup, quick_checkup
from data.doctor.finding import Finding
from data.doctor.labels import tiny_findings
from data.doctor.report import anchor_line, overview, verdict
from data.formats.split_names import WHOLE
from data.image_set import ImageSet
from utils.atomic_file import write_text
from utils.console import line
from utils.flags import image_size_knob, parse_flags, resolve
from utils.knob import knob
from utils.page import run_page
from utils.run_folder import free_folder

_SPLITS = ("train", "val", "test")
_ADVICE_IF_ABSENT = {
    "train": "train.py learns from it: name another one with --train-split, or make a list of images with this name.",
    "val": "train.py chooses the best weights by it: name another one with --val-split, make it of a tenth of the "
    "training images, or let train.py hold them out (--val-fraction).",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions:
    """python -m data.doctor

    Show what is in a data set, and what is wrong with it. Exit code: 0 nothing is wrong, 1 something is worth a look, 2
    bad input. Worth a look is whatever readers skip, drop or clip; images that do not open, have another size than
    annotated or are nearly black for their 16 bits; boxes drawn twice; images with more objects than COCO's AP counts;
    equal files in two splits, or twice in one; classes that no object of the training split has, or that it does not
    list; a split without objects; an absent split. Images without objects are fine.
    """

    data: str = knob(
        MISSING, "data set, as --data of train.py; 'digits' is the built-in one", unit="PATH", positional=True
    )
    splits: tuple[str, ...] = knob(
        (), "splits to check, the training split first (default: train, val and test, where present)", unit="NAME"
    )
    cfg: str = knob("yolov4-pico", "network, as in train.py")
    image_size: tuple[int, int] | None = image_size_knob("its input size, as in train.py (default: the cfg's)")
    letterbox: bool | None = knob(None, "keep the images' aspect ratio (default: the cfg's letter_box)")
    quick: bool = knob(False, "decode no image: only what train.py checks by itself")
    all: bool = knob(False, "print every place, not only the first of each kind")
    out: str | None = knob(None, "folder for doctor.txt and doctor.png (default: runs/doctor-NAME)", unit="FOLDER")
    threads: int = knob(os.cpu_count() or 1, "threads that decode images (default: one per core)", unit="N", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report. Ends in SystemExit(1) if something is worth a look."""
    options = resolve(DoctorOptions, parse_flags(DoctorOptions, argv))
    plan = load_plan(options.cfg, input_hw=options.image_size)
    image_sets = open_splits(options.data, options.splits)
    letterbox = plan.net.letter_box if options.letterbox is None else options.letterbox
    sides = [input_sides(image_set, plan.net.input_hw, letterbox) for image_set in image_sets]
    anchors = np.array([anchor for head in plan.head_specs for anchor in head.head_anchors]).reshape(-1, 2)
    folder = free_folder(options.out, default=f"doctor-{image_sets[0].name}")
    findings = [] if options.splits else absent_splits(options.data)
    findings += quick_checkup(image_sets) if options.quick else full_checkup(image_sets, options.threads)
    for image_set, own in zip(image_sets, sides, strict=True):
        findings += tiny_findings(image_set, own)

    height, width = plan.net.input_hw
    name = f"{plan.name} at {height}x{width}"
    page = [line("data", f"{image_sets[0].name}, {'letterboxed' if letterbox else 'stretched'} for {name}"), ""]
    page += overview(image_sets, sides)
    if len(anchors):
        page += ["", anchor_line(image_sets[0], sides[0], anchors, name)]
        page += [line("", f"python -m data.anchors --data {options.data} --cfg {options.cfg} looks for better ones")]
    whole = [*page, *verdict(findings, every_place=True)]
    write_text(folder / "doctor.txt", "\n".join(whole) + "\n")
    draw_charts(image_sets, sides, folder / "doctor.png", input_hw=plan.net.input_hw, anchors=anchors)

    print("\n".join(whole if options.all else [*page, *verdict(findings, every_place=False)]))
    if options.quick:
        print("\nNo image was decoded (--quick).")
    print(f"\n{folder / 'doctor.txt'} has every place, {folder / 'doctor.png'} the histograms")
    if any(not each.is_note for each in findings):
        raise SystemExit(1)


def absent_splits(data: str) -> list[Finding]:
    """Report the splits that a training needs and the data set lacks; a set that nothing divides needs none."""
    present = splits_of(data)
    is_whole = present in ((), (WHOLE,))
    absent = [] if is_whole else [split for split in _ADVICE_IF_ABSENT if split not in present]
    kind = ("absent split", "absent splits")
    return [Finding(kind=kind, where=split, count=1, advice=_ADVICE_IF_ABSENT[split]) for split in absent]


def open_splits(data: str, names: Sequence[str]) -> list[ImageSet]:
    """Open the named splits; without names the usual ones that exist, else all. Raises UserError."""
    present = splits_of(data)
    # A json that fits every split is one set of images.
    names = names or [split for split in _SPLITS if split in present] or present or ["train"]
    return [open_image_set(data, split) for split in dict.fromkeys(names)]


if __name__ == "__main__":
    run_page(main, CfgError)
