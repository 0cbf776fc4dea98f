"""What is where in a .weights file: as in the published ones, and as the oracle walks through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from cfg.layers import LAYER_TYPES
from cfg.plan import Plan, load_plan, parse_plan
from cfg.spec import LayerSpec, Shape
from models.weights.layout import stored_layers
from tests.models.weights.nets import SMALL, plan_of
from tests.reference.darknet_cfg import NARROW
from tests.reference.darknet_weights import layers_of
from utils.errors import UserError

# The sizes of files that darknet's authors published, and the layers those have: all, or the first N.
PUBLISHED_BYTES = {
    ("yolov4", None): 257_717_640,
    ("yolov4", 137): 170_038_676,  # yolov4.conv.137
    ("yolov4-csp", None): 211_944_840,
    ("yolov4-tiny", None): 24_251_276,
    ("yolov4-tiny", 29): 19_789_716,  # yolov4-tiny.conv.29
}
PUBLISHED_BYTES_OF_OTHERS = {
    ("yolov3", None): 248_007_048,
    ("yolov3", 74): 162_482_580,  # darknet53.conv.74
    ("yolov3-tiny", None): 35_434_956,
    ("yolov3-spp", None): 252_209_544,
}


def file_bytes(plan: Plan, layers: int | None) -> int:
    first = [layer for layer in stored_layers(plan) if layers is None or layer.node.index < layers]
    return 20 + sum(4 * array.size for layer in first for array in layer.arrays)


@pytest.mark.parametrize(("published", "size"), PUBLISHED_BYTES.items())
def test_the_published_files_fit_to_the_byte(published, size):
    name, layers = published
    assert file_bytes(load_plan(name), layers) == size


@pytest.mark.parametrize(("published", "size"), PUBLISHED_BYTES_OF_OTHERS.items())
def test_so_do_those_of_older_networks(published, size, shared: Path):
    name, layers = published
    assert file_bytes(load_plan(str(shared / "darknet" / "cfg" / f"{name}.cfg")), layers) == size


@pytest.mark.parametrize("name", ["small", *(path.stem for path in sorted(NARROW.glob("*.cfg")))])
def test_the_oracle_finds_the_same_arrays(name):
    text = SMALL if name == "small" else (NARROW / f"{name}.cfg").read_text(encoding="utf-8")
    plan = plan_of(text)
    ours = [(layer.node.index, [(array.word, array.size) for array in layer.arrays]) for layer in stored_layers(plan)]
    theirs = [(index, [(array.word, array.size) for array in arrays]) for index, arrays in layers_of(text) if arrays]
    assert ours == theirs
    trained = sum(a.size for layer in stored_layers(plan) for a in layer.arrays if not a.word.startswith("rolling"))
    assert trained == plan.parameter_count()


def test_weights_are_skipped_where_the_cfg_says_so():
    text = SMALL.replace("filters=4\nsize=3", "filters=4\ndontload=1\nsize=3")
    text = text.replace("antialiasing=1", "dontloadscales=1")
    for layer, (_, arrays) in zip(
        stored_layers(plan_of(text)), ((i, arrays) for i, arrays in layers_of(text) if arrays), strict=True
    ):
        assert [array.word for array in layer.loaded] == [array.word for array in arrays if array.is_read]
    first, _, _, third, *_ = stored_layers(plan_of(text))
    assert first.loaded == () and first.loaded_bytes == 0
    assert [array.word for array in third.loaded] == ["biases", "weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangeSpec(LayerSpec):
    kind: ClassVar[str] = "strange"

    @classmethod
    def read(cls, section):
        return cls()

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return inputs[0]

    def parameter_count(self, inputs: tuple[Shape, ...]) -> int:
        return 7


def test_a_layer_with_weights_that_darknet_stores_nobody_knows_where(monkeypatch):
    monkeypatch.setitem(LAYER_TYPES, "strange", StrangeSpec)
    plan = parse_plan("[net]\nwidth=8\nheight=8\n[strange]\n", path="odd.cfg")
    with pytest.raises(
        UserError, match=r"^layer 0 \[strange\] \(odd\.cfg:4\): where darknet stores its weights is not"
    ):
        stored_layers(plan)
