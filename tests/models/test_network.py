"""The network a plan describes: shapes, parameters, gradients; and the reference's own outputs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cfg.plan import load_plan, parse_plan
from models.network import Network, parameter_groups
from models.norms.table import NORMS, NormOptions, norm_factory
from utils.errors import UserError

BN = norm_factory(NormOptions(norm="bn"))
SMALL = {"yolov4": (64, 96), "yolov4-csp": (64, 64), "yolov4-tiny": (64, 96), "yolov4-tiny-3l": (64, 64)}


@pytest.mark.parametrize("name", [*SMALL, "yolov4-pico"])
def test_heads_have_the_shapes_and_the_parameters_the_plan_promises(name):
    plan = load_plan(name, classes=3, input_hw=SMALL.get(name, (96, 64)))
    network = Network(plan, BN).eval()
    assert sum(p.numel() for p in network.parameters()) == plan.parameter_count()
    with torch.no_grad():
        heads = network(torch.zeros(2, 3, *plan.net.input_hw))
    for head, index in zip(heads, plan.heads, strict=True):
        shape = plan.nodes[index].shape
        assert head.logits.shape == (2, 3, shape.height, shape.width, 8)
        assert head.stride_px == (plan.net.height / shape.height, plan.net.width / shape.width)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["yolov4-pico", "yolov4-tiny"])
def test_every_parameter_gets_a_gradient(name, norm):
    plan = load_plan(name, classes=2, input_hw=(64, 64))
    network = Network(plan, norm_factory(NormOptions(norm=norm)))
    sum(head.logits.square().sum() for head in network(torch.rand(2, 3, 64, 64))).backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_fresh_network_says_there_is_nothing():
    plan = load_plan("yolov4-pico", classes=4)
    network = Network(plan, BN).eval()
    for head in network(torch.rand(1, 3, 128, 128)):
        assert 0.001 < head.logits[..., 4].sigmoid().mean() < 0.1


def test_decay_is_on_convolution_weights_only():
    network = Network(load_plan("yolov4-pico", classes=2), BN)
    decayed, free = parameter_groups(network, weight_decay=0.1)
    assert {p.dim() for p in decayed["params"]} == {4}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_what_cannot_be_built_names_the_line():
    text = "[net]\nwidth=8\nheight=8\n[convolutional]\nfilters=4\n[avgpool]\n"
    with pytest.raises(UserError, match=r"^toy\.cfg:6: \[avgpool\] layers can be read but not built yet$"):
        Network(parse_plan(text, path="toy.cfg"), BN)


def test_the_pool_pads_right_and_bottom_when_the_size_is_even():
    text = "[net]\nwidth=3\nheight=3\nchannels=1\n[maxpool]\nsize=2\nstride=1\n"
    network = Network(parse_plan(text, path="toy.cfg"), BN)
    x = -torch.arange(9.0).view(1, 1, 3, 3)
    assert network.layers[0](x).flatten().tolist() == [0, -1, -2, -3, -4, -5, -6, -7, -8]


# --- darknet's own forward -----------------------------------------------------------------------------------


def load_by_hand(network: Network, payload: np.ndarray) -> None:
    """The floats of a .weights file, layer by layer: bias or beta, then gamma, mean, variance; then weights."""
    position = 0

    def take(tensor: torch.Tensor) -> None:
        nonlocal position
        tensor.data.copy_(torch.from_numpy(payload[position : position + tensor.numel()]).view_as(tensor))
        position += tensor.numel()

    for layer in network.layers:
        conv = getattr(layer, "conv", None)
        if conv is None:
            continue
        norm = layer.norm
        for tensor in (conv.bias,) if norm is None else (norm.bias, norm.weight, norm.running_mean, norm.running_var):
            take(tensor)
        take(conv.weight)
    assert position == len(payload)


@pytest.mark.parametrize(
    "name",
    ["yolov4", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-csp", "yolov3", "yolov3-spp", "yolov3-tiny"],
)
def test_raw_outputs_are_darknets(name, shared: Path, tmp_path: Path):
    fixtures = shared / "darknet" / "fixtures"
    spec = importlib.util.spec_from_file_location("recipe", fixtures / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    facts = json.loads((fixtures / f"fwd_{name}.json").read_text())
    reference = np.load(fixtures / f"fwd_{name}.npz")
    cfg = shared / "darknet" / "cfg" / f"{name}.cfg"
    weights = tmp_path / "made.weights"
    knobs = {name: facts[name] for name in ("seed", "gain", "res_gain", "out_gain")}
    sha256, _ = recipe.make_weights(str(cfg), str(weights), **knobs)
    assert sha256 == facts["weights_sha256"]

    network = Network(load_plan(str(cfg), input_hw=(96, 128)), BN).eval()
    load_by_hand(network, np.frombuffer(weights.read_bytes()[20:], "<f4").copy())
    image = torch.from_numpy(np.load(fixtures / "input_dog.npz")["dog_128x96_chw"])[None]
    with torch.no_grad():
        heads = network(image)
    for head, index in zip(heads, network.plan.heads, strict=True):
        said = head.logits.sigmoid() if head.spec.new_coords else head.logits
        said = said[0].permute(0, 3, 1, 2).flatten(0, 1)
        np.testing.assert_allclose(said.numpy(), reference[f"yolo{index}_raw"], atol=1e-4)


def test_convolutions_keep_the_variance_of_their_input():
    network = Network(load_plan("yolov4-pico", classes=2), BN)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and module.weight.numel() > 1000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 1.01 / fan_in), rel=0.15)
