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

from cfg.layers import LAYER_TYPES
from cfg.plan import load_plan, parse_plan
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.norms.fold import fold
from models.norms.options import NormOptions
from models.norms.table import NORMS
from models.weights.reader import read_weights

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


def test_a_fresh_network_predicts_hardly_any_object():
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


# A network of every layer type, and every key that changes what a layer computes.
ZOO = """[net]
width=16
height=16
[conv]
filters=8
size=3
pad=1
stride=2
antialiasing=1
batch_normalize=1
activation=leaky
[activation]
activation=leaky
[conv]
filters=8
size=3
pad=1
dilation=2
groups=2
batch_normalize=2
activation=mish
[shortcut]
from=-2,-3
weights_type=per_channel
weights_normalization=softmax
activation=hard_mish
[shortcut]
from=-2
weights_type=per_feature
[shortcut]
from=-2
activation=relu
[conv]
filters=8
activation=logistic
[sam]
from=-2
[avgpool]
[conv]
filters=8
[scale_channels]
from=-3
[conv]
[scale_channels]
from=-2
scale_wh=1
activation=relu
[max]
size=2
stride=2
antialiasing=2
[reorg3d]
[upsample]
stride=2
scale=.5
[upsample]
stride=-2
[conv]
filters=6
[dropout]
[activation]
[route]
layers=-1,-3
groups=2
group_id=1
[soft]
groups=2
[route]
layers=-3
[conv]
filters=7
[yolo]
classes=2
anchors=4,8
[route]
layers=0
"""


def test_every_layer_type_is_built_and_gives_the_planned_shape():
    plan = parse_plan(ZOO, path="zoo.cfg")
    assert {node.spec.kind for node in plan.nodes} == set(LAYER_TYPES)
    network = Network(plan, BN)
    assert sum(p.numel() for p in network.parameters()) == plan.parameter_count()
    assert network.layers[3].weight.shape == (3, 8) and network.layers[4].weight.shape == (2,)
    shapes = {}
    for index, layer in enumerate(network.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: shapes.update({index: output.shape}))
    (head,) = network(torch.rand(2, 3, 16, 16))
    assert head.logits.shape == (2, 1, 4, 4, 7)
    assert shapes == {node.index: (2, *node.shape) for node in plan.nodes if node.index not in plan.heads}


def test_every_layer_type_passes_the_gradient_on():
    network = Network(parse_plan(ZOO, path="zoo.cfg"), BN)
    (head,) = network(torch.rand(2, 3, 16, 16))
    head.logits.square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_every_layer_type_is_merged_and_copied():
    network = Network(parse_plan(ZOO, path="zoo.cfg"), BN)
    images = torch.rand(2, 3, 16, 16)
    network(images)  # statistics that are not 0 and 1
    expected = network.eval()(images)[0].logits
    torch.testing.assert_close(fold(network)(images)[0].logits, expected)
    other = Network(network.plan, BN).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images)[0].logits, expected)
    assert not any(name.endswith("kernel") for name in network.state_dict())


def test_an_activation_by_itself_leaves_its_input_to_others():
    text = "[net]\nwidth=4\nheight=4\nchannels=1\n[dropout]\nprobability=0\n"
    text += "[activation]\nactivation=relu\n[route]\nlayers=0,1\n"
    x = torch.randn(1, 1, 4, 4)
    made = Network(parse_plan(text, path="toy.cfg"), BN).last_output(x)
    assert torch.equal(made, torch.cat((x, x.clamp(min=0)), dim=1))


def test_a_network_without_heads_gives_its_last_output():
    text = "[net]\nwidth=4\nheight=6\n[conv]\nfilters=5\nactivation=linear\n[avgpool]\n[softmax]\n"
    network = Network(parse_plan(text, path="toy.cfg"), BN).eval()
    images = torch.rand(2, 3, 6, 4)
    conv = network.layers[0].conv
    scores = nn.functional.conv2d(images, conv.weight, conv.bias).mean((2, 3)).softmax(1)
    torch.testing.assert_close(network.last_output(images)[:, :, 0, 0], scores)
    assert network(images) == ()


def test_a_network_of_one_channel_makes_images_grey():
    text = "[net]\nwidth=4\nheight=4\nchannels=1\n[conv]\nfilters=3\nactivation=linear\n"
    network = Network(parse_plan(text, path="toy.cfg"), BN).eval()
    images = torch.rand(2, 3, 4, 4)
    grey = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    torch.testing.assert_close(network.last_output(images), network.last_output(grey))
    assert all(name.startswith("layers.") for name in network.state_dict())


def test_a_head_may_read_the_input():
    text = "[net]\nwidth=4\nheight=4\nchannels=6\n[yolo]\nclasses=1\nanchors=1,1\n"
    network = Network(parse_plan(text, path="toy.cfg"), BN)
    images = torch.rand(1, 6, 4, 4)
    assert torch.equal(network(images)[0].logits[0, 0].permute(2, 0, 1), images[0])


def test_weights_of_shortcuts_do_not_decay():
    network = Network(parse_plan(ZOO, path="zoo.cfg"), BN)
    decayed, free = parameter_groups(network, weight_decay=0.1)
    assert {p.dim() for p in decayed["params"]} == {4}
    assert any(p is network.layers[3].weight for p in free["params"])


def test_the_pool_pads_right_and_bottom_when_the_size_is_even():
    text = "[net]\nwidth=3\nheight=3\nchannels=1\n[maxpool]\nsize=2\nstride=1\n"
    network = Network(parse_plan(text, path="toy.cfg"), BN)
    x = -torch.arange(9.0).view(1, 1, 3, 3)
    assert network.layers[0](x).flatten().tolist() == [0, -1, -2, -3, -4, -5, -6, -7, -8]


# --- darknet's own forward -----------------------------------------------------------------------------------


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
    network.load_state_dict(read_weights(weights, network.plan).state)
    image = torch.from_numpy(np.load(fixtures / "input_dog.npz")["dog_128x96_chw"])[None]
    with torch.no_grad():
        heads = network(image)
    for head, index in zip(heads, network.plan.heads, strict=True):
        output = head.logits.sigmoid() if head.spec.new_coords else head.logits
        output = output[0].permute(0, 3, 1, 2).flatten(0, 1)
        np.testing.assert_allclose(output.numpy(), reference[f"yolo{index}_raw"], atol=1e-4)


def test_convolutions_keep_the_variance_of_their_input():
    network = Network(load_plan("yolov4-pico", classes=2), BN)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and module.weight.numel() > 1000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 1.01 / fan_in), rel=0.15)
