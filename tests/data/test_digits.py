import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import digits
from data.annotation_formats import open_image_set
from data.digits import digit_pools, make_digits
from data.digits_scene import draw_scene
from utils.errors import UserError

COUNTS = {"train": 6, "val": 2, "test": 2}


def fingerprints(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "digits.json")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_pools_are_disjoint_and_cover_every_digit() -> None:
    pools = digit_pools()
    for one, other in itertools.combinations(pools.values(), 2):
        assert not set(one) & set(other)
    assert sorted(np.concatenate(list(pools.values()))) == list(range(1797))
    np.testing.assert_allclose([len(pool) / 1797 for pool in pools.values()], [0.6, 0.2, 0.2], atol=0.01)


def test_scenes_draw_from_their_own_pool_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(rng, inks, labels, **knobs):  # type: ignore[no-untyped-def]
        given.append({ink.tobytes() for ink in inks})
        return draw_scene(rng, inks, labels, **knobs)

    monkeypatch.setattr(digits, "draw_scene", spy)
    make_digits(tmp_path / "digits", counts={"train": 1, "val": 1, "test": 1})
    assert len(given) == 3
    for one, other in itertools.combinations(given, 2):
        assert not one & other


def test_same_seed_same_files_other_seed_other_files(tmp_path: Path) -> None:
    one = fingerprints(make_digits(tmp_path / "one", counts=COUNTS, seed=5))
    assert len(one) == 10 + 3
    assert fingerprints(make_digits(tmp_path / "two", counts=COUNTS, seed=5)) == one
    other = fingerprints(make_digits(tmp_path / "three", counts=COUNTS, seed=6))
    assert not set(one.values()) & set(other.values())


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = fingerprints(make_digits(tmp_path / "few", counts=COUNTS))
    more = fingerprints(make_digits(tmp_path / "more", counts={**COUNTS, "train": 9}))
    assert few["train/000005.png"] == more["train/000005.png"]


def test_regenerated_only_when_the_parameters_differ(tmp_path: Path) -> None:
    root = make_digits(tmp_path / "digits", counts=COUNTS)
    before = (root / "digits.json").stat().st_mtime_ns
    assert make_digits(root, counts=COUNTS) == root
    assert (root / "digits.json").stat().st_mtime_ns == before
    make_digits(root, counts={**COUNTS, "train": 3})
    assert len(open_image_set(root, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fingerprints(make_digits(tmp_path / "digits", counts=COUNTS))

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "draw_scene", fail)
    for name in ("digits", "new"):
        with pytest.raises(KeyboardInterrupt):
            make_digits(tmp_path / name, counts={**COUNTS, "train": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert fingerprints(tmp_path / "digits") == old


def test_a_folder_that_takes_no_files_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"digits: the digits cannot be written there \(.+\)\.$"):
        make_digits(tmp_path / "file" / "digits", counts=COUNTS)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_is_full_for_images_is_a_sentence_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """A file may have 2 kB here: the first image is cut."""
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1)); from data.digits import make_digits;"
    )
    made = f"make_digits({str(tmp_path / 'digits')!r}, counts={COUNTS})"
    done = subprocess.run([sys.executable, "-c", limited + made], cwd=root, capture_output=True, text=True)
    assert done.stderr.endswith(
        f"UserError: {tmp_path / 'digits'}: the digits cannot be written there (File too large).\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="has other files"):
        make_digits(tmp_path, counts=COUNTS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("hw", [(128, 128), (96, 160), (64, 64)])
def test_boxes_lie_inside_and_are_tight(tmp_path: Path, hw: tuple[int, int]) -> None:
    image_set = open_image_set(make_digits(tmp_path / "digits", counts={"train": 30}, hw=hw), "train")
    assert image_set.class_names == tuple("0123456789")
    assert image_set.problems.summary() == []
    for i in range(len(image_set)):
        boxes = image_set[i].boxes
        assert image_set[i].hw == hw
        assert 1 <= len(boxes) <= 8
        assert (boxes >= 0).all()
        assert (boxes <= (hw[1], hw[0]) * 2).all()
        assert (boxes == boxes.round()).all()


def test_shift_sets_how_much_scenes_differ() -> None:
    inks, labels = np.zeros((1, 8, 8), np.float32), np.zeros(1, np.int64)
    inks[:, 1:7, 2:6] = 1

    def spread(shift: float) -> tuple[float, float, float]:
        scenes = [draw_scene(np.random.default_rng(i), inks, labels, hw=(96, 96), shift=shift) for i in range(60)]
        levels = [scene.image.mean() for scene in scenes]
        contrasts = [scene.image.std() for scene in scenes]
        sides = [np.log(scene.boxes[:, 3] - scene.boxes[:, 1]).mean() for scene in scenes]
        return float(np.std(levels)), float(np.std(np.log(contrasts))), float(np.std(sides))

    for shifted, steady in zip(spread(1.0), spread(0.0), strict=True):
        assert shifted > 1.3 * steady
