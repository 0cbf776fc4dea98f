"""The index of one split of a data set: its images, their objects, and the problems found while reading it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.formats.instances import usable_instances
from data.problems import Problems, usable_boxes
from utils.errors import UserError
from utils.printable import printable

_LONGEST_NAME = 250  # of a class, in characters: tables are as wide as their longest name


class FoundObject(NamedTuple):
    """An object as readers find it. box: four numbers of pixels. place: where it is annotated, for messages."""

    box: Sequence[float]
    label: int
    is_crowd: bool
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image on disk: boxes (M, 4) float32 xyxy in source pixels, labels (M,) int64, is_crowd (M,) bool.

    hw: the size that the boxes refer to. places: as readers note them for `pack`, see `FoundObject`.
    """

    path: str
    image_id: int
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    hw: tuple[int, int]
    places: Sequence[str] = ()

    @classmethod
    def of_objects(cls, path: Path, image_id: int, hw: tuple[int, int], objects: Sequence[FoundObject]) -> Record:
        boxes, labels, is_crowd, places = zip(*objects, strict=True) if objects else ((), (), (), ())
        return cls(
            path=str(path),
            image_id=image_id,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels, np.int64),
            is_crowd=np.array(is_crowd, bool),
            hw=hw,
            places=places,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """N images with M objects in total, packed in arrays: forked workers that touch a list copy all its pages.

    class_names, category_ids: by class index. paths (N,) bytes; ids (N,); hws (N, 2); boxes (M, 4); labels (M,);
    is_crowd (M,); image i has the objects starts[i] to starts[i + 1] - 1. source: what lists the images, for messages.
    coco_json: the annotation file, if it is in COCO's format. mirror_safe: whether labels are still right on a mirrored
    image; a COCO file can deny it with "mirror_safe": false in its `info`. domains: (N,) which of several joined sets
    each image is from, see data/domains.py; None of a single one.
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
    source: str = ""
    coco_json: str | None = None
    mirror_safe: bool = True
    domains: np.ndarray | None = None

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

    @property
    def owners(self) -> np.ndarray:
        """(M,) index of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def require_objects(self, path: str) -> None:
        """Raise UserError if there is no object to learn or to measure. path: of the data set, as it was typed."""
        if self.is_crowd.all():
            crowds = f" but {len(self.is_crowd)} crowd regions" if len(self.is_crowd) else ""
            nothing = f"{path}: none of the {len(self)} images of '{self.split}' has an object{crowds}"
            raise UserError("; ".join((nothing, *self.problems.summary(), f"python -m data.doctor {path} has details")))

    def of_classes(self, names: Sequence[str]) -> ImageSet:
        """Return the set with these classes only, in its own order; images without their objects stay.

        Raises UserError for a class that it does not have.
        """
        wanted, listed = set(names), set(self.class_names)
        absent = [name for name in names if name not in listed]
        if absent:
            known = ", ".join(self.class_names[:20])
            raise UserError(f"{self.source}: has no class '{absent[0]}'; it has {known}.")
        labels = [label for label, name in enumerate(self.class_names) if name in wanted]
        keep = np.isin(self.labels, labels)
        return replace(
            self,
            class_names=tuple(self.class_names[label] for label in labels),
            category_ids=tuple(self.category_ids[label] for label in labels),
            boxes=self.boxes[keep],
            labels=np.searchsorted(labels, self.labels[keep]).astype(np.int64),
            is_crowd=self.is_crowd[keep],
            starts=np.concatenate([[0], np.cumsum(keep)])[self.starts],
        )

    def ground_truth(self) -> dict[str, Any]:
        """Return COCO's json as a dict: the data set's own file, if it has one; else made from the records.

        Annotations that COCOeval cannot use are left out (`annotation_fault`). A COCO file may list images that are not
        on this disk: score only the `image_ids` of this set.
        """
        if self.coco_json is not None:
            return usable_instances(Path(self.coco_json), self.category_ids)
        return as_instances(map(self.__getitem__, range(len(self))), self.class_names, self.category_ids)

    def sample(self, images: int) -> ImageSet:
        """Draw up to `images` images without replacement, in the order drawn.

        Always the same ones; a smaller sample is the beginning of a larger one. coco_json stays that of the whole set.
        """
        return self.subset(np.random.default_rng(0).permutation(len(self))[:images])

    def subset(self, images: Sequence[int] | np.ndarray) -> ImageSet:
        """Return the images of these indices, in this order; coco_json stays that of the whole set."""
        drawn = np.asarray(images, np.int64)
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
            domains=None if self.domains is None else self.domains[drawn],
        )


def as_instances(
    records: Iterable[Record], class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return Records as COCO's json."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        name, (height, width) = os.path.basename(record.path), record.hw
        images.append({"id": record.image_id, "file_name": name, "height": height, "width": width})
        objects = zip(record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), strict=True)
        for (left, top, right, bottom), label, is_crowd in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": category_ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(is_crowd),
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


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
    """Pack Records into an ImageSet, with those of their objects whose boxes are usable (`usable_boxes`).

    Raises UserError if there are no Records, no class, two classes of one name, or one of a very long name.

    source: the file that lists the images, for messages. classes_source: the file that names the classes, if another.
    """
    if not records:
        reasons = "; ".join(problems.summary()) or "it lists none"
        raise UserError(f"{source}: no usable image in split '{split}': {reasons}.")
    if not class_names:
        raise UserError(f"{source}: no annotation names a class, so there is nothing to learn.")
    longest = max(class_names, key=len)
    if len(longest) > _LONGEST_NAME:
        named = f"names a class of {len(longest):,} characters, '{longest[:40]}...'"
        raise UserError(f"{classes_source or source}: {named}: give it a name of at most {_LONGEST_NAME}.")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise UserError(f"{classes_source or source}: names the class '{repeated[0]}' more than once; rename one.")
    counts = [len(record.labels) for record in records]
    hws = np.array([record.hw for record in records], np.int32)
    boxes = np.concatenate([record.boxes for record in records]).astype(np.float32)
    places = [place for record in records for place in record.places]
    boxes, keep = usable_boxes(boxes, np.repeat(hws, counts, axis=0), places, problems)
    return ImageSet(
        name=printable(name),
        split=printable(split),
        class_names=tuple(map(printable, class_names)),
        category_ids=tuple(category_ids),
        problems=problems,
        paths=np.array([os.fsencode(record.path) for record in records]),
        ids=np.array([record.image_id for record in records], np.int64),
        hws=hws,
        boxes=boxes[keep],
        labels=np.concatenate([record.labels for record in records]).astype(np.int64)[keep],
        is_crowd=np.concatenate([record.is_crowd for record in records]).astype(bool)[keep],
        starts=np.concatenate([[0], np.cumsum(keep)])[np.cumsum([0, *counts])],
        source=source,
        coco_json=coco_json,
        mirror_safe=mirror_safe,
    )
