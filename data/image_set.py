"""The index of one split of a data set: its images, their objects, and the problems found while reading it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.instances import usable_instances
from data.problems import Problems, usable_boxes
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image on disk: boxes (M, 4) float32 xyxy in source pixels, labels (M,) int64, is_crowd (M,) bool.

    hw: the size that the boxes refer to.
    """

    path: str
    image_id: int
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """N images with M objects in total, packed in arrays: forked workers that touch a list copy all its pages.

    class_names, category_ids: by class index. paths (N,) bytes; ids (N,); hws (N, 2); boxes (M, 4); labels (M,);
    is_crowd (M,); image i has the objects starts[i] to starts[i + 1] - 1. coco_json: the annotation file, if it is in
    COCO's format. mirror_safe: whether labels are still right on a mirrored image; a COCO file can deny it with
    "mirror_safe": false in its `info`.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Problems
    paths: np.ndarray
    ids: np.ndarray
    hws: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    starts: np.ndarray
    coco_json: str | None = None
    mirror_safe: bool = True

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        objects = slice(self.starts[index], self.starts[index + 1])
        return Record(
            path=os.fsdecode(self.paths[index]),
            image_id=int(self.ids[index]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            is_crowd=self.is_crowd[objects],
            hw=(int(self.hws[index, 0]), int(self.hws[index, 1])),
        )

    @property
    def image_ids(self) -> tuple[int, ...]:
        return tuple(self.ids.tolist())

    def ground_truth(self) -> dict[str, Any]:
        """Return COCO's json as a dict: the data set's own file, if it has one; else made from the records.

        Annotations that COCOeval cannot use are left out (`annotation_fault`). A COCO file may list images that are not
        on this disk: score only the `image_ids` of this set.
        """
        if self.coco_json is not None:
            return usable_instances(Path(self.coco_json))
        categories = zip(self.category_ids, self.class_names, strict=True)
        return {
            "images": [self._coco_image(self[index]) for index in range(len(self))],
            "annotations": self._coco_annotations(),
            "categories": [{"id": category, "name": name} for category, name in categories],
        }

    def sample(self, images: int) -> ImageSet:
        """Draw up to `images` images without replacement, in the order drawn.

        Always the same ones; a smaller sample is the beginning of a larger one. coco_json stays that of the whole set.
        """
        drawn = np.random.default_rng(0).permutation(len(self))[:images]
        counts = np.diff(self.starts)[drawn]
        objects = np.concatenate([np.arange(*self.starts[at : at + 2]) for at in drawn]).astype(np.int64)
        return replace(
            self,
            paths=self.paths[drawn],
            ids=self.ids[drawn],
            hws=self.hws[drawn],
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            is_crowd=self.is_crowd[objects],
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        )

    def shares_images_with(self, other: ImageSet) -> int:
        """Return the number of image files that are in both sets."""
        return len(np.intersect1d(self.paths, other.paths))

    def _coco_image(self, record: Record) -> dict[str, Any]:
        return {
            "id": record.image_id,
            "file_name": os.path.basename(record.path),
            "height": record.hw[0],
            "width": record.hw[1],
        }

    def _coco_annotations(self) -> list[dict[str, Any]]:
        image_ids = np.repeat(self.ids, np.diff(self.starts))
        annotations = []
        for number, (image_id, box, label, is_crowd) in enumerate(
            zip(image_ids, self.boxes, self.labels, self.is_crowd, strict=True), start=1
        ):
            left, top, right, bottom = box.tolist()
            annotations.append(
                {
                    "id": number,
                    "image_id": int(image_id),
                    "category_id": self.category_ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(is_crowd),
                }
            )
        return annotations


def usable_record(
    *,
    path: str,
    image_id: int,
    boxes: np.ndarray,
    labels: np.ndarray,
    is_crowd: np.ndarray,
    hw: tuple[int, int],
    places: Sequence[str],
    problems: Problems,
) -> Record:
    """Make a Record of the objects whose boxes are usable (`usable_boxes`). places: M of them, for messages."""
    boxes, keep = usable_boxes(boxes, hw, places, problems)
    return Record(path=path, image_id=image_id, boxes=boxes[keep], labels=labels[keep], is_crowd=is_crowd[keep], hw=hw)


def pack(
    records: Sequence[Record],
    *,
    name: str,
    split: str,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    problems: Problems,
    source: str,
    classes_source: str | None = None,
    coco_json: str | None = None,
    mirror_safe: bool = True,
) -> ImageSet:
    """Pack Records into an ImageSet. Raises UserError if there are none, no class, or two classes of one name.

    source: the file that lists the images, for messages. classes_source: the file that names the classes, if another.
    """
    if not records:
        reasons = "; ".join(problems.summary()) or "it lists none"
        raise UserError(f"{source}: no usable image in split '{split}': {reasons}.")
    if not class_names:
        raise UserError(f"{source}: no annotation names a class, so there is nothing to learn.")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise UserError(f"{classes_source or source}: names the class '{repeated[0]}' more than once; rename one.")
    return ImageSet(
        name=name,
        split=split,
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        problems=problems,
        paths=np.array([os.fsencode(record.path) for record in records]),
        ids=np.array([record.image_id for record in records], np.int64),
        hws=np.array([record.hw for record in records], np.int32),
        boxes=np.concatenate([record.boxes for record in records]).astype(np.float32),
        labels=np.concatenate([record.labels for record in records]).astype(np.int64),
        is_crowd=np.concatenate([record.is_crowd for record in records]).astype(bool),
        starts=np.concatenate([[0], np.cumsum([len(record.labels) for record in records])]).astype(np.int64),
        coco_json=coco_json,
        mirror_safe=mirror_safe,
    )
