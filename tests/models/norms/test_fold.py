"""A folded network says what the network says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfg.plan import load_plan, parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.fold import can_fold, fold
from models.norms.options import NormOptions
from models.norms.running_stats import has_running_statistics
from tests.models.norms.kinds import BN_IN_INFERENCE, KINDS
from utils.errors import UserError

FOLDABLE = [*BN_IN_INFERENCE, "none"]
LAYERS = """
[net]
width=16
height=16
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=mish
[convolutional]
batch_normalize=1
filters=8
groups=4
size=3
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=12
size=1
activation=swish
[convolutional]
filters=18
size=1
activation=linear
[yolo]
mask=0,1,2
anchors=8,12,16,24,24,32
classes=1
"""


def trained(plan, options: NormOptions) -> Network:
    """With statistics, gamma and beta as after some training; in eval mode."""
    network = Network(plan, norm_factory(options))
    for module in network.modules():
        if has_running_statistics(module):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def said(network: Network, side: int) -> list[torch.Tensor]:
    dtype = next(network.parameters()).dtype
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return [head.logits for head in network(images.to(dtype))]


@pytest.mark.parametrize("kind", FOLDABLE)
def test_the_outputs_stay(kind):
    network = trained(parse_plan(LAYERS, path="toy.cfg"), KINDS[kind])
    folded = fold(network)
    for ours, theirs in zip(said(folded, 16), said(network, 16), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    convs = [layer.conv for layer in list(folded.layers)[:-1]]
    assert all(type(conv) is nn.Conv2d and conv.bias is not None for conv in convs)
    assert [conv.groups for conv in convs] == [1, 4, 1, 1]
    assert not any(has_running_statistics(module) for module in folded.modules())
    assert not folded.training


@pytest.mark.parametrize("norm", ["bn", "cmbn", "cbn", "mabn"])
def test_the_outputs_of_a_whole_network_stay(norm):
    network = trained(load_plan("yolov4-pico", classes=3), NormOptions(norm=norm)).double()
    for ours, theirs in zip(said(fold(network), 64), said(network, 64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(said(fold(network.float()), 64), said(network.float(), 64), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_network_itself_stays_as_it_is():
    network = trained(parse_plan(LAYERS, path="toy.cfg"), NormOptions(norm="cmbn"))
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold(network)
    after = network.state_dict()
    assert network.training and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        ("gn", "GroupNorm"),
        ("ln", "GroupNorm"),
        ("in", "GroupNorm"),
        ("bcn", "BatchChannelNorm"),
        ("evonorm-s0", "EvoNormS0"),
        ("frn", "FilterResponseNorm"),
    ],
)
def test_norms_of_the_image_at_hand_are_refused(norm, name):
    network = Network(parse_plan(LAYERS, path="toy.cfg"), norm_factory(NormOptions(norm=norm)))
    assert not can_fold(network)
    with pytest.raises(UserError, match=rf"^{name} cannot be merged into a convolution"):
        fold(network)


@pytest.mark.parametrize("norm", ["bn", "none", "frozen", "syncbn"])
def test_the_others_can_be_folded(norm):
    assert can_fold(Network(parse_plan(LAYERS, path="toy.cfg"), norm_factory(NormOptions(norm=norm))))
