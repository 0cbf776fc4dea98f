"""Boxes as darknet has them: its own outputs of networks with made-up weights, decoded, in order, and suppressed.

tests/golden/darknet_boxes.npz holds what the default run needs of the fixtures in `shared`: raw outputs and boxes of
yolov4-tiny, those of yolov4-csp's last head, and boxes of yolov4 and yolov4-csp before and after suppression.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cfg.plan import load_plan
from cfg.yolo import NMS_KINDS, YoloSpec
from models.yolo.head import RawHead
from models.yolo.nms import NmsRule, classwise_nms
from models.yolo.postprocess import DetectionOptions, candidates, suppress
from tests.darknet_fixtures import dog, network_of, write_weights
from utils.letterbox import whole_placement
from utils.structures import Detections

NETS = ["yolov4", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-csp", "yolov3", "yolov3-spp", "yolov3-tiny"]
INPUT_HW, IMAGE_HW = (96, 128), (360, 640)
NMS_IOU = 0.45
Boxes = Mapping[str, np.ndarray]  # rows of class, class score * objectness, objectness, x, y, w, h; and what is kept


@pytest.fixture
def golden(root: Path) -> Boxes:
    return np.load(root / "tests" / "golden" / "darknet_boxes.npz")


def head_of(raw: np.ndarray, spec: YoloSpec) -> RawHead:
    """raw: (A * (5 + C), H, W) as darknet's convolution before the [yolo] has it."""
    channels, height, width = raw.shape
    output = torch.from_numpy(raw).view(1, len(spec.mask), channels // len(spec.mask), height, width)
    logits = output.permute(0, 1, 3, 4, 2)
    stride_px = (INPUT_HW[0] / height, INPUT_HW[1] / width)
    return RawHead(logits=logits.logit() if spec.new_coords else logits, spec=spec, stride_px=stride_px)


def heads_of(name: str, raws: Boxes, prefix: str = "") -> list[RawHead]:
    plan = load_plan(name)
    return [
        head_of(raws[f"{prefix}yolo{index}_raw"], spec)
        for index, spec in zip(plan.heads, plan.head_specs, strict=True)
        if f"{prefix}yolo{index}_raw" in raws
    ]


def relative(boxes: Tensor) -> np.ndarray:
    """xyxy in input pixels -> centre and size in shares of the input."""
    unit = torch.tensor(INPUT_HW[::-1])
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat((centre / unit, size / unit), dim=1).numpy()


def check_candidates(heads: Sequence[RawHead], dets: np.ndarray, confidence: float, tolerance: float) -> Detections:
    """One row of dets after the other: the order is darknet's."""
    (found,) = candidates(heads, confidence=confidence)
    assert found.labels.tolist() == dets[:, 0].astype(int).tolist()
    np.testing.assert_allclose(found.scores, dets[:, 1], atol=tolerance)
    np.testing.assert_allclose(relative(found.boxes), dets[:, 3:], rtol=10 * tolerance, atol=tolerance)
    probabilities = torch.cat([h.logits[0, ..., 4:].sigmoid().permute(1, 2, 0, 3).flatten(0, 2) for h in heads])
    place = (probabilities[:, :1] * probabilities[:, 1:] > confidence).nonzero()[:, 0]
    np.testing.assert_allclose(probabilities[place, 0], dets[:, 2], atol=tolerance)
    return found


def check_keeps(found: Detections, keeps: Boxes, prefix: str = "") -> None:
    for kind in NMS_KINDS:
        rule = NmsRule(kind=kind, iou=NMS_IOU, beta=0.6)
        kept = classwise_nms(found.boxes, found.scores, found.labels, rule, unit=INPUT_HW[::-1])
        mask = np.zeros(len(found), bool)
        mask[kept] = True
        assert np.array_equal(mask, keeps[f"{prefix}keep_{kind}"]), kind


def check_letterboxed(heads: Sequence[RawHead], dets: np.ndarray, confidence: float, tolerance: float) -> None:
    """An image of 640 x 360 in the input: its boxes in shares of its sides, after suppression, in any order."""
    knobs = {"confidence": confidence, "nms_iou": NMS_IOU, "max_detections": None}
    options = DetectionOptions(**knobs, nms="default")
    (found,) = suppress(candidates(heads, confidence=confidence), heads[-1].spec, options)
    place = whole_placement(IMAGE_HW, INPUT_HW, letterbox=True)
    corners = (found.boxes - torch.tensor([place.left_px, place.top_px] * 2)) / torch.tensor(place.image_px * 2)
    centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    made = np.concatenate([found.labels[:, None], found.scores[:, None], centre, size], axis=1)
    made, expected = (rows[np.lexsort((rows[:, 1], rows[:, 0]))] for rows in (made, np.delete(dets, 2, axis=1)))
    np.testing.assert_allclose(made, expected, rtol=10 * tolerance, atol=tolerance)


def test_classic_boxes_are_darknets(golden: Boxes) -> None:
    heads = heads_of("yolov4-tiny", golden, "tiny/")
    found = check_candidates(heads, golden["tiny/dets"], float(golden["tiny/thresh"]), tolerance=1e-6)
    check_keeps(found, golden, "tiny/")
    check_letterboxed(heads, golden["tiny/dets_letter_default"], float(golden["tiny/thresh"]), tolerance=1e-6)


def test_boxes_of_new_coords_are_darknets(golden: Boxes) -> None:
    (last,) = heads_of("yolov4-csp", golden, "csp/")
    assert last.spec.new_coords
    found = check_candidates([last], golden["csp/dets174"], float(golden["csp/thresh"]), tolerance=1e-6)
    assert len(found) == 8


@pytest.mark.parametrize("name", ["yolov4", "csp"])
def test_suppression_is_darknets(golden: Boxes, name: str) -> None:
    """On darknet's own boxes: about a third of them go, and 20 to 95 more by IoU than by distance."""
    dets = torch.from_numpy(golden[f"{name}/dets"])
    unit = torch.tensor(INPUT_HW[::-1])
    centre, half = dets[:, 3:5] * unit, dets[:, 5:] * unit / 2
    boxes = torch.cat((centre - half, centre + half), dim=1)
    check_keeps(Detections(boxes=boxes, scores=dets[:, 1], labels=dets[:, 0].long()), golden, f"{name}/")


@pytest.mark.parametrize("name", NETS)
def test_all_nets_boxes_are_darknets(name: str, shared: Path) -> None:
    """From darknet's raw outputs."""
    fixtures = shared / "darknet" / "fixtures"
    facts = json.loads((fixtures / f"fwd_{name}.json").read_text())
    reference = np.load(fixtures / f"fwd_{name}.npz")
    heads = heads_of(str(shared / "darknet" / "cfg" / f"{name}.cfg"), reference)
    check_keeps(check_candidates(heads, reference["dets"], facts["thresh"], tolerance=1e-6), reference)
    check_letterboxed(heads, reference["dets_letter_default"], facts["thresh"], tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_all_nets_find_darknets_boxes(name: str, shared: Path, tmp_path: Path) -> None:
    """From the image: the network is ours, too."""
    fixtures, cfg = shared / "darknet" / "fixtures", shared / "darknet" / "cfg" / f"{name}.cfg"
    facts = json.loads((fixtures / f"fwd_{name}.json").read_text())
    reference = np.load(fixtures / f"fwd_{name}.npz")
    write_weights(fixtures, cfg, tmp_path / "made.weights", facts)
    with torch.no_grad():
        heads = network_of(cfg, tmp_path / "made.weights", INPUT_HW)(dog(fixtures))
    check_keeps(check_candidates(heads, reference["dets"], facts["thresh"], tolerance=1e-5), reference)
    check_letterboxed(heads, reference["dets_letter_default"], facts["thresh"], tolerance=1e-5)
