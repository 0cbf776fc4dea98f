import numpy as np

from data.augment_options import AugmentOptions
from data.geometry import clip_boxes, visible


def test_clipping() -> None:
    boxes = np.array([[-5, -5, 5, 5], [50, 50, 60, 60]], np.float32)
    assert clip_boxes(boxes, (0, 0, 20, 20)).tolist() == [[0, 0, 5, 5], [20, 20, 20, 20]]


def test_visibility_is_a_share_of_the_whole_object_but_crowds_always_count() -> None:
    whole = np.array([[-90, 0, 10, 10], [-5, 0, 5, 10], [0, 0, 1.5, 10], [-90, 0, 10, 10], [-9, 0, -1, 10]], np.float32)
    cut = clip_boxes(whole, (0, 0, 20, 20))
    crowd = np.array([False, False, False, True, True])
    options = AugmentOptions(min_visibility=0.2, min_side_px=2)
    seen = visible(whole, cut, crowd, options)
    assert seen.tolist() == [False, True, False, True, False]
    assert visible(whole[:0], cut[:0], crowd[:0], options).tolist() == []
