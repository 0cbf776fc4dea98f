"""The best threshold against all of them, tried one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.best_thresholds import FEW_OBJECTS, best_thresholds
from evaluation.matches import ClassMatches, Matches

detections = st.lists(
    st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), max_size=12
)  # score in tenths, is a hit, is ignored


def of_class(name: str, rows: list[tuple[int, bool, bool]], missed: int = 0) -> ClassMatches:
    """One image each, IoU 0.5 and one more threshold, at which nothing is a hit."""
    rows = sorted(rows, key=lambda row: -row[0])
    ignored = np.array([row[2] for row in rows], bool)
    hits = np.array([row[1] for row in rows], bool) & ~ignored
    return ClassMatches(
        name=name,
        images=np.zeros(len(rows), np.int64),
        scores=np.array([row[0] / 10 for row in rows]),
        is_hit=np.stack([hits, np.zeros_like(hits)]),
        is_ignored=np.stack([ignored, ignored]),
        objects=np.array([hits.sum() + missed]),
    )


def best_by_trying(parts: list[ClassMatches]) -> tuple[float, float]:
    """The best F1, and the lowest score that the highest threshold with it keeps."""
    rows = [
        (score, hit)
        for part in parts
        for score, hit, ignored in zip(part.scores, part.is_hit[0], part.is_ignored[0], strict=True)
        if not ignored
    ]
    objects = sum(int(part.objects.sum()) for part in parts)
    best = (0.0, 0.0)
    for lowest in sorted({score for score, _ in rows}):
        kept = [hit for score, hit in rows if score >= lowest]
        precision, recall = sum(kept) / len(kept), sum(kept) / objects if objects else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        if f1 >= best[0] - 1e-12:
            best = (f1, lowest)
    return best


@settings(max_examples=150, deadline=None)
@given(detections, detections, st.integers(0, 15), st.integers(0, 3))
def test_no_other_threshold_has_a_better_f1(one: list, other: list, missed: int, missed_others: int) -> None:  # type: ignore[type-arg]
    classes = (of_class("a", one, missed), of_class("b", other, missed_others))
    found = best_thresholds([Matches(classes=classes, images=1)])
    f1, lowest = best_by_trying(list(classes))
    assert (found is None) == (f1 == 0)
    if found is None:
        return
    scores = np.concatenate([each.scores[~each.is_ignored[0]] for each in classes])
    assert found.common.f1 == pytest.approx(f1)
    assert scores[scores > found.common.confidence].min() == lowest
    assert set(found.classes) == {each.name for each in classes if each.objects.sum()}
    for each in classes:
        if each.name not in found.classes:
            continue
        own = found.classes[each.name]
        f1, lowest = best_by_trying([each])
        if each.objects.sum() >= FEW_OBJECTS and f1 > 0:
            assert own.f1 == pytest.approx(f1)
            assert each.scores[~each.is_ignored[0] & (each.scores > own.confidence)].min() == lowest
        else:
            assert own.confidence == found.common.confidence
        kept = each.is_hit[0][~each.is_ignored[0] & (each.scores > own.confidence)]
        assert own.precision == pytest.approx(kept.mean() if len(kept) else 0)
        assert own.recall == pytest.approx(kept.sum() / each.objects.sum())


def test_of_equal_ones_the_highest_is_taken_halfway_to_the_next_score() -> None:
    # F1 of the first alone, 2 x 1 / (1 + 4), is that of all six, 2 x 2 / (6 + 4).
    rows = [
        (9, True, False),
        (6, False, False),
        (5, False, False),
        (4, False, False),
        (3, False, False),
        (2, True, False),
    ]
    found = best_thresholds([Matches(classes=(of_class("a", rows, missed=2),), images=1)])
    assert found is not None
    assert found.common.f1 == pytest.approx(0.4)
    assert found.common.confidence == pytest.approx(0.75)


def test_equal_scores_are_kept_or_dropped_together() -> None:
    rows = [(5, True, False), (5, False, False), (5, False, False)]
    found = best_thresholds([Matches(classes=(of_class("a", rows),), images=1)])
    assert found is not None
    assert (found.common.precision, found.common.recall) == pytest.approx((1 / 3, 1))
    assert found.common.confidence == pytest.approx(0.25)


def test_classes_of_several_sets_are_joined_by_name() -> None:
    one, other = ([(9, True, False)] * 8, [(3, True, False)] * 8)
    sets = [Matches(classes=(of_class("a", rows),), images=1) for rows in (one, other)]
    found, expected = best_thresholds(sets), best_thresholds([Matches(classes=(of_class("a", one + other),), images=1)])
    assert found is not None
    assert found == expected


@pytest.mark.parametrize(
    "sets", [[], [Matches(classes=(), images=0)], [Matches(classes=(of_class("a", []),), images=1)]]
)
def test_without_a_hit_there_is_none(sets: list[Matches]) -> None:
    assert best_thresholds(sets) is None
