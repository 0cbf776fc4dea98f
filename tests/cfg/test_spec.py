"""Fields declared with `key`, shapes, and windows."""

import math
from dataclasses import dataclass

import pytest

from cfg.parse import CfgError, parse_sections
from cfg.spec import LayerSpec, Shape, ShapeError, key, slide


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSpec(LayerSpec):
    count: int = key(int, low=1)
    rate: float = key(0.5, "the_rate", high=1)
    is_on: bool = key(False)
    word: str = key("a", choices=("a", "b"))
    limit: float = math.inf
    pairs: tuple[tuple[float, float], ...] = ()

    def output_shape(self, inputs):
        return inputs[0]


def read(body: str) -> ExampleSpec:
    return ExampleSpec.read(parse_sections("[x]\n" + body, path="a.cfg")[0])


def test_keys_are_read_by_name_kind_and_default():
    assert read("count=2") == ExampleSpec(count=2, rate=0.5, is_on=False, word="a")
    full = read("count=2\nthe_rate=1\nis_on=1\nword=b\nlimit=7")
    assert full == ExampleSpec(count=2, rate=1.0, is_on=True, word="b", limit=math.inf)
    assert isinstance(full.rate, float)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("rate=1", "a.cfg:1: [x] needs a key 'count'"),
        ("count=0", "a.cfg:2: count=0 is below 1"),
        ("count=1\nthe_rate=2", "a.cfg:3: the_rate=2 is above 1"),
        ("count=1\nword=c", "a.cfg:3: word=c is not one of a, b"),
        ("count=1\nis_on=yes", "a.cfg:3: is_on=yes is not a whole number"),
    ],
)
def test_limits_and_kinds_are_enforced(body, message):
    with pytest.raises(CfgError) as caught:
        read(body)
    assert str(caught.value) == message


def test_a_shape_prints_as_channels_height_width():
    assert str(Shape(channels=64, height=13, width=26)) == "64x13x26"


def test_slide():
    assert [slide(Shape(1, side - 2, 7), 3, (2, 1), padding=2) for side in (3, 4, 5, 6, 7)] == [
        Shape(1, count, 7) for count in (1, 1, 2, 2, 3)
    ]
    with pytest.raises(ShapeError, match="a window of 3 does not fit into a padded side of 2"):
        slide(Shape(1, 5, 2), 3, (2, 2), padding=0)
