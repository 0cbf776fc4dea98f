"""Layers whose output has the shape of their input."""

import pytest

from cfg.parse import CfgError
from cfg.same_shape import ActivationSpec, DropoutSpec, SoftmaxSpec
from cfg.spec import Shape, ShapeError
from tests.cfg.sections import notes, read

SECTIONS = ["activation", "dropout", "softmax"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_shape_stays(name):
    assert read(f"[{name}]").output_shape((Shape(4, 6, 8),)) == Shape(4, 6, 8)


def test_defaults_are_those_of_darknet():
    assert read("[activation]") == ActivationSpec(activation="linear")
    assert read("[dropout]") == DropoutSpec(probability=0.2)
    assert read("[soft]") == SoftmaxSpec(groups=1, temperature=1.0)


def test_groups_of_a_softmax_are_equal():
    spec = read("[softmax]\ngroups=4")
    assert spec.output_shape((Shape(2, 1, 2),)) == Shape(2, 1, 2)
    with pytest.raises(ShapeError, match="groups=4 does not divide the values of 2x1x3"):
        spec.output_shape((Shape(2, 1, 3),))


def test_what_is_not_supported_is_reported():
    assert notes("[dropout]\ndropblock=1") == ["a.cfg:2: dropblock=1 is not supported and is ignored"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dropout]\nprobability=1.5", "a.cfg:2: probability=1.5 is above 1"),
        ("[softmax]\ntemperature=0", "a.cfg:2: temperature=0 is below 1e-06"),
        ("[softmax]\ntree=9k.tree", "a.cfg:2: tree=9k.tree in [softmax] is not supported"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message
