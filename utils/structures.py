"""The nouns that pass through doors between rooms.

Boxes are xyxy in pixels, float32, everywhere; which pixels (network input or source image) is said by
the field. Normalized centre boxes exist only in the darknet label reader and in `models/yolo/coder.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a source image lies inside the network input: `input = source * scale + offset`, in pixels.

    The image may have been stretched (scale_x != scale_y) or letterboxed (offsets > 0).
    """

    source_hw: tuple[int, int]
    scale_x: float
    scale_y: float
    left_px: float
    top_px: float

    @property
    def pixel_px(self) -> tuple[float, float]:
        """Width and height of one pixel of the source image, in input pixels."""
        return self.scale_x, self.scale_y

    @property
    def image_px(self) -> tuple[float, float]:
        """Width and height of the whole image, in input pixels."""
        return self.scale_x * self.source_hw[1], self.scale_y * self.source_hw[0]

    def to_input(self, boxes: np.ndarray) -> np.ndarray:
        """(M, 4) xyxy in source pixels -> (M, 4) xyxy in input pixels."""
        return boxes * self._scale() + self._offset()

    def to_source(self, boxes: np.ndarray) -> np.ndarray:
        """(M, 4) xyxy in input pixels -> (M, 4) xyxy in source pixels, clipped to the image."""
        height, width = self.source_hw
        source = (boxes - self._offset()) / self._scale()
        return source.clip(0, np.array([width, height, width, height], source.dtype))

    def _scale(self) -> np.ndarray:
        return np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y], np.float32)

    def _offset(self) -> np.ndarray:
        return np.array([self.left_px, self.top_px, self.left_px, self.top_px], np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its objects, in numpy: the data room's currency, before it becomes part of a Batch.

    image: (H, W, 3) RGB, uint8 or float32 in 0..1. boxes: (M, 4) float32 xyxy in pixels of `image`. labels: (M,)
    int64 class indices. is_crowd: (M,) bool, regions that neither count as objects nor as background (COCO crowds,
    VOC difficult). placement: present when `image` is one whole source image laid into a network input.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    image_id: int
    path: str
    placement: Placement | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The objects of a mini-batch, flattened over its images.

    boxes: (M, 4) float32 xyxy in input pixels. labels: (M,) int64. image_index: (M,) int64 into the
    mini-batch. is_crowd: (M,) bool.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    is_crowd: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_images(self, start: int, stop: int) -> Targets:
        """The objects of images start..stop-1, renumbered from 0."""
        keep = (self.image_index >= start) & (self.image_index < stop)
        return Targets(
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            image_index=self.image_index[keep] - start,
            is_crowd=self.is_crowd[keep],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images on their way through the network; one optimizer step consumes one training Batch.

    images: (N, 3, H, W) uint8 RGB, or float in 0..1. image_ids and placements have N entries; a mosaic has
    the id of its first image and no placement.
    """

    images: Tensor
    targets: Targets
    image_ids: tuple[int, ...]
    paths: tuple[str, ...]
    placements: tuple[Placement | None, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The images. The targets stay: how many there are, and who answers for them, is asked all the time, and a
        GPU would have to be waited for."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """With the images in page-locked memory, from which a GPU fetches them while the program goes on."""
        return replace(self, images=self.images.pin_memory())

    def pixels(self) -> Tensor:
        """(N, 3, H, W) float32 in 0..1: what the network takes. uint8 travels, because it is a quarter."""
        return pixels_of(self.images)

    def split(self, parts: int) -> Iterator[Batch]:
        """Cut into at most `parts` mini-batches whose sizes differ by at most one, in order."""
        parts = max(1, min(parts, len(self)))
        edges = [len(self) * i // parts for i in range(parts + 1)]
        for start, stop in pairwise(edges):
            yield Batch(
                images=self.images[start:stop],
                targets=self.targets.of_images(start, stop),
                image_ids=self.image_ids[start:stop],
                paths=self.paths[start:stop],
                placements=self.placements[start:stop],
            )


def pixels_of(images: Tensor) -> Tensor:
    """uint8 as float32 in 0..1; what is float already, as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """What the detector found in one image, best first.

    boxes: (K, 4) float32 xyxy in input pixels. scores: (K,) in 0..1. labels: (K,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Tensor) -> Detections:
        """Those for which keep (K,) bool is true, or those that it names (K',) int64, in its order."""
        return Detections(boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def cpu(self) -> Detections:
        return Detections(boxes=self.boxes.cpu(), scores=self.scores.cpu(), labels=self.labels.cpu())
