"""Objects keep their numbers through a video."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from models.tracking import FAINT, Tracker
from utils.errors import UserError
from utils.structures import Detections

FPS = 10.0


@pytest.fixture(scope="module")
def libraries() -> None:
    pytest.importorskip("trackers", reason="pip install --no-deps trackers, and the extra [track]")
    pytest.importorskip("supervision", reason="the extra [track] is not installed")


def found(*objects: tuple[float, float, int]) -> Detections:
    """Objects of 40 px: left edge, score, label."""
    boxes = torch.tensor([[left, 50, left + 40, 90] for left, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
    scores, labels = (torch.tensor([each[k] for each in objects]) for k in (1, 2))
    return Detections(boxes=boxes, scores=scores.float(), labels=labels.long())


def follow(frames: list[Detections], confidence: float = 0.5) -> list[tuple[Detections, list[int | None]]]:
    tracker = Tracker(confidences=[confidence] * 100, fps=FPS)
    return [tracker.follow(each, number / FPS) for number, each in enumerate(frames)]


pytestmark = pytest.mark.usefixtures("libraries")


def test_objects_that_pass_each_other_keep_their_numbers():
    """Objects of two classes, one in front of the other, in whatever order they are detected."""
    frames = [found((10 * k, 0.9, 0), (300 - 10 * k, 0.8, 1)) for k in range(31)]
    frames = [each.where(torch.tensor([1, 0])) if k % 2 else each for k, each in enumerate(frames)]
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for number, (kept, tracks) in enumerate(follow(frames)):
        assert len(kept) == len(tracks) == 2
        assert kept.labels.tolist() == frames[number].labels.tolist()
        assert (None in tracks) == (number == 0)
        for label, track in zip(kept.labels.tolist(), tracks, strict=True):
            seen[label] |= {track} - {None}
    assert sorted(map(len, seen.values())) == [1, 1] and seen[0] | seen[1] == {1, 2}


def test_a_faint_object_is_kept_if_it_continues_a_track():
    frames = [found((10 * k, 0.2 if k in (4, 5) else 0.9, 0), (400, 0.2, 0)) for k in range(10)]
    for number, (kept, tracks) in enumerate(follow(frames)):
        assert kept.boxes[:, 0].tolist() == [10 * number]
        assert tracks == [None if number == 0 else 1]


def test_a_track_survives_a_gap_shorter_than_a_second_only():
    here, nothing = found((100, 0.9, 0)), found()
    short = follow([here] * 5 + [nothing] * 6 + [here] * 3)
    assert [tracks for _, tracks in short][-1] == [1]
    long = follow([here] * 5 + [nothing] * 15 + [here] * 3)
    assert [tracks for _, tracks in long][-3:] == [[None], [2], [2]]
    assert [len(kept) for kept, _ in long[5:20]] == [0] * 15


def test_a_video_without_objects_has_no_tracks():
    assert [(len(kept), tracks) for kept, tracks in follow([found()] * 3)] == [(0, [])] * 3


def test_nothing_is_invented_and_nothing_sure_is_lost():
    """All detections above the confidence are returned as they were, once, with numbers of their own."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(30):
        objects = [
            (float(x), float(s), int(c))
            for x, s, c in zip(*rng.random((2, 12)) * [[300], [1]], rng.integers(3, size=12), strict=True)
        ]
        each = found(*objects)
        frames.append(each.where(each.scores > FAINT).where(each.scores[each.scores > FAINT].argsort(descending=True)))
    for before, (kept, tracks) in zip(frames, follow(frames), strict=True):
        rows = [tuple(row) for row in before.boxes.tolist()]
        where = [rows.index(tuple(row)) for row in kept.boxes.tolist()]
        assert where == sorted(set(where))
        assert set(np.flatnonzero(before.scores >= 0.5)) <= set(where)
        torch.testing.assert_close(before.labels[where], kept.labels)
        known = [track for track in tracks if track is not None]
        assert len(known) == len(set(known))
        assert all(score >= 0.5 or track for score, track in zip(kept.scores.tolist(), tracks, strict=True))


def test_an_absent_library_is_the_users_error(monkeypatch):
    def absent(name: str):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"--track needs .*No module named .*pip install --no-deps trackers"):
        Tracker(confidences=[0.5], fps=FPS)
