"""What a detector found in one image, for Python programs: numpy arrays, and the forms that other libraries take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.draw import draw_boxes
from utils.errors import UserError
from utils.rgb_image import AnyImage, rgb_of
from utils.structures import Detections

if TYPE_CHECKING:
    import supervision


class FoundObject(NamedTuple):
    """One object. box: left, top, right, bottom in pixels of the image."""

    name: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False, slots=True)
class Found:
    """The objects in one image, best first.

    boxes: (K, 4) float32 xyxy in pixels of the upright image. scores: (K,) float32 in 0..1. labels: (K,) int64, indices
    into class_names. source: the image as it was given. Iteration gives a FoundObject each.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: AnyImage

    @classmethod
    def of(cls, found: Detections, class_names: tuple[str, ...], source: AnyImage) -> Found:
        """found: on the CPU, boxes in pixels of the image."""
        boxes, scores, labels = found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()
        return cls(boxes=boxes, scores=scores, labels=labels, class_names=class_names, source=source)

    @property
    def names(self) -> list[str]:
        """Each object's class name."""
        return [self.class_names[label] for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[FoundObject]:
        for name, score, (left, top, right, bottom) in zip(
            self.names, self.scores.tolist(), self.boxes.tolist(), strict=True
        ):
            yield FoundObject(name, score, (left, top, right, bottom))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        return f"Found({counts or 'nothing'})"

    def __str__(self) -> str:
        return "\n".join(f"{each.name} {each.score:.2f} at {[round(side) for side in each.box]}" for each in self)

    def plot(self) -> np.ndarray:
        """Return a copy of the image, (H, W, 3) uint8 RGB, with boxes, class names and scores.

        A file is read again. Raises UserError if that fails.
        """
        return draw_boxes(rgb_of(self.source), self.boxes, self.labels, self.class_names, self.scores)

    def to_supervision(self) -> supervision.Detections:
        """Return supervision's Detections, with `class_name`. Raises UserError where supervision is not installed."""
        try:
            import supervision
        except ImportError as error:
            raise UserError("supervision is not installed: run `pip install supervision`") from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_coco(self, image_id: int, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """Return rows of COCO's results format (json), bbox as x, y, width, height in pixels.

        category_ids: by class name, as in the annotations; without them classes are numbered from 1, in their order.
        Classes that it lacks are left out.
        """
        if category_ids is None:
            category_ids = {name: number for number, name in enumerate(self.class_names, start=1)}
        return [
            {
                "image_id": image_id,
                "category_id": category_ids[each.name],
                "bbox": [each.box[0], each.box[1], each.box[2] - each.box[0], each.box[3] - each.box[1]],
                "score": each.score,
            }
            for each in self
            if each.name in category_ids
        ]
