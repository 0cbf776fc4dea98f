"""Images with their objects and detections, which report.js draws over thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import cv2

from evaluation.error_types import CORRECT, ERROR_TYPES
from evaluation.report.facts import ImageFacts, Measured
from evaluation.report.markup import Markup, element, joined
from utils.image_file import read_image

_THUMBNAIL_PX, _JPEG_QUALITY = 480, 75
_LOWEST_CONFIDENCE = 0.05  # of detections that the slider can show, unless a threshold is lower
_TAIL = 12  # characters of an image's name that are never cut
_SHOWN = 100  # detections of an image


def worst(measured: Measured, count: int) -> list[int]:
    """Return indices of the images with the lowest F1 at the thresholds, of equal ones those with more errors.

    Of few images at most half, so that others are left for `best`.
    """
    images = measured.images
    count = min(count, -(-len(images) // 2))
    order = sorted(range(len(images)), key=lambda at: (images[at].f1, -images[at].missed - images[at].wrong))
    return [at for at in order if images[at].f1 < 1][:count]


def best(measured: Measured, count: int, *, without: Sequence[int] = ()) -> list[int]:
    """Return indices of the images with objects that have the highest F1, of equal ones those with more objects.

    without: indices that are not returned.
    """
    images = measured.images
    order = sorted(range(len(images)), key=lambda at: (-images[at].f1, -images[at].found))
    return [at for at in order if images[at].found and at not in without][:count]


class Gallery:
    """Cards of images, each in the page once, and the data that report.js draws into them."""

    def __init__(self, runs: Sequence[tuple[str, Measured]]) -> None:
        """runs: name and evaluation, all of the same images."""
        self.runs = runs
        self.classes = {row.category_id: number for number, row in enumerate(runs[0][1].classes)}
        self.data: list[dict[str, Any]] = []
        self.unreadable = 0

    def cards(self, at: Sequence[int]) -> Markup:
        """Return figures of the images with these indices."""
        return element("div", joined(self._card(index) for index in at), class_="cards")

    def script(self) -> dict[str, Any]:
        """Return what report.js needs, with thresholds of the first run."""
        first = self.runs[0][1]
        own = [first.thresholds.of_class(row.name) for row in first.classes] if first.thresholds.classes else None
        return {
            "classes": [row.name for row in first.classes],
            "curves": [row.name for row in first.classes if row.objects],
            "types": ERROR_TYPES,
            "threshold": first.thresholds.confidence,
            "own": own,
            "images": self.data,
        }

    def _card(self, index: int) -> Markup:
        image = self.runs[0][1].images[index]
        content, (height, width) = self._picture(image)
        objects = self._objects(image)
        found = [self._detections(measured, measured.images[index]) for _, measured in self.runs]
        self.data.append({"hw": [height, width], "objects": objects, "found": found})
        head, tail = image.name[:-_TAIL], image.name[-_TAIL:]  # report.css cuts a long name in its middle
        name = element("b", element("span", head), element("span", tail), title=image.path or image.name)
        caption = element("figcaption", name, " ", element("span", class_="counts"))
        frame = element("div", content, class_="frame", style=f"--ratio:{width / height:.4f}")
        return element("figure", frame, caption, class_="card", data_image=len(self.data) - 1, tabindex=0)

    def _picture(self, image: ImageFacts) -> tuple[Markup, tuple[int, int]]:
        """Return the thumbnail, or why there is none, and the size that boxes refer to."""
        pixels = read_image(image.path, source_hw=image.hw, enough_px=_THUMBNAIL_PX)
        if pixels is None:
            self.unreadable += 1
            gone = element("p", "The image cannot be read any more at ", element("code", image.path), class_="gone")
            return gone, image.hw or (3, 4)
        hw = image.hw or pixels.shape[:2]
        zoom = min(1.0, _THUMBNAIL_PX / max(pixels.shape[:2]))
        small = cv2.resize(pixels, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA) if zoom < 1 else pixels
        done, jpeg = cv2.imencode(
            ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        )
        assert done, "any uint8 image can be encoded"
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"
        return element("img", src=source, alt=image.name), (int(hw[0]), int(hw[1]))

    def _objects(self, image: ImageFacts) -> list[list[float]]:
        """Return x, y, width, height, class, whether it is a crowd."""
        rows = [self.runs[0][1].truth["annotations"][at] for at in image.objects]
        return [[*row["bbox"], self.classes.get(row["category_id"], -1), int(row["iscrowd"])] for row in rows]

    def _detections(self, measured: Measured, image: ImageFacts) -> list[list[float]]:
        """Return x, y, width, height, class, confidence, the object that it finds and its type of error, or -1."""
        results, errors = measured.results, measured.errors
        lowest = min([_LOWEST_CONFIDENCE, measured.thresholds.confidence])
        place = {int(number): at for at, number in enumerate(image.objects)}
        here = [at for at in image.detections if results.scores[at] >= lowest and errors.types[at] >= CORRECT]
        here = sorted(here, key=lambda at: -results.scores[at])[:_SHOWN]
        return [
            [
                *(round(side, 1) for side in results.bboxes[at].tolist()),
                self.classes.get(int(results.category_ids[at]), -1),
                round(float(results.scores[at]), 3),
                place.get(int(errors.found[at]), -1),
                -2 if errors.is_ignored[at] else int(errors.types[at]),
            ]
            for at in here
        ]
