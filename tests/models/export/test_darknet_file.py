"""darknet's files in OpenCV's dnn: a real one where it reads them, else one that answers with known rows."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cfg.plan import load_plan
from models.export.darknet_file import why_not_run
from models.export.load import load_exported
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from models.weights.convert import write_darknet
from tests.models.export.networks import patchy_images, pico, trained_network
from tests.models.export.test_graph import differences, expected_of
from utils.errors import UserError

PLAN = pico()


def written(network, folder: Path) -> Path:
    names = tuple(f"class {label}" for label in range(network.plan.classes))
    checkpoint = make_checkpoint(network.plan, NormOptions(), network.state_dict(), class_names=names, letterbox=False)
    return write_darknet(folder / "x.weights", checkpoint, source="x.pt")[0]


class KnownRows:
    """OpenCV's network: on any image the rows of `scores`, each of the same box, per [yolo]."""

    def __init__(self, scores: list[list[list[float]]]) -> None:
        self.scores = scores

    def setInput(self, images: np.ndarray) -> None:
        assert images.shape == (1, 3, 64, 64)

    def forward(self, names: list[str]) -> list[np.ndarray]:
        assert names == [f"yolo_{index}" for index in PLAN.heads]
        return [np.array([[0.5, 0.25, 0.5, 0.25, 0.9, *row] for row in head], np.float32) for head in self.scores]


def test_rows_of_opencv_become_candidates(tmp_path, monkeypatch):
    counts = [shape.height * shape.width * 3 for shape in (PLAN.nodes[index].shape for index in PLAN.heads)]
    scores = [[[0.0, 0.0, 0.0]] * count for count in counts]
    scores[0][0], scores[-1][-1] = [0.1, 0.7, 0.0], [0.0, 0.0, 0.3]
    given = []

    def read(cfg: np.ndarray, weights: np.ndarray) -> KnownRows:
        given.extend((bytes(cfg), bytes(weights)))
        return KnownRows(scores)

    monkeypatch.setattr("cv2.dnn.readNetFromDarknet", read, raising=False)
    path = written(trained_network(PLAN), tmp_path)
    (found,) = load_exported(path).candidates(torch.zeros(1, 3, 64, 64), confidence=0.05)
    assert found.labels.tolist() == [0, 1, 2] and found.scores.tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert found.boxes.tolist() == [[16, 8, 48, 24]] * 3
    assert given[1] == path.read_bytes() and given[0].count(b"thresh=0\n") >= len(PLAN.heads)


def test_an_opencv_that_reads_no_darknet_files_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr("cv2.dnn.readNetFromDarknet", raising=False)
    assert cv2.__version__ in why_not_run()
    with pytest.raises(UserError, match=r"does not read darknet's files, 4\.x does"):
        load_exported(written(trained_network(PLAN), tmp_path))


@pytest.mark.skipif(bool(why_not_run()), reason=f"needs another OpenCV: {why_not_run()}")
@pytest.mark.parametrize("name", ["yolov4-pico", "yolov4-tiny"])
def test_opencv_finds_what_torch_finds(name, tmp_path):
    network = trained_network(load_plan(name, classes=3, input_hw=(64, 96)))
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.eps = 1e-6  # OpenCV's, where darknet has 1e-5
    images = patchy_images(2, (64, 96))
    found = load_exported(written(network, tmp_path)).candidates(images, confidence=-1.0)
    assert max(differences(found, expected_of(network, images), network.plan)) < 1e-3  # OpenCV's Winograd rounds more
