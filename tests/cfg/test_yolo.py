"""[yolo]: defaults, anchors and masks."""

import math

import pytest

from cfg.parse import CfgError, parse_sections
from cfg.plan import parse_plan
from cfg.spec import Shape, ShapeError
from cfg.yolo import YoloSpec


def read(body: str) -> YoloSpec:
    return YoloSpec.read(parse_sections("[yolo]\n" + body, path="a.cfg")[0])


def test_defaults_are_those_of_darknet():
    spec = read("anchors=1,2")
    assert (spec.classes, spec.anchors, spec.mask, spec.max_boxes) == (20, ((1.0, 2.0),), (0,), 200)
    assert (spec.jitter, spec.resize, spec.random) == (0.2, 1.0, 0.0)
    assert (spec.ignore_thresh, spec.truth_thresh, spec.iou_thresh) == (0.5, 1.0, 1.0)
    assert (spec.iou_loss, spec.iou_normalizer, spec.obj_normalizer, spec.cls_normalizer) == (
        "mse",
        0.75,
        1,
        1,
    )
    assert (spec.max_delta, spec.scale_x_y, spec.new_coords) == (math.inf, 1.0, False)
    assert (spec.objectness_smooth, spec.label_smooth_eps, spec.focal_loss) == (False, 0.0, False)
    assert (spec.nms_kind, spec.beta_nms) == ("default", 0.6)
    assert (spec.iou_thresh_kind, spec.delta_normalizer, spec.counters_per_class) == ("iou", 1.0, ())


def test_what_the_loss_of_darknet_reads():
    spec = read("anchors=1,2\nclasses=2\niou_thresh_kind=ciou\ndelta_normalizer=.5\ncounters_per_class=10, 300")
    assert (spec.iou_thresh_kind, spec.delta_normalizer, spec.counters_per_class) == ("ciou", 0.5, (10, 300))


def test_head_anchors_are_the_masked_ones_in_mask_order():
    spec = read("anchors=1,2, 3,4, 5,6\nnum=3\nmask=2,0\nclasses=4")
    assert spec.head_anchors == ((5.0, 6.0), (1.0, 2.0))
    assert spec.channels == 2 * (5 + 4)


def test_a_comma_behind_the_last_anchor_is_spared():
    assert read("anchors=1,2, 3,4,\nnum=2").anchors == ((1.0, 2.0), (3.0, 4.0))
    with pytest.raises(CfgError, match=r"^a\.cfg:3: mask=0, is not a list of whole numbers$"):
        read("anchors=1,2\nmask=0,")


def test_an_unknown_nms_kind_is_the_default_as_in_darknet():
    """And nothing is silent about it."""
    text = "[net]\nwidth=8\nheight=8\n[conv]\nfilters=6\n[yolo]\nanchors=1,2\nclasses=1\nnms_kind=cornernms\n"
    plan = parse_plan(text, path="a.cfg")
    assert plan.head_specs[0].nms_kind == "default"
    (warning,) = plan.warnings
    assert warning == (
        "a.cfg:9: nms_kind=cornernms is not one of default, greedynms, diounms: read as default, as darknet does"
    )


def test_no_mask_means_all_anchors():
    assert read("anchors=1,2, 3,4").mask == (0, 1)


def test_output_is_the_input_of_the_right_width():
    spec = read("anchors=1,2\nclasses=3")
    assert spec.output_shape((Shape(8, 4, 5),)) == Shape(8, 4, 5)
    with pytest.raises(ShapeError, match="needs 8 channels"):
        spec.output_shape((Shape(7, 4, 5),))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("classes=2", "a.cfg:1: [yolo] needs a key 'anchors'"),
        ("anchors=1,2,3\nnum=1", "a.cfg:2: anchors holds 3 numbers, num=1 needs 2"),
        ("anchors=1,2,3", "a.cfg:2: anchors holds 3 numbers, num=1 needs 2"),
        ("anchors=5", "a.cfg:2: anchors holds 1 numbers, num=0 needs 0"),
        ("anchors=1,0", "a.cfg:2: anchors must be positive"),
        ("anchors=1,x", "a.cfg:2: anchors=1,x is not a list of numbers"),
        ("anchors=1,2\nmask=1", "a.cfg:3: mask names anchor 1, but there are 1 anchors"),
        ("anchors=1,2\nmask=-1", "a.cfg:3: mask names anchor -1, but there are 1 anchors"),
        ("anchors=1,2\nmask=0,0", "a.cfg:3: mask names an anchor twice"),
        ("anchors=1,2\nclasses=0", "a.cfg:3: classes=0 is below 1"),
        (
            "anchors=1,2\niou_loss=ciuo",
            "a.cfg:3: iou_loss=ciuo is not one of mse, iou, giou, diou, ciou, did you mean 'ciou'?",
        ),
        (
            "anchors=1,2\nclasses=2\ncounters_per_class=3",
            "a.cfg:4: counters_per_class needs 2 positive numbers, one per class",
        ),
        (
            "anchors=1,2\nclasses=2\ncounters_per_class=3,0",
            "a.cfg:4: counters_per_class needs 2 positive numbers, one per class",
        ),
        ("anchors=1,2\niou_thresh_kind=mse", "a.cfg:3: iou_thresh_kind=mse is not one of iou, giou, diou, ciou"),
        ("anchors=1,2\nmap=coco.map", "a.cfg:3: map=coco.map in [yolo] is not supported"),
    ],
)
def test_bad_values(body, message):
    with pytest.raises(CfgError) as caught:
        read(body)
    assert str(caught.value) == message
