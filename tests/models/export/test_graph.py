"""What the graph computes is what torch's network and decoder compute, for every network of the family."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from cfg.parse import CfgError
from cfg.plan import Plan, cfg_names, load_plan
from models.export.formats import write_file
from models.export.graph import ExportGraph
from models.export.load import load_exported
from models.network import Network
from models.norms.fold import fold
from models.yolo.postprocess import candidates
from tests.models.export.networks import metadata_of, patchy_images, pico, trained_network
from tests.reference.darknet_cfg import NARROW
from utils.structures import Detections

DETECTORS = sorted(path.stem for path in NARROW.glob("*.cfg") if load_plan(str(path)).heads)
# Differences that are allowed: of the input's side, so .04 px of 416 px, and of scores. float32 has 7 digits, of which
# a hundred layers, summed in another order, cost one or two.
AGREES = 1e-4
QUICK = ("yolov3-tiny", "yolov4-csp-swish", "yolov4-sam-mish-csp-reorg-bfm", "yolov7-tiny")


def differences(found: list[Detections], expected: list[Detections], plan: Plan) -> tuple[float, float]:
    """The largest of boxes, relative to the input's side or the box's own where that is longer, and of scores.

    A coordinate of float32 is rounded relative to its size, so a box that reaches far out of the image cannot be
    compared in pixels; scores lie in 0..1. Candidates are compared one by one.
    """
    boxes, scores = [0.0], [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        scale = (theirs.boxes[:, 2:] - theirs.boxes[:, :2]).amax(1).clamp(min=max(plan.net.input_hw))
        boxes.append(float(((ours.boxes - theirs.boxes).abs().amax(1) / scale).max()))
        scores.append(float((ours.scores - theirs.scores).abs().max()))
    return max(boxes), max(scores)


def expected_of(network: Network, images: torch.Tensor) -> list[Detections]:
    """In float64, so that differences are the rounding of the graph alone: torch's own in float32 is as large."""
    with torch.no_grad():
        heads = copy.deepcopy(network).double()(images.double())
        return candidates(heads, confidence=-1.0)  # all of them, so that none is on the edge


def smallest(path: str, *, least_px: int = 64) -> Plan:
    """Return the plan at the smallest input, from `least_px` on, that the network's strides divide."""
    for side in (64, 96, 128, 192, 256, 512):
        try:
            plan = load_plan(path, input_hw=(side, side))
        except CfgError:
            continue
        if side >= least_px and side % plan.size_step_px == 0:
            return plan
    raise AssertionError(path)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_traced_graph_of_every_official_network_decodes_as_torch_does(name):
    plan = smallest(str(NARROW / f"{name}.cfg"))
    network = trained_network(plan)
    images = patchy_images(2, plan.net.input_hw)
    with torch.no_grad():
        (decoded,) = ExportGraph(fold(network), decoded=True, is_dynamic=False).eval()(images)
    scores = decoded[..., 4:5] * decoded[..., 5:]
    found = [
        Detections(
            boxes=boxes.repeat_interleave(plan.classes, 0),
            scores=of_image.flatten(),
            labels=torch.arange(plan.classes).repeat(len(boxes)),
        )
        for boxes, of_image in zip(decoded[..., :4], scores, strict=True)
    ]
    assert max(differences(found, expected_of(network, images), plan)) < AGREES


def difference_of_onnx(plan: Plan, folder: Path, **changed) -> float:
    """The largest difference of two images' candidates, and of another image of another size if the file takes it."""
    pytest.importorskip("onnx", reason="extra: export")
    pytest.importorskip("onnxruntime", reason="extra: export")
    network = trained_network(plan)
    written = write_file("onnx", fold(network), metadata_of(plan, **changed), folder / "network")
    predictor = load_exported(written[0])
    cases = [(plan, patchy_images(2, plan.net.input_hw))]
    if predictor.metadata.is_dynamic:
        height, width = plan.net.input_hw
        larger = plan.with_input_hw((height + plan.size_step_px, width))
        cases.append((larger, patchy_images(1, larger.net.input_hw)))  # a trace holds fast what was a number in Python
    return max(
        largest
        for of_size, images in cases
        for largest in differences(predictor.candidates(images, confidence=-1.0), expected_of(network, images), of_size)
    )


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS if name not in QUICK)]
)
def test_the_onnx_file_of_an_official_network_agrees_to_1e_4(name, tmp_path):
    assert difference_of_onnx(smallest(str(NARROW / f"{name}.cfg")), tmp_path, batch=None) < AGREES


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_the_onnx_file_of_a_whole_official_network_agrees_to_1e_4(name, shared: Path, tmp_path):
    assert difference_of_onnx(smallest(str(shared / "darknet" / "cfg" / f"{name}.cfg")), tmp_path) < AGREES


@pytest.mark.parametrize("name", [name for name in cfg_names() if name not in ("yolov4", "yolov4-csp")])
def test_the_onnx_file_of_our_own_networks_agrees_to_1e_4(name, tmp_path):
    assert difference_of_onnx(smallest(name), tmp_path) < AGREES


@pytest.mark.parametrize("norm", ["gn:groups=2", "gn:groups=2,ws", "ln", "bcn:groups=2", "evonorm-s0:groups=2", "frn"])
def test_norms_of_the_image_at_hand_stay_in_the_file(norm, tmp_path):
    pytest.importorskip("onnxruntime", reason="extra: export")
    plan = pico()
    network = trained_network(plan, norm)
    written = write_file("onnx", fold(network, partly=True), metadata_of(plan, batch=None), tmp_path / "network")
    images = patchy_images(3, (64, 64)) * torch.tensor([1.0, 0.1, 0.5]).view(3, 1, 1, 1)  # bright ones and a dark one
    found = load_exported(written[0]).candidates(images, confidence=-1.0)
    assert max(differences(found, expected_of(network, images), plan)) < AGREES
