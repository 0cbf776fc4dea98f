"""The data sets and networks of the study, by name."""

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

_HW = {"bccd": (96, 128), "coco-tiny": (96, 96)}  # input of the small net, px; 80 x 80 for digits


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Data and network of a cell. path: for --data. test: the test split, None if there is none. shift: of digits."""

    path: str
    test: str | None
    shift: float | None
    input_hw: tuple[int, int]
    cfg: str


def prepare(cell: Cell, folders: Mapping[str, str]) -> Source:
    """Return the data and network of a cell, made if necessary. folders: of the data that is not made here, by name."""
    hw = _HW.get(cell.data, (80, 80)) if cell.net == "small" else (416, 416)
    shift = float(cell.data.removeprefix("digits-")) if cell.data.startswith("digits-") else None
    if shift is None and cell.data not in folders:
        raise UserError(f"{cell.data} is not made here: name its folder by --{cell.data.partition('-')[0]}")
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
    """Return a name or path for --cfg."""
    if net == "small":
        return str(HERE / "small.cfg")
    if net == "tiny":
        return "yolov4-tiny"
    MADE.mkdir(parents=True, exist_ok=True)
    path = MADE / "yolov4-half.cfg"
    path.write_text(half_width(load_plan("yolov4").source_text))
    return str(path)


def half_width(cfg_text: str) -> str:
    """Halve the filters of all layers, but those before the heads, which follow from classes and anchors."""
    sections = re.split(r"(?m)^(?=\[)", cfg_text)
    return "".join(_narrowed(sections))


def _narrowed(sections: list[str]) -> Iterator[str]:
    for section, following in zip(sections, [*sections[1:], ""], strict=True):
        if following.startswith("[yolo]"):
            yield section
        else:
            yield re.sub(r"(?m)^filters\s*=\s*(\d+)", lambda found: f"filters={int(found[1]) // 2}", section)
