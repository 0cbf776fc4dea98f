"""Data structures shared by all rooms.

Boxes are xyxy in pixels, float32, everywhere; each field documents which pixels (network input or source image).
Normalized centre boxes exist only in the darknet label reader and in `models/yolo/coder.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Position of a source image inside the network input: `input = source * scale + offset`, in pixels.

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
        """Convert boxes (M, 4) xyxy from source to input pixels."""
        return boxes * self._scale() + self._offset()

    def to_source(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes (M, 4) xyxy from input to source pixels, clipped to the image."""
        height, width = self.source_hw
        source = (boxes - self._offset()) / self._scale()
        return source.clip(0, np.array([width, height, width, height], source.dtype))

    def _scale(self) -> np.ndarray:
        return np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y], np.float32)

    def _offset(self) -> np.ndarray:
        return np.array([self.left_px, self.top_px, self.left_px, self.top_px], np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its ground truth, in numpy, before it becomes part of a Batch.

    image: (H, W, 3) RGB, uint8 or float32 in 0..1. boxes: (M, 4) float32 xyxy in pixels of `image`. labels: (M,)
    int64 class indices. is_crowd: (M,) bool, regions that are neither object nor background (COCO crowds, VOC
    difficult). placement: set if `image` is one whole source image resized to the network input. domain: the data set
    it is from, of those of a training.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    image_id: int
    path: str
    placement: Placement | None = None
    domain: int = 0

    def where(self, keep: np.ndarray) -> Sample:
        """Select objects by a mask (M,) bool, or by indices (M',) in their order."""
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], is_crowd=self.is_crowd[keep])


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Ground truth of a mini-batch, flattened over its images.

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
        """Return the objects of images start..stop-1, with these images renumbered from 0."""
        keep = (self.image_index >= start) & (self.image_index < stop)
        return Targets(
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            image_index=self.image_index[keep] - start,
            is_crowd=self.is_crowd[keep],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images and targets; one optimizer step consumes one training Batch.

    images: (N, 3, H, W) uint8 RGB, or float in 0..1. image_ids, paths and placements have N entries; a mosaic has the
    id of its first image and no placement. domains: each image's.
    """

    images: Tensor
    targets: Targets
    image_ids: tuple[int, ...]
    paths: tuple[str, ...]
    placements: tuple[Placement | None, ...]
    domains: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Move the images only. Assignment branches on targets, and reading them from a GPU would synchronize."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy the images to page-locked memory, for asynchronous transfer to a GPU."""
        return replace(self, images=self.images.pin_memory())

    def pixels(self) -> Tensor:
        """Return the network's input, (N, 3, H, W) float32 in 0..1; uint8 until here, a quarter of the size."""
        return pixels_of(self.images)

    def split(self, parts: int, *, by_domain: bool = False) -> Iterator[Batch]:
        """Yield at most `parts` mini-batches, in order; their sizes differ by at most one.

        by_domain: cut also where the domain changes, without larger mini-batches. So each is of one domain, if the
        images are sorted by it.
        """
        parts = max(1, min(parts, len(self)))
        runs, edges = [(len(self), parts)], [0]
        if by_domain:
            most = -(-len(self) // parts)
            lengths = [len(list(run)) for _, run in groupby(self.domains)]
            runs = [(length, -(-length // most)) for length in lengths]
        for length, count in runs:
            edges += [edges[-1] + length * (i + 1) // count for i in range(count)]
        for start, stop in pairwise(edges):
            yield Batch(
                images=self.images[start:stop],
                targets=self.targets.of_images(start, stop),
                image_ids=self.image_ids[start:stop],
                paths=self.paths[start:stop],
                placements=self.placements[start:stop],
                domains=self.domains[start:stop],
            )


def pixels_of(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in 0..1; float images stay as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """Detections of one image, best first.

    boxes: (K, 4) float32 xyxy in input pixels. scores: (K,) in 0..1. labels: (K,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Tensor) -> Detections:
        """Select by a mask (K,) bool, or by indices (K',) int64 in their order."""
        return Detections(boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def cpu(self) -> Detections:
        return Detections(boxes=self.boxes.cpu(), scores=self.scores.cpu(), labels=self.labels.cpu())
