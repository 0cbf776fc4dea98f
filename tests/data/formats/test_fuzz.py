"""Mutated annotation files: a set or one sentence, whatever a file holds."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.annotation_formats import open_image_set, splits_of
from data.dataset import EvalDataset, EvalKey, ShrunkImages
from data.doctor.checkup import quick_checkup
from data.image_set import ImageSet
from evaluation.coco_map import evaluate_coco
from evaluation.coco_results import CocoResults
from tests.data.packagings import PACKAGINGS, UNDIVIDED
from utils.errors import UserError


def in_all_formats(root: Path) -> Path:
    """Images whose content is of other formats than their ending."""
    path = PACKAGINGS["darknet"](root)
    for file, suffix in zip(sorted(root.rglob("*.png")), (".jpg", ".bmp", ".gif", ".tiff", ".webp"), strict=True):
        file.write_bytes(cv2.imencode(suffix, cv2.imread(str(file)))[1].tobytes())
    return path


# name -> packaging, and the pattern of the annotation files
TARGETS = {
    "COCO": (PACKAGINGS["COCO"], "*.json"),
    "COCO of Roboflow": (PACKAGINGS["COCO of Roboflow"], "*.json"),
    "VOC": (PACKAGINGS["VOC"], "*.xml"),
    "VOC's lists": (PACKAGINGS["VOC"], "Main/*.txt"),
    "LabelImg": (UNDIVIDED["LabelImg's xml"], "*.xml"),
    "darknet": (PACKAGINGS["darknet"], "obj_*/*.txt"),
    "darknet's lists": (PACKAGINGS["darknet"], "*.txt"),
    "darknet's .data": (PACKAGINGS["darknet"], "obj.*"),
    "csv": (PACKAGINGS["csv of Roboflow"], "*.csv"),
    "yaml": (PACKAGINGS["yaml"], "data.yaml"),
    "yaml with polygons": (PACKAGINGS["yaml with polygons"], "*.txt"),
    "images": (in_all_formats, "*.png"),
}
TOKENS = [
    *(b"nan", b"-inf", b"1e309", b"-1", b"0", b"9" * 40, b"9" * 5000, b"null", b"true", b'"', b"'", b"\\", b"\\ud800"),
    *(b"[", b"]", b"{", b"}", b"[" * 3000, b"<", b">", b"<object>", b"</annotation>", b"<!ENTITY a 'a'>", b"&a;"),
    *(b"*a", b"&a ", b"!!python/object:os.system", b"---", b": ", b"- ", b"#", b"=", b",", b"\t", b"\r", b"\n"),
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\x1b[2J", b"../" * 30, b"/dev/zero", b"/", b".", b"~", b" 7 7 7"),
]


ODD_VALUES = [
    *(None, True, -1, 0, 0.5, 1e308, math.nan, -math.inf, 10**30, 10**400, "", "1", "x" * 300, "\ud800", "\x1b[2J"),
    *([], [1], [[]], {}, {"id": 1}, [math.nan] * 4, [10**400] * 4, "../" * 30, "/dev/zero", "a\0b"),
]


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """Well-formed json with odd values, which no mutation of bytes finds."""
    whole = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        parent: Any = whole
        while True:
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            child = parent[key]
            if not isinstance(child, list | dict) or not child or rng.random() < 0.1:
                break
            parent = child
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = rng.choice([*ODD_VALUES, rng.randint(-3, 300)])
        if not whole:
            break
    return json.dumps(whole).encode()


def mutated(content: bytes, rng: random.Random) -> bytes:
    if content[:1] == b"{" and rng.random() < 0.5:
        return mutated_json(content, rng)
    for _ in range(rng.randint(1, 4)):
        first, last = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
        part = content[first : min(last, first + 60)]
        put = rng.choice([b"", b"", part * 2, rng.choice(TOKENS), rng.choice(TOKENS), bytes([rng.randint(0, 255)])])
        content = content[:first] + put + content[first + rng.choice([0, 1, len(part)]) :]
    return content[: rng.randint(0, len(content))] if rng.random() < 0.1 else content


def read(path: Path) -> ImageSet | None:
    """Read a split with all that a training or an evaluation asks of it; None for a sentence."""
    try:
        split = next(iter(splits_of(path)), "train")
        image_set = open_image_set(path, split)
        truth = image_set.ground_truth()
        quick_checkup([image_set])
        image_set.require_objects(str(path))
        dataset = EvalDataset(image_set, letterbox=True)
        evaluated = [dataset[EvalKey(index, (32, 32))] for index in range(len(image_set))]
        ShrunkImages(image_set, longest_px=32)(0)
        found = CocoResults(
            image_ids=np.array([sample.image_id for sample in evaluated]),
            category_ids=np.full(len(evaluated), image_set.category_ids[0]),
            bboxes=np.full((len(evaluated), 4), 8.0),
            scores=np.full(len(evaluated), 0.5),
        )
        evaluate_coco(truth, found, image_ids=image_set.image_ids)
    except UserError as error:
        assert str(error)
        return None
    return image_set


def check_mutations(root: Path, name: str, seed: int, count: int) -> int:
    """Mutate one annotation file after the other. Returns how often a set was read."""
    packaging, pattern = TARGETS[name]
    path = packaging(root / str(seed))
    files = sorted((root / str(seed)).rglob(pattern))
    rng, was_read = random.Random(seed), 0
    for _ in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(mutated(content, rng))
        was_read += read(path) is not None
        file.write_bytes(content)
    return was_read


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    assert check_mutations(tmp_path, name, seed, 10) >= 0
    assert read(tmp_path / str(seed)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_more_mutated_files(tmp_path: Path, name: str) -> None:
    assert check_mutations(tmp_path, name, 7, 250) > 0
