"""The table of benchmarks/domains.py, from rows made by hand, and the data set it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.domains import SPLITS, recoloured, table_of
from data.annotation_formats import open_image_set
from data.digits import make_digits
from utils.image_file import read_image


def row(scheme: str, seed: int, first: float, second: float, steps: int = 8) -> dict[str, Any]:
    aps = {f"{split}_AP_{number}": ap for split in ("val", "test") for number, ap in ((0, first), (1, second))}
    return {"data": "digits", "scheme": scheme, "seed": seed, "steps": steps, "test_AP": (first + second) / 2, **aps}


def test_a_line_has_the_means_over_seeds_and_the_gain_over_mixed_mini_batches() -> None:
    mixed, one = "mixed, shared, shared", "one, shared, shared"
    rows = [row(mixed, 0, 0.2, 0.4), row(mixed, 1, 0.4, 0.6), row(one, 0, 0.1, 0.3), row(one, 1, 0.3, 0.5)]
    head, _, first, second, *rest = table_of([*rows, row(mixed, 0, 0.5, 0.5, steps=9)]).splitlines()
    assert head.startswith("| digits, 8 steps: ")
    assert first == f"| {mixed} | consistent | 2 | 30.0, 50.0 | 30.0, 50.0 | 40.0 |  |"
    assert second == f"| {one} | inconsistent | 2 | 20.0, 40.0 | 20.0, 40.0 | 30.0 | -10.0 [-10.0, -10.0] |"
    assert rest[1].startswith("| digits, 9 steps: ") and rest[-1].split(" | ")[2] == "1"


def test_a_recoloured_copy_has_the_same_objects_in_other_colours(tmp_path: Path) -> None:
    source = make_digits(tmp_path / "digits", counts=dict.fromkeys(SPLITS, 2), hw=(32, 32))
    copy = recoloured(source, tmp_path / "copy")
    for split in SPLITS:
        before, after = open_image_set(source, split), open_image_set(copy, split)
        assert after.class_names == before.class_names and np.array_equal(after.labels, before.labels)
        assert np.allclose(after.boxes, before.boxes)
        old, new = (read_image(image_set[1].path) for image_set in (before, after))
        assert np.array_equal(new, old[..., [2, 0, 1]] // 2)
