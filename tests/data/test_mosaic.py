import numpy as np
import pytest

from data.augment_options import AugmentOptions
from data.mosaic import draw_cut, mosaic
from utils.structures import Sample

OPTIONS = AugmentOptions(min_visibility=0.2, min_side_px=2.0)
WHOLE = np.array([[0, 0, 80, 64]] * 4)


def noise_sample(number: int, hw: tuple[int, int] = (64, 80), objects: int = 5) -> Sample:
    """Noise, so that any window is found in one place only; boxes on whole pixels."""
    rng = np.random.default_rng(number)
    corners = np.sort(rng.integers(0, (hw[1], hw[0]), size=(objects, 2, 2)), axis=1)
    boxes = corners.reshape(-1, 4).astype(np.float32)
    return Sample(
        image=rng.integers(0, 256, (*hw, 3), dtype=np.uint8),
        boxes=boxes[((boxes[:, 2:] - boxes[:, :2]) > 2).all(axis=1)],
        labels=np.arange(((boxes[:, 2:] - boxes[:, :2]) > 2).all(axis=1).sum()) + 100 * number,
        is_crowd=np.zeros(int(((boxes[:, 2:] - boxes[:, :2]) > 2).all(axis=1).sum()), bool),
        image_id=number,
        path=f"{number}.png",
    )


def pixels(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    left, top, right, bottom = box.astype(int)
    return image[top:bottom, left:right]


def occurs(patch: np.ndarray, image: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(image, patch.shape)
    return bool((windows == patch).all(axis=(-3, -2, -1)).any())


@pytest.mark.parametrize("seed", range(8))
def test_every_kept_box_covers_the_same_pixels_as_in_its_source(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [noise_sample(10 * seed + k) for k in range(4)]
    contents = np.sort(rng.uniform(0, 64, (4, 2, 2)), axis=1).reshape(4, 4)
    result = mosaic(samples, OPTIONS, cut_xy=draw_cut(rng, (64, 80)), contents=contents)
    assert len(result.labels) > 0
    for box, label in zip(result.boxes, result.labels, strict=True):
        source = samples[label // 100 - 10 * seed]
        whole = pixels(source.image, source.boxes[label % 100])
        assert occurs(pixels(result.image, box), whole)
        assert (box[2:] - box[:2] >= 2).all()


def test_what_is_dropped_is_hardly_visible() -> None:
    """Oracle: count, pixel by pixel, how much of each object is in the mosaic."""
    samples = [noise_sample(k, objects=12) for k in range(4)]
    result = mosaic(samples, OPTIONS, cut_xy=(40, 32), contents=WHOLE)
    starts = {0: (40, 32), 1: (0, 32), 2: (40, 0), 3: (0, 0)}  # top-left tiles show bottom-right windows
    for k, sample in enumerate(samples):
        window = np.zeros((64, 80), bool)
        window[starts[k][1] : starts[k][1] + 32, starts[k][0] : starts[k][0] + 40] = True
        for box, label in zip(sample.boxes, sample.labels, strict=True):
            seen = pixels(window, box)
            rows, columns = seen.any(axis=1).sum(), seen.any(axis=0).sum()
            assert (label in result.labels) == (seen.mean() >= 0.2 and min(rows, columns) >= 2)


def test_tiles_are_windows_of_the_full_size_images() -> None:
    samples = [noise_sample(k) for k in range(4)]
    result = mosaic(samples, OPTIONS, cut_xy=(30, 20), contents=WHOLE)
    np.testing.assert_array_equal(result.image[:20, :30], samples[0].image[44:, 50:])
    np.testing.assert_array_equal(result.image[:20, 30:], samples[1].image[44:, :50])
    np.testing.assert_array_equal(result.image[20:, :30], samples[2].image[:44, 50:])
    np.testing.assert_array_equal(result.image[20:, 30:], samples[3].image[:44, :50])


def test_windows_move_to_where_the_content_is() -> None:
    blank = noise_sample(0)
    samples = []
    content = np.array([20, 16, 60, 48])
    for _ in range(4):
        image = np.zeros_like(blank.image)
        image[16:48, 20:60] = 255
        samples.append(
            Sample(
                image=image,
                boxes=blank.boxes[:0],
                labels=blank.labels[:0],
                is_crowd=blank.is_crowd[:0],
                image_id=0,
                path="",
            )
        )
    assert (mosaic(samples, OPTIONS, cut_xy=(40, 32), contents=np.stack([content] * 4)).image == 255).all()
    assert (mosaic(samples, OPTIONS, cut_xy=(40, 32), contents=WHOLE).image == 0).any()


def test_of_a_crowd_any_remainder_is_kept() -> None:
    empty = noise_sample(1, objects=0)
    box = np.array([[0, 0, 41, 64]], np.float32)  # one column of 40 in the top-left tile's window
    for is_crowd in (False, True):
        first = Sample(
            image=empty.image,
            boxes=box,
            labels=np.array([3]),
            is_crowd=np.array([is_crowd]),
            image_id=9,
            path="p",
        )
        result = mosaic([first, empty, empty, empty], OPTIONS, cut_xy=(40, 32), contents=WHOLE)
        assert result.is_crowd.tolist() == [True] * is_crowd
        assert (result.image_id, result.path, result.placement) == (9, f"p + {empty.path}", None)


def test_four_empty_images() -> None:
    result = mosaic([noise_sample(k, objects=0) for k in range(4)], OPTIONS, cut_xy=(40, 32), contents=WHOLE)
    assert result.boxes.shape == (0, 4)
    assert result.boxes.dtype == np.float32


def test_cut_stays_in_the_middle_of_both_sides() -> None:
    rng = np.random.default_rng(0)
    cuts = np.array([draw_cut(rng, (100, 200)) for _ in range(2000)])
    assert cuts.min(axis=0).tolist() == [40, 20]
    assert cuts.max(axis=0).tolist() == [160, 80]
