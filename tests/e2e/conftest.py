"""A few digit scenes and the smallest net, for all tests of the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.digits import make_digits

TOY_CFG = """
[net]
width=64
height=64
batch=4
subdivisions=2
learning_rate=0.005
policy=constant
letter_box=1
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=45
activation=linear
[yolo]
mask=0,1,2
anchors=8,12,16,24,24,32
classes=10
iou_loss=ciou
iou_normalizer=.07
jitter=.1
"""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "scenes", counts={"train": 16, "val": 8}, hw=(64, 64))


@pytest.fixture(scope="session")
def toy_cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cfg") / "toy.cfg"
    path.write_text(TOY_CFG)
    return str(path)
