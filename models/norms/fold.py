"""A network for inference only: norms with batch statistics merged into their convolutions.

In inference such a norm is y * a + b per channel, a = gamma / sqrt(var + eps), b = beta - mean * a: the same as
filters times a, and b as the bias (torch.nn.utils.fusion).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.blocks import ConvNormAct
from models.network import Network
from models.norms.centred import used_weight
from models.norms.table import has_batch_statistics
from utils.errors import UserError


def can_fold(network: Network) -> bool:
    """Whether no norm looks at the picture at hand."""
    return not _unfoldable(network)


@torch.no_grad()
def fold(network: Network) -> Network:
    """A copy in eval mode with plain convolutions in place of convolution and norm; the same outputs to rounding.

    UserError for group, layer and instance norm: they take the statistics of the picture at hand.
    """
    if stuck := _unfoldable(network):
        kinds = ", ".join(sorted({type(block.norm).__name__ for block in stuck}))
        raise UserError(
            f"{kinds} cannot be merged into a convolution: it normalises by the statistics of the picture at hand"
        )
    folded = copy.deepcopy(network).eval()
    for block in _blocks(folded):
        if block.norm is not None:
            block.conv, block.norm = _merged(block.conv, block.norm), None
    return folded


def _blocks(network: Network) -> list[ConvNormAct]:
    return [module for module in network.modules() if isinstance(module, ConvNormAct)]


def _unfoldable(network: Network) -> list[ConvNormAct]:
    return [block for block in _blocks(network) if block.norm is not None and not has_batch_statistics(block.norm)]


def _merged(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """In float64 on the CPU, rounded once."""
    state = [tensor.detach().cpu().double() for tensor in (used_weight(conv), norm.running_mean, norm.running_var)]
    gamma, beta = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    weight, bias = fuse_conv_bn_weights(state[0], None, *state[1:], norm.eps, gamma, beta)
    made = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    ).to(conv.weight)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
