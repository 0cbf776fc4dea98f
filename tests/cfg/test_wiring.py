"""Layers that read others by index."""

import pytest

from cfg.parse import CfgError
from cfg.spec import Shape, ShapeError
from tests.cfg.sections import notes, read


def test_negative_indices_count_back_and_others_are_absolute():
    assert read("[route]\nlayers=-1, 3, 0").sources(9) == (8, 3, 0)
    assert read("[shortcut]\nfrom=-3, 2").sources(9) == (8, 6, 2)
    assert read("[sam]\nfrom=-2").sources(9) == (8, 7)
    assert read("[scale_channels]\nfrom=4").sources(9) == (8, 4)


def test_counting_back_beyond_the_first_layer_is_not_the_input():
    assert read("[route]\nlayers=-2").sources(1) == (-2,)
    assert read("[route]\nlayers=-1").sources(0) == (-2,)


def test_route_adds_channels_of_the_chosen_slice():
    shapes = (Shape(8, 3, 4), Shape(4, 3, 4))
    assert read("[route]\nlayers=-1,-2").output_shape(shapes) == Shape(12, 3, 4)
    assert read("[route]\nlayers=-1,-2\ngroups=4\ngroup_id=3").output_shape(shapes) == Shape(3, 3, 4)
    with pytest.raises(ShapeError, match="groups=3 does not divide 8 channels"):
        read("[route]\nlayers=-1,-2\ngroups=3").output_shape(shapes)
    with pytest.raises(ShapeError, match="inputs differ in height or width: 8x3x4 and 4x3x5"):
        read("[route]\nlayers=-1,-2").output_shape((Shape(8, 3, 4), Shape(4, 3, 5)))


def test_shortcut_keeps_the_shape_of_the_previous_layer():
    spec = read("[shortcut]\nfrom=-3")
    assert spec.output_shape((Shape(8, 3, 4), Shape(4, 3, 4))) == Shape(8, 3, 4)
    assert spec.output_shape((Shape(4, 3, 4), Shape(8, 3, 4))) == Shape(4, 3, 4)
    with pytest.raises(ShapeError, match="inputs differ in height or width: 8x3x4 and 8x6x8"):
        spec.output_shape((Shape(8, 3, 4), Shape(8, 6, 8)))


def test_shortcut_weights():
    shapes = (Shape(8, 3, 4),) * 3
    counts = {"none": 0, "per_feature": 3, "per_layer": 3, "per_channel": 24}
    for weights_type, count in counts.items():
        spec = read(f"[shortcut]\nfrom=-3,-4\nweights_type={weights_type}\nweights_normalization=avg_relu")
        assert spec.parameter_count(shapes) == count
        assert spec.output_shape((Shape(8, 3, 4), Shape(4, 3, 4), Shape(9, 3, 4))) == Shape(8, 3, 4)


def test_what_is_stored_for_a_weighted_shortcut_is_loaded():
    weighted = "[shortcut]\nfrom=-3\ndontload=1\nlearning_rate=.5\nweights_type="
    assert notes(weighted + "none") == []
    with pytest.raises(CfgError, match=r"^a\.cfg:3: dontload=1 in \[shortcut\] is not supported"):
        read(weighted + "per_feature")
    assert notes(weighted.replace("dontload=1", "dontload=0") + "per_channel") == [
        "a.cfg:4: learning_rate=.5 is not supported and is ignored"
    ]


def test_sam_and_scale_channels_shapes():
    assert read("[sam]\nfrom=-3").output_shape((Shape(8, 3, 4),) * 2) == Shape(8, 3, 4)
    with pytest.raises(ShapeError, match="equal shapes"):
        read("[sam]\nfrom=-3").output_shape((Shape(8, 3, 4), Shape(4, 3, 4)))
    spec = read("[scale_channels]\nfrom=-3")
    assert spec.output_shape((Shape(8, 1, 1), Shape(8, 3, 4))) == Shape(8, 3, 4)
    with pytest.raises(ShapeError, match="needs 8x1x1 to scale 8x3x4, got 4x1x1"):
        spec.output_shape((Shape(4, 1, 1), Shape(8, 3, 4)))
    by_cell = read("[scale_channels]\nfrom=-3\nscale_wh=1")
    assert by_cell.output_shape((Shape(1, 3, 4), Shape(8, 3, 4))) == Shape(8, 3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[route]", "a.cfg:1: [route] needs a key 'layers'"),
        ("[route]\nlayers=a", "a.cfg:2: layers=a is not a list of whole numbers"),
        ("[route]\nlayers=-1,", "a.cfg:2: layers=-1, is not a list of whole numbers"),
        ("[route]\nlayers=-1\ngroups=2\ngroup_id=2", "a.cfg:4: group_id=2 is not below groups=2"),
        ("[shortcut]", "a.cfg:1: [shortcut] needs a key 'from'"),
        ("[sam]\nfrom=-1,-2", "a.cfg:2: [sam] takes one layer in 'from'"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message
