from itertools import permutations

import numpy as np
import pytest

from data.clusters import best_iou, cluster_shapes, measure_fit, shape_iou
from utils.errors import UserError


def random_shapes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 2) widths and heights in px, over two orders of magnitude."""
    return np.exp(np.random.default_rng(seed).normal(3.5, 0.9, (count, 2))).clip(2, 600)


def iou_by_pixels(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Count cells of a grid: sides are even, so both boxes share their centre."""
    grid = np.zeros((2, 40, 40), bool)
    for mask, (width, height) in zip(grid, (one, other), strict=True):
        mask[20 - height // 2 : 20 + height // 2, 20 - width // 2 : 20 + width // 2] = True
    return float((grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum())


def test_iou_of_shapes_is_that_of_centred_boxes() -> None:
    shapes = np.random.default_rng(0).integers(1, 20, (12, 2)) * 2
    expected = [[iou_by_pixels(tuple(one), tuple(other)) for other in shapes[:5]] for one in shapes]
    np.testing.assert_allclose(shape_iou(shapes.astype(float), shapes[:5].astype(float)), expected, rtol=1e-12)


def test_fit_counts_what_exceeds_a_limit() -> None:
    fit = measure_fit(np.array([0.2, 0.5, 0.6, 0.9]), (0.5, 0.2, 0.95))
    assert fit.mean_iou == pytest.approx(0.55)
    assert fit.recall == (0.5, 0.75, 0.0)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_as_many_clusters_as_shapes_cover_all(count: int) -> None:
    different = random_shapes(count)
    shapes = different[np.random.default_rng(1).integers(count, size=200).tolist() + list(range(count))]
    anchors = cluster_shapes(shapes, count)
    assert best_iou(shapes, anchors).min() == 1
    np.testing.assert_array_equal(anchors, different[np.argsort(different.prod(axis=1))])


def test_separate_groups_are_found() -> None:
    centres = np.array([[8, 12], [30, 20], [60, 90], [200, 150]], float)
    rng = np.random.default_rng(2)
    shapes = np.concatenate([centre * rng.uniform(0.9, 1.1, (50, 2)) for centre in centres])
    np.testing.assert_allclose(cluster_shapes(shapes, 4), centres, rtol=0.06)


@pytest.mark.parametrize("scale", [(2.0, 2.0), (0.25, 0.25), (4.0, 0.5), (1.7, 1.7), (0.3, 2.9)])
def test_scaled_boxes_scaled_anchors(scale: tuple[float, float]) -> None:
    """IoU does not know the unit, nor whether an image is stretched."""
    shapes = random_shapes(400)
    scaled = cluster_shapes(shapes * scale, 6)
    expected = cluster_shapes(shapes, 6) * scale
    np.testing.assert_allclose(scaled, expected[np.argsort(expected.prod(axis=1))], rtol=1e-9)


def test_order_does_not_matter() -> None:
    shapes = random_shapes(300)
    expected = cluster_shapes(shapes, 7)
    for seed in range(3):
        np.testing.assert_array_equal(cluster_shapes(np.random.default_rng(seed).permutation(shapes), 7), expected)


def test_ascending_by_area() -> None:
    areas = cluster_shapes(random_shapes(500), 9).prod(axis=1)
    assert (np.diff(areas) > 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_what_it_starts_from(seed: int) -> None:
    shapes = random_shapes(150, seed)
    start = random_shapes(5, 100 + seed)
    first = cluster_shapes(shapes, 5, start=start)
    for anchors in (start, first):
        assert best_iou(shapes, cluster_shapes(shapes, 5, start=anchors)).mean() >= best_iou(shapes, anchors).mean()


def test_more_clusters_cover_better() -> None:
    shapes = random_shapes(800)
    means = [best_iou(shapes, cluster_shapes(shapes, count)).mean() for count in range(1, 10)]
    assert means == sorted(means)
    assert means[8] - means[0] > 0.2


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_partition(seed: int) -> None:
    """Oracle: all partitions of eight shapes into two clusters, each with the best centre of a fine grid."""
    shapes = random_shapes(8, seed)
    grid = np.stack(np.meshgrid(*(np.geomspace(*np.quantile(shapes[:, i], (0, 1)), 40) for i in (0, 1))), -1)
    overlaps = shape_iou(shapes, grid.reshape(-1, 2))
    best = 0.0
    for members in range(1, 2**7):
        inside = np.array([members >> i & 1 for i in range(8)], bool)
        best = max(best, (overlaps[inside].sum(axis=0).max() + overlaps[~inside].sum(axis=0).max()) / 8)
    assert best_iou(shapes, cluster_shapes(shapes, 2)).mean() >= best - 0.04


def test_beyond_the_limit_a_share_is_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = random_shapes(3000)
    expected = best_iou(shapes, cluster_shapes(shapes, 5)).mean()
    monkeypatch.setattr("data.clusters.MAX_SHAPES", 500)
    assert best_iou(shapes, cluster_shapes(shapes, 5)).mean() == pytest.approx(expected, abs=0.01)


def test_two_of_three_shapes_in_any_order() -> None:
    three = np.array([[10, 10], [11, 10], [50, 60]], float)
    results = [cluster_shapes(np.array(order), 2) for order in permutations(three.tolist())]
    for anchors in results:
        np.testing.assert_array_equal(anchors, results[0])
        assert best_iou(three, anchors).min() > 0.9


@pytest.mark.parametrize(("boxes", "count"), [(0, 1), (3, 4), (50, 51)])
def test_fewer_boxes_than_clusters(boxes: int, count: int) -> None:
    with pytest.raises(UserError, match=f"{count} anchors need boxes of .* there are {boxes} "):
        cluster_shapes(random_shapes(boxes).reshape(-1, 2), count)


def test_identical_boxes_are_one_shape() -> None:
    shapes = np.full((40, 2), 12.5)
    np.testing.assert_array_equal(cluster_shapes(shapes, 1), [[12.5, 12.5]])
    with pytest.raises(UserError, match=r"2 anchors .* there are 1 \(40 boxes\)"):
        cluster_shapes(shapes, 2)


def test_a_billion_clusters_are_refused_before_they_are_made() -> None:
    with pytest.raises(UserError, match="1000000000 anchors"):
        cluster_shapes(random_shapes(10), 10**9)
