"""Settings of training augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from data.user_pipeline import read_pipeline
from utils.errors import UserError
from utils.knob import check_limits, knob

MOSAIC_GEOMETRIES = ("content", "darknet")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentOptions:
    """Settings of training augmentation; the defaults are those of darknet's yolov4.cfg."""

    mosaic: float = knob(0.5, "share of training images that are mosaics of four (cfg: mosaic=1 is 0.5)", low=0, high=1)
    mosaic_geometry: str = knob(
        "content",
        "windows and boxes of a mosaic: content shows image instead of fill where it can and cuts boxes to their tile; "
        "darknet is as in darknet with min_visibility 0, min_side_px 1 (also with letter_box=1, which darknet refuses)",
        choices=MOSAIC_GEOMETRIES,
    )
    mosaic_bound: bool = knob(
        True, "cut boxes of a mosaic to their tiles; if off (only in darknet's geometry), to the whole mosaic"
    )
    mixup: float = knob(
        0.0, "share of training images blended with another one (cfg: mixup=1 without mosaic is 0.5)", low=0, high=1
    )
    cutmix: float = knob(0.0, "share of training images with a window of another one pasted in", low=0, high=1)
    close_mosaic: float = knob(
        0.0, "train without mosaic, mixup and cutmix in this last share of the steps", low=0, high=1
    )
    max_boxes: int | None = knob(
        None, "keep at most N random objects per training image (cfg, in darknet's geometry: max)", unit="N", low=1
    )
    flip: bool = knob(True, 'mirror half of the images (off if the data set forbids it: "mirror_safe": false)')
    flip_ud: bool = knob(False, "turn half of the images upside down")
    rotate: float = knob(
        0.0,
        "rotate by up to this, either way; the box of the ellipse in an object's box becomes its box (not read from a "
        "cfg: angle is for darknet's classifiers)",
        unit="DEGREES",
        low=0,
        high=180,
    )
    jitter: float = knob(0.3, "move each margin of the crop by up to this share of the side", low=0, high=0.45)
    resize: float = knob(1.5, "zoom between 1/resize and resize", low=1, high=10)
    letterbox: bool = knob(False, "keep the images' aspect ratio, in training and evaluation (cfg: letter_box)")
    saturation: float = knob(1.5, "multiply or divide the saturation by up to this", low=1, high=100)
    exposure: float = knob(1.5, "multiply or divide the brightness by up to this", low=1, high=100)
    hue: float = knob(0.1, "shift the hue by up to this share of the colour circle", low=0, high=0.5)
    blur: float = knob(0.0, "probability of Gaussian blur", low=0, high=1)
    noise: float = knob(0.0, "probability of Gaussian noise", low=0, high=1)
    albumentations: str | None = knob(
        None,
        "apply a pipeline that albumentations has saved (A.save, .json or .yaml) to each image, before all the rest "
        "but shrinking: large images come in a size near 1.5 times the input's; the run keeps a copy",
        unit="FILE",
        parse=read_pipeline,
    )
    min_visibility: float = knob(
        0.2, "drop objects with a smaller share of their area left after all cuts", low=0, high=1
    )
    min_side_px: float = knob(2.0, "drop objects with a shorter side left after all cuts", unit="PX", low=0, high=1000)
    fill: tuple[int, int, int] | None = None  # RGB around the image; None: its mean colour, as in darknet

    def __post_init__(self) -> None:
        check_limits(self)
        if self.mosaic_geometry != "darknet" and not self.mosaic_bound:
            raise UserError("boxes that reach beyond their tile, --no-mosaic-bound, need --mosaic-geometry darknet")
