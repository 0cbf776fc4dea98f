"""A trained network with everything it takes to use it.

From Python: `detector = Detector.load("best.pt"); found = detector("street.jpg")` (docs/python.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from cfg.plan import Plan
from models.found import Found
from models.network import Network
from models.predictor import EXPORTED, Predictor, TorchPredictor, fast_predictor
from models.stored_network import build_network
from models.thresholds import Thresholds
from models.weights.trained import read_trained
from models.yolo.postprocess import DetectionOptions, DrawnDetectionOptions, suppress
from utils.checkpoint import Checkpoint
from utils.console import line
from utils.environment import pick_device
from utils.errors import UserError
from utils.knob import check_limits
from utils.letterbox import as_input
from utils.rgb_image import AnyImage, rgb_of
from utils.structures import Detections, Placement, pixels_of

_Image = TypeVar("_Image", bound=AnyImage)
_CPU_IMAGES, _GPU_IMAGES = 4, 16  # of a list, in one forward; a CPU gains with small networks, by their overhead


@dataclass(frozen=True, kw_only=True, slots=True)
class Detector:
    """A predictor and what is done before and after it; call it with images. Several threads may use one at a time.

    letterbox: images keep their aspect ratio in the network's input. origin: lines for the console about where
    darknet's weights and names come from. thresholds: scores from which detections of each class count, if any, which
    are then no lower than the options' confidence. Raises UserError for options that the predictor cannot follow.
    """

    predictor: Predictor
    class_names: tuple[str, ...]
    letterbox: bool
    options: DetectionOptions
    origin: tuple[str, ...] = ()
    thresholds: Thresholds | None = None

    def __post_init__(self) -> None:
        self.predictor.check(self.options)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        cfg: str | None = None,
        names: str | None = None,
        domain: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        input_hw: tuple[int, int] | None = None,
        options: DetectionOptions | None = None,
        use_thresholds: bool | None = None,
    ) -> Detector:
        """Load a checkpoint, .safetensors, darknet's .weights with their cfg, or an exported file, by its ending.

        names: a file of darknet's class names, one a line. domain: of a checkpoint with several. device: see
        `pick_device`. precision: see `fast_predictor`; an exported file has its own. input_hw: (height, width) in
        pixels, in place of the trained ones. options: of DrawnDetectionOptions by default; the `resize` of an exported
        file takes the place of "opencv" there. use_thresholds: whether the confidences that the file may have, by
        class, take the place of the options'; by default without options only.
        Raises UserError for what is missing, damaged or of another kind; no code is run that a file holds.
        """
        use_thresholds = options is None if use_thresholds is None else use_thresholds
        path, options = os.fspath(path), options or DrawnDetectionOptions()
        if input_hw is not None:
            _check_size(input_hw)
        if is_exported(path):
            if cfg is not None or names is not None or domain is not None:
                raise UserError(f"{path}: an exported file knows its network and classes: leave cfg, names, domain out")
            # Here, because it needs a runtime.
            from models.export.load import load_exported

            exported = load_exported(Path(path), device=device, input_hw=input_hw)
            if options.resize == "opencv":
                options = replace(options, resize=exported.resize)
            detector = cls(
                predictor=exported, class_names=exported.class_names, letterbox=exported.letterbox, options=options
            )
            return detector.with_thresholds(exported.thresholds) if use_thresholds else detector
        checkpoint, origin = read_trained(path, cfg=cfg, names=names, domain=domain)
        detector = cls.from_checkpoint(checkpoint, options, path=path, device=pick_device(device), input_hw=input_hw)
        if precision == "auto" and options.resize == "darknet":
            precision = "float32"  # to be compared with darknet's boxes
        detector = replace(detector, predictor=fast_predictor(detector.network, precision), origin=origin)
        return detector.with_thresholds(stored_thresholds(checkpoint, path)) if use_thresholds else detector

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        options: DetectionOptions,
        *,
        path: str,
        device: torch.device,
        input_hw: tuple[int, int] | None = None,
    ) -> Detector:
        """Build the network as it was trained, with its norms. Raises UserError as `build_network`.

        input_hw: in place of the checkpoint's.
        """
        return cls(
            predictor=TorchPredictor(network=build_network(checkpoint, path=path, input_hw=input_hw).to(device)),
            class_names=checkpoint.class_names,
            letterbox=checkpoint.letterbox,
            options=options,
        )

    def with_options(self, **changed: Any) -> Detector:
        """Return the same detector with other options. A confidence takes the place of the thresholds."""
        thresholds = None if "confidence" in changed else self.thresholds
        return replace(self, options=replace(self.options, **changed), thresholds=thresholds)

    def with_thresholds(self, thresholds: Thresholds | None) -> Detector:
        """Return the same detector with these thresholds in place of its confidence; None changes nothing."""
        if thresholds is None:
            return self
        options = replace(self.options, confidence=min(thresholds.confidences(self.class_names)))
        origin = (*self.origin, line("scores", f"above {thresholds.words(self.class_names)}"))
        return replace(self, options=options, thresholds=thresholds, origin=origin)

    @property
    def confidences(self) -> Tensor:
        """(C,) float32: the score above which a detection of each class counts."""
        if self.thresholds is None:
            return torch.full((len(self.class_names),), self.options.confidence)
        return torch.tensor(self.thresholds.confidences(self.class_names))

    @property
    def network(self) -> Network:
        """The network in PyTorch, for what needs its norms. Raises UserError for an exported file."""
        if not isinstance(self.predictor, TorchPredictor):
            raise UserError("an exported file has no norms, they are folded into its convolutions: give the checkpoint")
        return self.predictor.network

    @property
    def plan(self) -> Plan:
        return self.predictor.plan

    @property
    def input_hw(self) -> tuple[int, int]:
        """(height, width) in pixels that images are laid into."""
        return self.plan.net.input_hw

    @property
    def size_step_px(self) -> int:
        """What the sides of an input must be multiples of."""
        return self.plan.size_step_px

    @property
    def device(self) -> torch.device:
        return self.predictor.device

    @property
    def images_per_forward(self) -> int:
        """How many of many images are detected in at once."""
        return _CPU_IMAGES if self.device.type == "cpu" else _GPU_IMAGES

    @overload
    def __call__(
        self,
        images: AnyImage,
        *,
        confidence: float | None = None,
        nms_iou: float | None = None,
        classes: Sequence[str] = (),
    ) -> Found: ...

    @overload
    def __call__(
        self,
        images: list[_Image] | tuple[_Image, ...],
        *,
        confidence: float | None = None,
        nms_iou: float | None = None,
        classes: Sequence[str] = (),
    ) -> list[Found]: ...

    def __call__(
        self,
        images: AnyImage | list[_Image] | tuple[_Image, ...],
        *,
        confidence: float | None = None,
        nms_iou: float | None = None,
        classes: Sequence[str] = (),
    ) -> Found | list[Found]:
        """Detect in an image of any size, or in each of a list or tuple of them.

        images: see `rgb_of`. confidence, nms_iou: in place of the options'. classes: by name; () is all of them.
        Raises UserError, TypeError and ValueError, with one sentence, for what is no image, number or class.
        """
        changed = {"confidence": confidence, "nms_iou": nms_iou}
        detector = self.with_options(**{name: value for name, value in changed.items() if value is not None})
        check_limits(detector.options)
        kept = self.labels_of(classes)
        if not isinstance(images, list | tuple):
            return detector._find([images], kept)[0]
        if not images:
            raise ValueError("the list of images is empty")
        size = self.images_per_forward
        return [found for k in range(0, len(images), size) for found in detector._find(images[k : k + size], kept)]

    def _find(self, images: Sequence[AnyImage], kept: Tensor) -> list[Found]:
        """Detect objects of the labels `kept`, in one forward."""
        most = self.options.max_detections
        of_all = self if len(kept) == len(self.class_names) else self.with_options(max_detections=None)
        found = of_all.detect([rgb_of(image) for image in images])
        of_classes = [each.where(torch.isin(each.labels, kept).nonzero()[:most, 0]) for each in found]
        return [Found.of(each, self.class_names, image) for each, image in zip(of_classes, images, strict=True)]

    def labels_of(self, classes: Sequence[str]) -> Tensor:
        """Return the labels (C,) of the named classes, of all for (). Raises UserError for an unknown one."""
        if isinstance(classes, str):
            raise TypeError(f"classes is a list of names, such as ['{classes}'], not a string")
        if unknown := [name for name in classes if name not in self.class_names]:
            known = ", ".join(self.class_names[:20])
            raise UserError(f"the network knows no class '{unknown[0]}', but {known}")
        return torch.tensor([self.class_names.index(name) for name in classes or self.class_names])

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect in images (H, W, 3) uint8 RGB of any sizes, in one forward.

        Returns boxes in each image's own pixels, on the CPU.
        """
        laid = [self.lay(image) for image in images]
        stacked = torch.from_numpy(np.stack([image for image, _ in laid]))
        pixels = pixels_of(stacked.to(self.device).permute(0, 3, 1, 2).contiguous())
        placements = [placement for _, placement in laid]
        # Distances in NMS are relative to the image, as in darknet.
        found = self.detect_batch(pixels, [placement.image_px for placement in placements])
        return [_in_image(each.cpu(), placement) for each, placement in zip(found, placements, strict=True)]

    def lay(self, image: np.ndarray) -> tuple[np.ndarray, Placement]:
        """Lay an image (H, W, 3) uint8 RGB into the network's input (see `as_input`)."""
        return as_input(image, self.input_hw, letterbox=self.letterbox, how=self.options.resize)

    @torch.no_grad()
    def detect_batch(self, images: Tensor, units_px: Sequence[tuple[float, float]] | None = None) -> list[Detections]:
        """Detect in a mini-batch (N, 3, H, W) in 0..1 on the predictor's device. Returns N Detections in input pixels.

        units_px: per image, the unit (width, height) in which NMS measures distances; None: input pixels.
        """
        candidates = self.predictor.candidates(images, confidence=self.options.confidence)
        if self.thresholds is not None:
            lowest = self.confidences.to(self.device)
            candidates = [each.where(each.scores > lowest[each.labels]) for each in candidates]
        return suppress(candidates, self.plan.head_specs[-1], self.options, units_px)


def stored_thresholds(checkpoint: Checkpoint, path: str) -> Thresholds | None:
    """Return the checkpoint's thresholds, if it has some. Raises UserError, which names `path`, for damaged ones."""
    if not checkpoint.thresholds:
        return None
    try:
        return Thresholds.from_json(checkpoint.thresholds)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its thresholds cannot be used ({error}): give --confidence") from error


def is_exported(path: str) -> bool:
    """Return whether a file is one that export.py writes, by its ending."""
    return Path(path).suffix.lower() in EXPORTED


def _check_size(input_hw: object) -> None:
    match input_hw:
        case (int(height), int(width)) if height > 0 and width > 0:
            return
    raise UserError(f"input_hw is {input_hw!r}, not (height, width) in pixels, such as (416, 416)")


def _in_image(found: Detections, placement: Placement) -> Detections:
    """Bring boxes from input pixels to the image's, without those that lie wholly in the letterbox's border."""
    boxes = torch.from_numpy(placement.to_source(found.boxes.numpy()))
    inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    return Detections(boxes=boxes, scores=found.scores, labels=found.labels).where(inside)
