"""The built-in data set: scenes of real handwritten digits on textured backgrounds, made on first use.

The digits are scikit-learn's (UCI "Optical Recognition of Handwritten Digits": 1,797 images of 8x8 in 17
grey levels), split into train, val and test by class, so that no scene shows a digit of another split.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from data.digits_scene import draw_scene
from data.image_set import Record, as_instances
from utils.draw import write_png
from utils.errors import UserError
from utils.flags import parse_flags, resolve
from utils.knob import knob
from utils.page import run_page

SPLITS = ("train", "val", "test")
DEFAULT_COUNTS = {"train": 2048, "val": 400, "test": 400}
_SHARES = (0.6, 0.2, 0.2)
_MANIFEST = "digits.json"
_VERSION = 2  # raise it if the same parameters give other images


def make_digits(
    root: str | Path,
    *,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    seed: int = 0,
    hw: tuple[int, int] = (128, 128),
    shift: float = 1.0,
) -> Path:
    """Write a COCO data set to `root` unless it exists; one with other parameters is replaced. Returns `root`.

    counts: scenes per split; scene i of a split depends on (seed, split, i), not on the count. shift: 0..1, how much
    brightness, contrast and scale differ from scene to scene. Raises UserError if `root` has files that this function
    did not write.
    """
    root = Path(root)
    manifest = {"version": _VERSION, "counts": dict(counts), "seed": seed, "hw": list(hw), "shift": shift}
    written = root / _MANIFEST
    if written.is_file() and json.loads(written.read_text()) == manifest:
        return root
    if root.exists() and not written.is_file() and any(root.iterdir()):
        raise UserError(f"{root}: has other files, which the digits would overwrite; name another folder.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Written to another folder and renamed, so that an interrupted run leaves nothing that looks complete.
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
    """Return split -> indices into scikit-learn's 1,797 digits: disjoint, 60/20/20 within each class."""
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
    records = []
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        scene = draw_scene(rng, inks, labels, hw=hw, shift=shift)
        path, is_crowd = str(root / split / f"{i:06d}.png"), np.zeros(len(scene.labels), bool)
        write_png(Path(path), scene.image)
        records.append(
            Record(path=path, image_id=i + 1, boxes=scene.boxes, labels=scene.labels, is_crowd=is_crowd, hw=hw)
        )
    info = {"description": "scenes of handwritten digits", "mirror_safe": False}  # a mirrored 2 is not a 2
    content = {"info": info, **as_instances(records, [str(digit) for digit in range(10)], range(1, 11))}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsOptions:
    """python -m data.digits

    Write the digits data set with other parameters than those of the built-in one.
    """

    out: str = knob(MISSING, "folder to write", unit="FOLDER")
    train: int = knob(DEFAULT_COUNTS["train"], "scenes of the train split", unit="N", low=0)
    val: int = knob(DEFAULT_COUNTS["val"], "scenes of the val split", unit="N", low=0)
    test: int = knob(DEFAULT_COUNTS["test"], "scenes of the test split", unit="N", low=0)
    size: int = knob(128, "side of a scene", unit="PX", low=1)
    seed: int = knob(0, "seed of the scenes", low=0)
    shift: float = knob(1.0, "how much scenes differ in brightness, contrast and scale", low=0, high=1)


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(DigitsOptions, parse_flags(DigitsOptions, argv))
    counts = {split: getattr(options, split) for split in SPLITS}
    hw = (options.size, options.size)
    print(make_digits(options.out, counts=counts, seed=options.seed, hw=hw, shift=options.shift))


if __name__ == "__main__":
    run_page(main)
