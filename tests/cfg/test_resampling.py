"""[upsample] and [reorg3d]: shapes."""

import pytest

from cfg.parse import CfgError
from cfg.resampling import UpsampleSpec
from cfg.spec import Shape, ShapeError
from tests.cfg.sections import read


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("[upsample]", Shape(4, 12, 16)),
        ("[upsample]\nstride=3", Shape(4, 18, 24)),
        ("[upsample]\nstride=-2\nscale=.25", Shape(4, 3, 4)),
        ("[reorg3d]\nstride=2", Shape(16, 3, 4)),
        ("[reorg3d]", Shape(4, 6, 8)),
    ],
)
def test_shapes(text, shape):
    assert read(text).output_shape((Shape(4, 6, 8),)) == shape


def test_defaults():
    assert read("[upsample]") == UpsampleSpec(stride=2, scale=1.0)


@pytest.mark.parametrize("text", ["[reorg3d]\nstride=2", "[upsample]\nstride=-2"])
def test_blocks_need_a_stride_that_divides(text):
    with pytest.raises(ShapeError, match="stride=2 does not divide 4x5x8"):
        read(text).output_shape((Shape(4, 5, 8),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[upsample]\nstride=0", "a.cfg:2: stride=0 makes no output"),
        ("[upsample]\nstride=65", "a.cfg:2: stride=65 is above 64"),
        ("[upsample]\nscale=much", "a.cfg:2: scale=much is not a number"),
        ("[reorg3d]\nstride=-2", "a.cfg:2: stride=-2 is below 1"),
        ("[reorg3d]\nstride=2\nreverse=1", "a.cfg:3: reverse=1 in [reorg3d] is not supported"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message
