"""The table of all layer types."""

import pytest

from cfg.layers import LAYER_TYPES, UNSUPPORTED
from cfg.parse import ALIASES, CfgError
from tests.cfg.sections import notes, read

REQUIRED = {
    **dict.fromkeys(("shortcut", "sam", "scale_channels"), "from=-2"),
    "route": "layers=-1",
    "yolo": "anchors=1,2",
}


def test_layers_read_the_previous_one_and_the_first_reads_the_input():
    assert read("[conv]").sources(7) == (6,)
    assert read("[conv]").sources(0) == (-1,)


@pytest.mark.parametrize("name", LAYER_TYPES)
def test_every_type_reads_itself(name):
    spec = read(f"[{name}]\n{REQUIRED.get(name, 'x=1')}")
    assert type(spec) is LAYER_TYPES[name]
    assert spec.kind == name


@pytest.mark.parametrize("name", LAYER_TYPES)
def test_every_type_knows_the_keys_that_all_layers_have(name):
    keys = ["clip", "onlyforward", "dont_update", "burnin_update", "stopbackward", "train_only_bn"]
    keys += ["dontload", "dontloadscales", "learning_rate"]
    body = "\n".join(f"{key}={1 + index % 8}" for index, key in enumerate(keys))
    warnings = notes(f"[{name}]\n{body}\n{REQUIRED.get(name, '')}")
    assert [line for line in warnings if "unknown" in line] == []
    assert [line.split()[1] for line in warnings if "not supported" in line] == [
        f"{key}={index}" for index, key in enumerate(keys[:6], start=1)
    ]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_darknet_has_and_we_have_not_is_called_by_its_name(name):
    assert name not in LAYER_TYPES
    with pytest.raises(CfgError) as caught:
        read(f"[{name}]")
    assert str(caught.value) == f"a.cfg:1: [{name}], {UNSUPPORTED[name]}, is not supported"


def test_every_alias_means_a_section():
    assert set(ALIASES.values()) <= {"net", *LAYER_TYPES, *UNSUPPORTED}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convolutionl]", "a.cfg:1: [convolutionl] is not a layer of darknet, did you mean 'convolutional'?"),
        ("[qqq]", "a.cfg:1: [qqq] is not a layer of darknet"),
        ("\n[net]", "a.cfg:2: [net] can only be the first section"),
        ("[lrn]", "a.cfg:1: [normalization], local response normalization, is not supported"),
    ],
)
def test_sections_that_are_no_layers(text, message):
    with pytest.raises(CfgError) as caught:
        read(text)
    assert str(caught.value) == message
