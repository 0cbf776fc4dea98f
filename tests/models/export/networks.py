"""Networks to export, with statistics as after some training, and their metadata."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.plan import Plan, load_plan
from models.export.metadata import Metadata, Suppression
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.running_stats import has_running_statistics


def patchy_images(count: int, input_hw: tuple[int, int]) -> Tensor:
    """(N, 3, H, W) of patches under noise. Noise alone looks the same everywhere to a deep layer: normalized by what
    little variance is left, rounding grows a thousandfold."""
    patches = F.interpolate(torch.rand(count, 3, 4, 4), size=input_hw)
    return (patches + torch.rand(count, 3, *input_hw)) / 2


@torch.no_grad()
def trained_network(plan: Plan, norm: str = "bn") -> Network:
    """Return a network of random weights in eval mode.

    Statistics are those of a mini-batch, each then off by up to a half, so that activations keep their scale through a
    deep network.
    """
    options = NormOptions(norm=norm, norm_momentum=1.0) if norm == "bn" else NormOptions(norm=norm)
    network = Network(plan, norm_factory(options))
    height, width = plan.net.input_hw
    images = patchy_images(4, (2 * height, 2 * width))  # so that no layer's statistics are of one cell an image
    network.train()(images)
    for module in network.modules():
        if has_running_statistics(module):
            deviation = module.running_var.sqrt()
            module.running_mean += deviation * torch.empty_like(deviation).uniform_(-0.5, 0.5)
            module.running_var *= torch.empty_like(deviation).uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    # Logits of trained heads lie within a few units. Larger ones would saturate the sigmoid, which hides differences of
    # scores, and make boxes of thousands of pixels; smaller ones make all boxes anchors. So a head's filters are scaled
    # until they give logits with a standard deviation of 1, and biases of up to 1 are added.
    heads = [network.layers[source] for source in network.head_inputs]
    for head in heads:
        head.bias.zero_()
    for head, raw in zip(heads, network.eval()(patchy_images(4, plan.net.input_hw)), strict=True):
        head.conv.weight.div_(raw.logits.std())
        head.bias.uniform_(-1, 1)
    return network


def pico(side_px: int = 64) -> Plan:
    return load_plan("yolov4-pico", classes=3, input_hw=(side_px, side_px))


def metadata_of(plan: Plan, **changed: Any) -> Metadata:
    values: dict[str, Any] = {
        "cfg_name": plan.name,
        "cfg_text": plan.source_text,
        "class_names": tuple(f"class {label}" for label in range(plan.classes)),
        "input_hw": plan.net.input_hw,
        "letterbox": False,
        "resize": "opencv",
        "norm": "bn",
        "outputs": "decoded",
        "precision": "float32",
        "batch": 1,
    }
    values |= changed
    if values["outputs"] == "nms":
        values.setdefault("suppression", Suppression(iou=0.6, confidence=0.001, max_per_class=1000))
    return Metadata(**values)
