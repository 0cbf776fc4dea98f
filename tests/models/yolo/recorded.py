"""darknet's own deltas: some for one image in tests/golden, all for two in the reference files beside the checkout.

golden/darknet_training.npz was cut from those: image 0 of twelve cases, and the first whole-net case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfg.parse import parse_sections
from cfg.yolo import YoloSpec
from models.yolo.head import RawHead
from tests.reference.darknet_loss import Truth
from utils.structures import Targets

GOLDEN = Path(__file__).parents[2] / "golden" / "darknet_training.npz"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """x, delta: (N, A, 5 + C, H, W). cost: as printed, None where it is not recorded."""

    spec: YoloSpec
    x: np.ndarray
    truths: list[list[Truth]]
    delta: np.ndarray
    input_hw: tuple[int, int]
    cost: float | None


def golden_names() -> list[str]:
    with np.load(GOLDEN) as arrays:
        return [name for name in json.loads(str(arrays["meta"])) if name != "train_step"]


def golden_case(name: str) -> Recorded:
    with np.load(GOLDEN) as arrays:
        case = json.loads(str(arrays["meta"]))[name]
        return _recorded(case, arrays[case["x"]][None], arrays["truth"][None], arrays[f"{name}/delta"][None])


def fixture_cases(shared: Path) -> dict[str, Recorded]:
    folder = shared / "darknet" / "fixtures"
    cases = json.loads((folder / "yolo_train.json").read_text())
    with np.load(folder / "yolo_train.npz") as arrays:
        return {
            name: _recorded(case, *(arrays[f"{name}/{part}"] for part in ("x", "truth", "delta")))
            for name, case in cases.items()
        }


def _recorded(case: dict[str, Any], x: np.ndarray, truth: np.ndarray, delta: np.ndarray) -> Recorded:
    text = "[yolo]\n" + "\n".join(f"{key}={value}" for key, value in case["yolo_options"].items())
    spec = YoloSpec.read(parse_sections(text, path="recorded")[0])
    layout = (len(x), len(spec.mask), 5 + spec.classes, *x.shape[2:])
    return Recorded(
        spec=spec,
        x=x.reshape(layout),
        truths=[truths_of(rows) for rows in truth],
        delta=delta.reshape(layout),
        input_hw=(case["net_h"], case["net_w"]),
        cost=case.get("cost"),
    )


def truths_of(rows: np.ndarray) -> list[Truth]:
    """Rows of x, y, w, h, class as darknet reads them: up to the first whose x is 0."""
    count = len(rows) if rows[:, 0].all() else int((rows[:, 0] == 0).argmax())
    return [(*map(float, row[:4]), int(row[4])) for row in rows[:count]]


def targets_of(truths: list[list[Truth]], input_hw: tuple[int, int], dtype: torch.dtype) -> Targets:
    """No crowds."""
    flat = [(image, *truth) for image, of_image in enumerate(truths) for truth in of_image]
    image, x, y, w, h, label = torch.tensor(flat, dtype=torch.float64).reshape(-1, 6).unbind(1)
    height, width = input_hw
    corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=1)
    return Targets(
        boxes=(corners * corners.new_tensor((width, height, width, height))).to(dtype),
        labels=label.long(),
        image_index=image.long(),
        is_crowd=torch.zeros(len(label), dtype=torch.bool),
    )


def head_of(x: np.ndarray, spec: YoloSpec, input_hw: tuple[int, int], dtype: torch.dtype) -> RawHead:
    """The head of its convolution's output x (N, A, 5 + C, H, W); with new_coords x is the logistic of the logits."""
    output = torch.from_numpy(x).permute(0, 1, 3, 4, 2).double()
    logits = output.logit() if spec.new_coords else output
    stride_px = (input_hw[0] / x.shape[3], input_hw[1] / x.shape[4])
    return RawHead(logits=logits.to(dtype).requires_grad_(), spec=spec, stride_px=stride_px)


def output_delta(gradient: Tensor, x: np.ndarray, spec: YoloSpec) -> np.ndarray:
    """A gradient to logits (N, A, H, W, 5 + C) -> darknet's delta, to x and of its shape, without the layer's
    delta_normalizer."""
    delta = -gradient.double().permute(0, 1, 4, 2, 3).numpy() / spec.delta_normalizer
    return delta / (x * (1 - x.astype(np.float64))) if spec.new_coords else delta
