"""The [yolo] section: one detection head.

Keys and defaults: darknet `parser.c`, parse_yolo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cfg.parse import Section
from cfg.spec import MAX_CHANNELS, LayerSpec, Shape, ShapeError, key, read_keys

IOU_LOSSES = ("mse", "iou", "giou", "diou", "ciou")
IOU_THRESH_KINDS = IOU_LOSSES[1:]
NMS_KINDS = ("default", "greedynms", "diounms")


@dataclass(frozen=True, kw_only=True, slots=True)
class YoloSpec(LayerSpec):
    """Anchors, loss and inference settings of one head.

    anchors: (width, height) in input pixels, those of all heads; mask: indices of this head's anchors.
    random: 0 is off, 1 a resize factor of 1.4, any other value is the factor.
    counters_per_class: number of training objects of each class, for class weights; empty for none.
    """

    kind: ClassVar[str] = "yolo"

    classes: int = key(20, low=1, high=MAX_CHANNELS)
    anchors: tuple[tuple[float, float], ...]
    mask: tuple[int, ...]
    scale_x_y: float = key(1.0, low=1)
    new_coords: bool = key(False)

    ignore_thresh: float = key(0.5)
    truth_thresh: float = key(1.0)
    iou_thresh: float = key(1.0)
    iou_thresh_kind: str = key("iou", choices=IOU_THRESH_KINDS)
    iou_loss: str = key("mse", choices=IOU_LOSSES)
    iou_normalizer: float = key(0.75)
    obj_normalizer: float = key(1.0)
    cls_normalizer: float = key(1.0)
    delta_normalizer: float = key(1.0)
    counters_per_class: tuple[int, ...] = ()
    max_delta: float = key(math.inf, low=0)
    objectness_smooth: bool = key(False)
    label_smooth_eps: float = key(0.0, low=0, high=1)
    focal_loss: bool = key(False)

    jitter: float = key(0.2, low=0, high=1)
    resize: float = key(1.0, low=0)
    random: float = key(0.0, low=0)
    max_boxes: int = key(200, "max", low=1)

    nms_kind: str = key("default", choices=NMS_KINDS, unknown="default")
    beta_nms: float = key(0.6)

    @property
    def head_anchors(self) -> tuple[tuple[float, float], ...]:
        """This head's anchors, (width, height) in input pixels, in channel order."""
        return tuple(self.anchors[i] for i in self.mask)

    @property
    def channels(self) -> int:
        """Number of input channels: for each anchor x, y, w, h, objectness and one per class."""
        return len(self.mask) * (5 + self.classes)

    @classmethod
    def read(cls, section: Section) -> YoloSpec:
        """Read the section. Raises CfgError."""
        anchors = _read_anchors(section)
        mask = section.integers("mask") or tuple(range(len(anchors)))
        for i in mask:
            if not 0 <= i < len(anchors):
                raise section.error(f"mask names anchor {i}, but there are {len(anchors)} anchors", "mask")
        if len(set(mask)) != len(mask):
            raise section.error("mask names an anchor twice", "mask")
        section.ignore("show_details", "beta1", "uc_normalizer", "embedding_layer")
        section.ignore("track_history_size", "sim_thresh", "dets_for_track", "dets_for_show", "track_ciou_norm")
        section.refuse_unless(map="")
        values = read_keys(cls, section)
        counters = section.integers("counters_per_class")
        if counters and (len(counters) != values["classes"] or min(counters) < 1):
            message = f"counters_per_class needs {values['classes']} positive numbers, one per class"
            raise section.error(message, "counters_per_class")
        return cls(anchors=anchors, mask=mask, counters_per_class=counters, **values)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        if inputs[0].channels != self.channels:
            raise ShapeError(
                f"[yolo] needs {self.channels} channels, {len(self.mask)} anchors * (5 + {self.classes} "
                f"classes), but its input has {inputs[0].channels}"
            )
        return inputs[0]


def _read_anchors(section: Section) -> tuple[tuple[float, float], ...]:
    # darknet stops reading after `num` anchors, so a comma at the end is harmless here; in other lists it adds a 0.
    values = section.numbers("anchors", required=True, spare_comma=True)
    count = section.integer("num", len(values) // 2, low=1)
    if len(values) != 2 * count:
        raise section.error(f"anchors holds {len(values)} numbers, num={count} needs {2 * count}", "anchors")
    if min(values) <= 0:
        raise section.error("anchors must be positive", "anchors")
    return tuple(zip(values[::2], values[1::2], strict=True))


SPECS = (YoloSpec,)
