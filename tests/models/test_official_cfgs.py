"""Every official cfg of the YOLOv4 family, its relatives and its backbones: parsed, built and run.

Narrowed copies of their layer tables are stored (tests/reference/darknet_cfg.py), so that it takes no other file;
the whole networks need darknet's own cfgs.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cfg.parse import CfgError
from cfg.plan import Plan, load_plan, parse_plan
from models.blocks import ConvNormAct
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from tests.reference.darknet_cfg import CLASSES, NARROW, count_parameters, narrow
from utils.clock import BatchClock

BN = norm_factory(NormOptions(norm="bn"))
NAMES = sorted(path.stem for path in NARROW.glob("*.cfg"))
CLASSIFIERS = {"csdarknet53-omega", "darknet53"}


def run(network: Network, images: Tensor) -> list[Tensor]:
    """Heads' logits, or a classifier's scores. On the way, each layer's shape is held against its plan's."""
    seen = {}
    for index, layer in enumerate(network.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: seen.update({index: output.shape}))
    with torch.no_grad():
        outputs = [head.logits for head in network(images)] if network.plan.heads else [network.last_output(images)]
    planned = {node.index: (len(images), *node.shape) for node in network.plan.nodes}
    assert seen == {index: shape for index, shape in planned.items() if index not in network.plan.heads}
    return outputs


def check_outputs(plan: Plan, outputs: list[Tensor], *, images: int, classes: int) -> None:
    for output in outputs:
        assert output.isfinite().all()
    if plan.heads:
        assert [(o.shape[1], o.shape[-1]) for o in outputs] == [(len(h.mask), 5 + classes) for h in plan.head_specs]
    else:
        assert outputs[0].shape == (images, classes, 1, 1)
        torch.testing.assert_close(outputs[0].sum((1, 2, 3)), torch.ones(images))


def classes_of(name: str) -> int:
    """Of the narrowed cfg."""
    return 125 if name in CLASSIFIERS else CLASSES


def test_all_29_are_stored():
    assert len(NAMES) == 29 and set(NAMES) > CLASSIFIERS


@pytest.mark.parametrize("name", NAMES)
def test_narrowed(name):
    text = (NARROW / f"{name}.cfg").read_text(encoding="utf-8")
    plan = parse_plan(text, path=f"{name}.cfg")
    assert plan.warnings == ()
    network = Network(plan, BN).eval()
    assert sum(p.numel() for p in network.parameters()) == plan.parameter_count() == count_parameters(text)
    outputs = run(network, torch.rand(2, 3, *plan.net.input_hw))
    check_outputs(plan, outputs, images=2, classes=classes_of(name))


# The norms that came last, each with another cfg by turns; `slow` has all pairs.
RIVALS = ("gn:groups=2,ws", "bcn:groups=2", "evonorm-s0:groups=2", "frn", "ghost:size=1", "cmbn:ws")
BY_TURNS = [(name, RIVALS[index % len(RIVALS)]) for index, name in enumerate(NAMES)]
REST = [pair for pair in product(NAMES, RIVALS) if pair not in BY_TURNS]


@pytest.mark.parametrize(("name", "norm"), [*BY_TURNS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_a_training_step_with_a_norm_for_small_batches(name, norm):
    plan = parse_plan((NARROW / f"{name}.cfg").read_text(encoding="utf-8"), path=f"{name}.cfg")
    network = Network(plan, norm_factory(NormOptions(norm=norm)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)  # the default: a step of SGD has no bound
    for part in BatchClock(network).minibatches(torch.rand(4, 3, *plan.net.input_hw).split(2)):
        outputs = [head.logits for head in network(part)] if plan.heads else [network.last_output(part)]
        torch.autograd.backward([output.square().mean() for output in outputs])
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if name.endswith("conv.weight"))
    optimizer.step()
    check_outputs(plan, run(network.eval(), torch.rand(1, 3, *plan.net.input_hw)), images=1, classes=classes_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_whole(name, shared: Path):
    path = shared / "darknet" / "cfg" / f"{name}.cfg"
    text = path.read_text(encoding="utf-8", errors="replace")
    assert narrow(text) == (NARROW / f"{name}.cfg").read_text(encoding="utf-8")
    plan = smallest_plan(path)
    with torch.device("meta"):
        network = Network(plan, BN).eval()
    assert sum(p.numel() for p in network.parameters()) == plan.parameter_count() == count_parameters(text)
    fill(network.to_empty(device="cpu"))
    outputs = run(network, torch.rand(1, 3, *plan.net.input_hw))
    check_outputs(plan, outputs, images=1, classes=1000 if name in CLASSIFIERS else plan.classes)


def smallest_plan(path: Path) -> Plan:
    """Of the inputs that its strides divide."""
    try:
        return load_plan(str(path), input_hw=(32, 32))
    except CfgError:
        return load_plan(str(path), input_hw=(64, 64))


@torch.no_grad()
def fill(network: Network) -> None:
    """Fill uninitialized memory with averaging filters and neutral statistics."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.zero_()
    for block in network.layers:
        if isinstance(block, ConvNormAct):
            block.conv.weight.fill_(1 / block.conv.weight[0].numel())
            if isinstance(block.norm, nn.BatchNorm2d):
                block.norm.weight.fill_(1)
                block.norm.running_var.fill_(1)
