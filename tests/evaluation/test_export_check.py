"""How a file's candidates are held against torch's."""

from __future__ import annotations

import pytest
import torch

from evaluation.export_check import FileCheck, SideBySide, check_table
from utils.structures import Detections


class Fixed:
    """A Predictor of the same boxes on every image, moved and with other scores; one of class 1 is beside another."""

    device = torch.device("cpu")

    def __init__(self, *, shift_px: float = 0.0, shift_score: float = 0.0, labels: tuple[int, ...] = (0, 1, 1)) -> None:
        self.boxes = torch.tensor([[2.0, 2, 20, 20], [10, 10, 30, 30], [11, 11, 31, 31]]) + shift_px
        self.scores = torch.tensor([0.9, 0.8, 0.3]) + shift_score
        self.labels = torch.tensor(labels)
        self.asked: list[float] = []

    def candidates(self, images: torch.Tensor, *, confidence: float) -> list[Detections]:
        self.asked.append(confidence)
        found = Detections(boxes=self.boxes, scores=self.scores, labels=self.labels)
        return [found.where(found.scores > confidence)] * len(images)


def test_the_largest_differences_are_found():
    both = SideBySide(reference=Fixed(), file=Fixed(shift_px=0.25, shift_score=0.01))
    found = both.candidates(torch.zeros(2, 3, 8, 8), confidence=0.1)
    assert [len(each) for each in found] == [3, 3]
    assert both.box_px == pytest.approx(0.25) and both.score == pytest.approx(0.01, abs=1e-6)
    assert both.compared == 6 and len(both.file_s) == len(both.reference_s) == 1


def test_a_score_on_the_other_side_of_the_threshold_has_its_counterpart():
    both = SideBySide(reference=Fixed(), file=Fixed(shift_score=0.005))
    both.candidates(torch.zeros(1, 3, 8, 8), confidence=0.301)
    assert both.compared == 3 and both.score < 0.006


def test_survivors_of_suppression_are_compared_with_their_own_candidate():
    file = Fixed()
    file.boxes, file.scores, file.labels = file.boxes[[2]], file.scores[[2]], file.labels[[2]]
    both = SideBySide(reference=Fixed(), file=file)
    both.candidates(torch.zeros(1, 3, 8, 8), confidence=0.1)
    assert both.box_px == 0 and both.score == 0 and both.compared == 1


def test_a_class_that_torch_does_not_find_is_not_compared():
    both = SideBySide(reference=Fixed(labels=(0, 0, 0)), file=Fixed())
    both.candidates(torch.zeros(1, 3, 8, 8), confidence=0.1)
    assert both.compared == 1


def test_the_table_has_a_line_for_each_reference_and_file():
    check = FileCheck(
        name="a.onnx", AP=0.5, AP50=0.75, box_px=0.00012, score=3e-7, compared=9, ms=12.3, reference_ms=45.6
    )
    table = check_table(
        {"torch": check, "torch, diounms": check}, [check, check]
    )  # of a CocoTable it reads AP and AP50
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["AP", "AP50", "box", "px", "score", "ms/image"]
    assert lines[1:3] == [["torch", "0.5000", "0.7500", "45.6"], ["torch,", "diounms", "0.5000", "0.7500"]]
    assert lines[3] == lines[4] == ["a.onnx", "0.5000", "0.7500", "0.00012", "3.0e-07", "12.3"]
    assert len({len(line) for line in table.splitlines()}) == 2  # columns stand below each other
