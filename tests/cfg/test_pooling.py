"""[maxpool] and [avgpool]: defaults and geometry."""

import itertools

import pytest

from cfg.parse import CfgError
from cfg.pooling import AvgPoolSpec, PoolSpec
from cfg.spec import Shape, ShapeError
from tests.cfg.sections import notes, read, window_starts


@pytest.mark.parametrize("side", [1, 2, 7, 8, 13])
def test_the_output_counts_windows(side):
    for size, stride in itertools.product((1, 2, 3, 5, 13), (1, 2, 3)):
        padding = size - 1  # darknet's default, in total
        spec = read(f"[maxpool]\nsize={size}\nstride={stride}")
        expected = window_starts(side, padding // 2, padding - padding // 2, size, stride)
        assert spec.output_shape((Shape(3, 40, side),)).width == expected
        assert expected == (side + stride - 1) // stride


def test_defaults():
    assert read("[maxpool]\nstride=2") == PoolSpec(size=2, stride_x=2, stride_y=2, padding=1)
    assert read("[max]\nsize=3") == PoolSpec(size=3, stride_x=1, stride_y=1, padding=2)
    assert read("[maxpool]\nsize=3\npadding=0").output_shape((Shape(1, 5, 5),)) == Shape(1, 3, 3)


def test_strides_by_axis():
    spec = read("[maxpool]\nsize=2\nstride=2\nstride_x=1")
    assert spec.output_shape((Shape(3, 8, 8),)) == Shape(3, 4, 8)


def test_antialiasing_gives_the_strides_to_the_blur():
    spec = read("[maxpool]\nsize=2\nstride=2\nantialiasing=2")
    assert spec.window_strides == (1, 1)
    assert spec.output_shape((Shape(3, 9, 8),)) == Shape(3, 4, 4)


def test_out_channels_alone_change_nothing():
    assert read("[maxpool]\nsize=2\nout_channels=7") == read("[maxpool]\nsize=2")
    assert notes("[maxpool]\nsize=2\nout_channels=7\nmaxpool_depth=0") == []


def test_the_global_mean():
    assert read("[avg]") == AvgPoolSpec()
    assert read("[avgpool]").output_shape((Shape(4, 6, 8),)) == Shape(4, 1, 1)


def test_what_is_padded_is_bounded_too():
    with pytest.raises(ShapeError, match="65536x1024x1024 is too large"):
        read("[maxpool]\nsize=1024\nstride=1024").output_shape((Shape(65536, 1, 1),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[maxpool]\nsize=2\npadding=3", "a.cfg:3: padding=3 is above 2"),
        ("[maxpool]\nstride=0", "a.cfg:2: stride=0 is below 1"),
        ("[maxpool]\nsize=2\nmaxpool_depth=1", "a.cfg:3: maxpool_depth=1 in [maxpool] is not supported"),
        ("[maxpool]\nsize=1025", "a.cfg:2: size=1025 is above 1024"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message
