"""The data sets and networks of the study, by name, with what each asks of the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.small_batch.grid import Cell
from cfg.plan import load_plan
from data.digits import make_digits
from utils.errors import UserError

HERE = Path(__file__).parent
MADE = HERE.parent.parent / "datasets" / "small_batch"  # ignored by git

DATA = ("digits-0", "digits-0.4", "digits-1", "bccd", "coco-tiny")
NETS = ("small", "tiny", "half")


_HW = {"bccd": (96, 128), "coco-tiny": (96, 96)}  # of the small net's input; digits have 80 x 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """path: for --data, with splits train and val. test: None where there is no third split, so that nothing is tested
    there. shift: of the digits."""

    path: str
    test: str | None
    shift: float | None
    input_hw: tuple[int, int]
    cfg: str


def prepare(cell: Cell, folders: Mapping[str, str]) -> Source:
    """What a cell trains on and with, made unless it is there. folders: of the data that is not made, by name."""
    hw = _HW.get(cell.data, (80, 80)) if cell.net == "small" else (416, 416)
    shift = float(cell.data.removeprefix("digits-")) if cell.data.startswith("digits-") else None
    if shift is None and cell.data not in folders:
        raise UserError(f"{cell.data} is not made here: give its folder with --{cell.data.partition('-')[0]}")
    return Source(
        path=folders[cell.data] if shift is None else str(_digits(shift, hw[0], cell.scenes)),
        test=None if cell.data == "coco-tiny" else "test",
        shift=shift,
        input_hw=hw,
        cfg=_cfg(cell.net),
    )


def _digits(shift: float, side: int, scenes: int) -> Path:
    counts = {"train": scenes, "val": min(256, scenes // 4), "test": min(512, scenes // 2)}
    folder = MADE / f"digits-{side}px-{scenes}-shift{shift:g}"
    return make_digits(folder, counts=counts, hw=(side, side), shift=shift)


def _cfg(net: str) -> str:
    """A name or path for --cfg."""
    if net == "small":
        return str(HERE / "small.cfg")
    if net == "tiny":
        return "yolov4-tiny"
    MADE.mkdir(parents=True, exist_ok=True)
    path = MADE / "yolov4-half.cfg"
    path.write_text(half_width(load_plan("yolov4").source_text))
    return str(path)


def half_width(cfg_text: str) -> str:
    """Half the filters everywhere but before the heads, whose number follows from classes and anchors."""
    sections = re.split(r"(?m)^(?=\[)", cfg_text)
    return "".join(_narrowed(sections))


def _narrowed(sections: list[str]) -> Iterator[str]:
    for section, following in zip(sections, [*sections[1:], ""], strict=True):
        if following.startswith("[yolo]"):
            yield section
        else:
            yield re.sub(r"(?m)^filters\s*=\s*(\d+)", lambda found: f"filters={int(found[1]) // 2}", section)
