"""Where backbones end: known answers, and what holds for every network."""

from pathlib import Path

import pytest

from cfg.backbone import backbone_layers
from cfg.plan import cfg_names, load_plan, parse_plan

REFERENCE = Path(__file__).parents[3] / "shared/darknet"

LAST_LAYER = {
    "yolov4": 104,
    "yolov4-csp": 98,
    "yolov4-pico": 25,
    "yolov4-tiny": 26,
    "yolov4-tiny-3l": 26,
    "cd53paspp-gamma": 104,
    "csdarknet53-omega": 104,
    "csresnext50-panet-spp": 80,
    "csresnext50-panet-spp-original-optimal": 80,
    "darknet53": 74,
    "enet-coco": 130,
    "yolov3": 74,
    "yolov3-spp": 74,
    "yolov3-tiny": 12,
    "yolov3-tiny-prn": 13,
    "yolov3-tiny_3l": 12,
    "yolov4-csp-s-mish": 44,
    "yolov4-csp-swish": 98,
    "yolov4-csp-x-mish": 116,
    "yolov4-csp-x-swish": 116,
    "yolov4-custom": 104,
    "yolov4-p5": 158,
    "yolov4-p6": 186,
    "yolov4-sam-mish-csp-reorg-bfm": 104,
    "yolov4-tiny-custom": 26,
    "yolov4_new": 104,
    "yolov4x-mish": 116,
    "yolov7": 57,
    "yolov7-tiny": 32,
    "yolov7x": 65,
    "yolo-fastest-1.1": 108,
    "yolo-fastest-1.1-xl": 108,
}
CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nactivation=leaky\n"
HEAD = "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nmask=0,1,2\nanchors=1,1,2,2,3,3\nclasses=1\n"


def layers_of(*sections: str) -> int:
    return backbone_layers(parse_plan("[net]\nwidth=64\nheight=64\n" + "".join(sections), path="a.cfg"))


@pytest.mark.parametrize("name", cfg_names())
def test_known_ends_of_our_cfgs(name):
    assert backbone_layers(load_plan(name)) - 1 == LAST_LAYER[name]


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"darknet's own cfgs are not at {REFERENCE}")
def test_known_ends_of_darknets_cfgs():
    cfgs = [*(REFERENCE / "cfg").glob("*.cfg"), *(REFERENCE / "real").glob("*.cfg")]
    assert len(cfgs) > 25
    assert {cfg.stem: backbone_layers(load_plan(str(cfg))) - 1 for cfg in cfgs}.items() <= LAST_LAYER.items()


@pytest.mark.parametrize("name", cfg_names())
def test_the_end_depends_neither_on_the_input_nor_on_the_classes(name):
    assert backbone_layers(load_plan(name, classes=1, input_hw=(64, 32))) - 1 == LAST_LAYER[name]


def test_a_strided_convolution_and_a_shortcut_end_a_stage_themselves():
    assert layers_of(CONV, CONV + "stride=2\n", CONV, CONV, HEAD) == 2
    assert layers_of(CONV, CONV, "[shortcut]\nfrom=-2\nactivation=linear\n", CONV, HEAD) == 3


def test_a_pooling_and_a_concatenation_end_with_the_convolution_after_them():
    assert layers_of(CONV, "[maxpool]\nsize=2\nstride=2\n", CONV, CONV, HEAD) == 3
    assert layers_of(CONV, CONV, "[route]\nlayers=-1,-2\n", CONV, CONV, HEAD) == 4
    assert layers_of(CONV, CONV, "[route]\nlayers=-1,-2\n", "[maxpool]\nsize=2\nstride=2\n", CONV, CONV, HEAD) == 5


def test_an_spp_and_an_upsampling_are_not_of_the_backbone():
    spp = "[maxpool]\nsize=5\nstride=1\n[route]\nlayers=-1,-2\n"
    assert layers_of(CONV + "stride=2\n", CONV, spp, CONV, HEAD) == 1
    assert layers_of(CONV + "stride=2\n", CONV, "[upsample]\nstride=2\n", CONV + "stride=2\n", HEAD) == 1


def test_what_one_head_does_without_is_not_of_the_backbone():
    aside = "[shortcut]\nfrom=-2\nactivation=linear\n"
    assert layers_of(CONV + "stride=2\n", CONV, aside, HEAD, "[route]\nlayers=-4\n", HEAD) == 1


def test_a_network_without_stages_has_no_backbone():
    assert layers_of(HEAD) == 0
    assert layers_of(CONV, CONV) == 0
