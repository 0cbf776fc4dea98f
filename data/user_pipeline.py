"""A user's own albumentations pipeline, from a file, with boxes kept right."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.albumentations_import import albumentations as A
from utils.errors import UserError
from utils.structures import Sample

_FORMATS = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}
_GIVEN = {"image", "bboxes"}  # what a transform may ask for


def read_pipeline(path: str) -> str:
    """Return the pipeline in a file that `albumentations.save` wrote, as json text, with all defaults written out.

    Albumentations makes transforms of its own from names and plain values; no code comes from the file. Raises
    UserError if there is no pipeline, or one that moves boxes in a way that cannot be followed.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: write the pipeline to a .json or .yaml file, with albumentations.save")
    if file.exists() and not file.is_file():  # a FIFO, for one, which could be read for ever
        raise UserError(f"{path}: is no regular file")
    text = io.StringIO()
    try:
        pipeline = A.load(file, _FORMATS[file.suffix.lower()], nonserializable={})  # no functions
        faults = [f"{type(each).__name__} {fault}" for each in _leaves(pipeline) if (fault := _fault(each))]
        if not faults:
            A.save(pipeline, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever the file's content triggers in json, yaml and the transforms
        raise UserError(f"{path}: no pipeline that albumentations {A.__version__} loads: {_reason(error)}") from error
    if faults:
        raise UserError(f"{path}: {faults[0]}")
    return text.getvalue()


def transform_names(text: str) -> str:
    """Return the names of the transforms in a pipeline's text, in its order: "Rotate, GaussNoise"."""
    return ", ".join(type(transform).__name__ for transform in _leaves(_loaded(text)))


class UserPipeline:
    """Sample, generator -> Sample; the image's size may change, and objects drop out as by our own cuts."""

    def __init__(self, text: str, min_visibility: float) -> None:
        self.min_visibility = min_visibility
        boxes = A.BboxParams("pascal_voc", clip=True, filter_invalid_bboxes=True)
        # Without a transform that moves boxes, Compose warns.
        self._pipeline = A.Compose([_loaded(text), A.NoOp()], bbox_params=boxes)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Raises UserError if a transform fails, or returns something other than an 8-bit RGB image."""
        self._pipeline.set_random_state(rng, random.Random(int(rng.integers(2**31))))
        # Of a crowd region any remainder counts; albumentations has one limit for all boxes of an image.
        limits = self._pipeline.processors["bboxes"].params
        limits.min_visibility = 0.0 if sample.is_crowd.any() else self.min_visibility
        numbered = np.column_stack([sample.boxes, np.arange(len(sample.boxes), dtype=np.float32)])
        try:
            result = self._pipeline(image=sample.image.copy(), bboxes=numbered)
        except Exception as error:  # a transform's own, such as a crop larger than the image
            raise UserError(f"--albumentations fails on {sample.path}: {_reason(error)}") from error
        image = result["image"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            kind = f"{tuple(image.shape)} {image.dtype}"
            raise UserError(f"--albumentations must return 8-bit RGB images, not {kind}: leave normalization to us")
        numbered = np.asarray(result["bboxes"], np.float32).reshape(-1, 5)  # (0, 4) without objects
        kept = sample.where(numbered[:, 4].astype(np.int64))
        return replace(kept, image=np.ascontiguousarray(image), boxes=numbered[:, :4])


def _loaded(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `read_pipeline` has shown them
        return A.load(io.StringIO(text))


def _leaves(pipeline: Any) -> Iterator[Any]:
    """Yield the transforms in nested compositions, in order. TypeError for what is not a transform."""
    if isinstance(pipeline, A.BaseCompose):
        for transform in pipeline.transforms:
            yield from _leaves(transform)
    elif isinstance(pipeline, A.BasicTransform):
        yield pipeline
    else:
        raise TypeError(f"{type(pipeline).__name__} is not a transform")


def _fault(transform: Any) -> str:
    """Return why a transform is refused, "" if it is not."""
    if missing := set(transform.targets_as_params) - _GIVEN:
        return f"needs {', '.join(sorted(missing))}, which is not there: only images and boxes are"
    if isinstance(transform, A.RandomGridShuffle):
        return "tears objects apart"
    moves_boxes = getattr(type(transform), "apply_to_bboxes", None) not in (None, A.DualTransform.apply_to_bboxes)
    if not moves_boxes and not isinstance(transform, A.ImageOnlyTransform):
        return "does not say where boxes go"
    return ""


def _reason(error: Exception) -> str:
    """Return the text of an error of albumentations in one line."""
    if "NoneType" in str(error):
        return "the file is empty"
    if isinstance(error, KeyError):
        return f"{error} is unknown or missing"
    return " ".join(str(error).split())[:300] or type(error).__name__
