"""The data set to start with: scenes of real handwritten digits on textured grounds, made on first use.

The digits are scikit-learn's (UCI "Optical Recognition of Handwritten Digits": 1,797 images of 8x8 in 17
grey levels), dealt to train, val and test by class, so that no scene shows a digit of another split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from sklearn.datasets import load_digits

from data.digits_scene import draw_scene
from utils.errors import UserError, exit_on_error

SPLITS = ("train", "val", "test")
DEFAULT_COUNTS = {"train": 2048, "val": 400, "test": 400}
_SHARES = (0.6, 0.2, 0.2)
_MANIFEST = "digits.json"
_VERSION = 2  # raise it when the same parameters would give other images


def ensure_digits(root: str | Path) -> Path:
    """The data set with its default parameters at `root`, made unless it is there."""
    return make_digits(root)


def make_digits(
    root: str | Path,
    *,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    seed: int = 0,
    hw: tuple[int, int] = (128, 128),
    shift: float = 1.0,
) -> Path:
    """Write a COCO data set to `root` unless the same one is there; any other in its place is replaced.

    counts: scenes per split; scene i of a split depends on (seed, split, i), not on how many there are.
    shift: 0..1, how much brightness, contrast and scale differ from scene to scene. A folder at `root` that
    was not written by this function is left alone: UserError.
    """
    root = Path(root)
    manifest = {"version": _VERSION, "counts": dict(counts), "seed": seed, "hw": list(hw), "shift": shift}
    written = root / _MANIFEST
    if written.is_file() and json.loads(written.read_text()) == manifest:
        return root
    if root.exists() and not written.is_file() and any(root.iterdir()):
        raise UserError(f"{root}: holds something else, and the digits are not written over it; name another folder.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and then renamed, so that an interrupted run leaves nothing that looks whole.
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
            fresh = Path(scratch) / "fresh"
            pools = digit_pools()
            for split, count in counts.items():
                _write_split(fresh, split, count, pools[split], seed=seed, hw=hw, shift=shift)
            (fresh / _MANIFEST).write_text(json.dumps(manifest))
            if root.exists():
                root.rename(Path(scratch) / "old")
            fresh.rename(root)
    except OSError as error:
        raise UserError(f"{root}: the digits cannot be written there ({error.strerror}).") from error
    return root


def digit_pools() -> dict[str, np.ndarray]:
    """Split -> indices into scikit-learn's 1,797 digits: disjoint, 60/20/20 within each class."""
    labels = load_digits().target
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        members = np.random.default_rng([0, digit]).permutation(np.flatnonzero(labels == digit))
        cuts = np.round(np.cumsum(_SHARES[:-1]) * len(members)).astype(int)
        for split, part in zip(SPLITS, np.split(members, cuts), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(members)) for split, members in parts.items()}


def _write_split(
    root: Path, split: str, count: int, pool: np.ndarray, *, seed: int, hw: tuple[int, int], shift: float
) -> None:
    digits = load_digits()
    inks, labels = digits.images[pool].astype(np.float32) / 16, digits.target[pool]
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        scene = draw_scene(rng, inks, labels, hw=hw, shift=shift)
        file_name = f"{i:06d}.png"
        cv2.imwrite(str(root / split / file_name), scene.image[..., ::-1])
        images.append({"id": i + 1, "file_name": file_name, "height": hw[0], "width": hw[1]})
        for (left, top, right, bottom), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    info = {"description": "scenes of handwritten digits", "mirror_safe": False}  # a mirrored 2 is none
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the digits data set.")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    for split, count in DEFAULT_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="number of scenes (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a scene in px (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shift", type=float, default=1.0, help="0..1, how much scenes differ (default 1)")
    given = parser.parse_args()
    counts = {split: getattr(given, split) for split in SPLITS}
    print(make_digits(given.out, counts=counts, seed=given.seed, hw=(given.size, given.size), shift=given.shift))


if __name__ == "__main__":
    exit_on_error(_main)
