"""What an exported file says about itself: one json string under the key `yolov4_norms`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cfg.parse import CfgError
from cfg.plan import MAX_FILE_BYTES, Plan, parse_plan
from models.thresholds import Thresholds
from utils.errors import UserError

KEY = "yolov4_norms"
FORMAT = 1
OUTPUTS = ("decoded", "heads", "nms")
PRECISIONS = ("float32", "float16", "int8")
MAX_TEXT_BYTES = 4 * MAX_FILE_BYTES
MAX_BATCH = 1024  # a smaller batch is filled up to the file's


@dataclass(frozen=True, kw_only=True, slots=True)
class Suppression:
    """The rule of the graph's own suppression: IoU, class by class. Raises ValueError for values that cannot be."""

    iou: float
    confidence: float  # boxes below this score are not in the output
    max_per_class: int

    def __post_init__(self) -> None:
        if not (_is_share(self.iou) and _is_share(self.confidence) and _is_count(self.max_per_class)):
            raise ValueError(f"suppression is {self.iou}, {self.confidence}, {self.max_per_class}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Everything it takes to use an exported file. Raises ValueError or TypeError for values that cannot be."""

    cfg_name: str  # "yolov4-tiny"
    cfg_text: str
    class_names: tuple[str, ...]
    input_hw: tuple[int, int]  # pixels
    letterbox: bool
    resize: str  # of utils.letterbox.RESIZES
    norm: str  # that it was trained with
    outputs: str  # of OUTPUTS
    precision: str  # of PRECISIONS
    batch: int | None  # images of one call; None: any number, of any size that the network's strides divide
    suppression: Suppression | None = None  # of outputs nms
    thresholds: Thresholds | None = None  # the best by F1 on validation images, where the checkpoint has such
    format: int = FORMAT

    def __post_init__(self) -> None:
        texts = (self.cfg_name, self.cfg_text, self.resize, self.norm, self.outputs, self.precision, *self.class_names)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.letterbox, bool):
            raise TypeError("a value has the wrong type")
        if not self.class_names:
            raise ValueError("there are no classes")
        counts = self.input_hw if self.batch is None else (*self.input_hw, self.batch)
        if len(self.input_hw) != 2 or not all(map(_is_count, counts)) or (self.batch or 1) > MAX_BATCH:
            raise ValueError(f"{self.batch} images of {self.input_hw} cannot be")
        if self.outputs not in OUTPUTS or (self.outputs == "nms") != (self.suppression is not None):
            raise ValueError(f"outputs are '{self.outputs}'")
        if self.precision not in PRECISIONS or self.resize not in ("opencv", "darknet"):
            raise ValueError(f"precision is '{self.precision}', resize '{self.resize}'")

    @property
    def is_dynamic(self) -> bool:
        return self.batch is None

    def to_json(self) -> str:
        thresholds = None if self.thresholds is None else self.thresholds.to_json()
        return json.dumps({**asdict(self), "thresholds": thresholds})

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> Metadata:
        """Raises UserError, which names the file, if this is not what `to_json` wrote."""
        if text is None:
            raise UserError(
                f"{path}: is not a file that export.py wrote, it has no metadata '{KEY}': export the checkpoint itself"
            )
        try:
            if len(text) > MAX_TEXT_BYTES:
                raise ValueError(f"more than {MAX_TEXT_BYTES} bytes")
            content = json.loads(text)
            if not isinstance(content, Mapping):
                raise TypeError("it is no object")
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            values: dict[str, Any] = {"thresholds": None, **content}  # earlier versions wrote none
            values = {each.name: values[each.name] for each in fields(cls)}
            for name in ("class_names", "input_hw"):
                values[name] = tuple(values[name])
            if values["thresholds"] is not None:
                values["thresholds"] = Thresholds.from_json(values["thresholds"])
            if values["suppression"] is not None:
                values["suppression"] = Suppression(**values["suppression"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: its metadata '{KEY}' cannot be used: {what}") from error

    def plan(self, path: Path, input_hw: tuple[int, int] | None = None) -> Plan:
        """Return the network's plan, for another input size if one is given. Raises UserError."""
        if input_hw is not None and input_hw != self.input_hw and not self.is_dynamic:
            height, width = self.input_hw
            raise UserError(f"{path}: takes {height}x{width} pixels only; export with --dynamic for other sizes")
        if input_hw is not None and input_hw != self.input_hw:
            (height, width), step = input_hw, self.plan(path).size_step_px
            if height % step or width % step:
                raise UserError(f"{path}: {height}x{width} pixels are not multiples of the network's {step}")
        try:
            name, classes = f"{self.cfg_name}.cfg", len(self.class_names)
            plan = parse_plan(self.cfg_text, path=name, classes=classes, input_hw=input_hw or self.input_hw)
        except CfgError as error:
            raise UserError(f"{path}: its metadata '{KEY}' has a cfg that cannot be read: {error}") from error
        if not plan.heads:
            raise UserError(f"{path}: its metadata '{KEY}' has a cfg without [yolo]")
        return plan


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
