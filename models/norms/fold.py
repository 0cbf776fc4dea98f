"""A network for inference only: norms with batch statistics merged into their convolutions.

In inference such a norm is y * a + b per channel, a = gamma / sqrt(var + eps), b = beta - mean * a: the same as
filters times a, and b as the bias (torch.nn.utils.fusion).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.blocks import ConvNormAct, merge_conv_norm
from models.network import Network
from models.norms.running_stats import has_running_statistics
from models.norms.weight_centralization import used_weight
from utils.errors import UserError


def can_fold(network: Network) -> bool:
    """Whether no norm looks at the image at hand."""
    return not _unfoldable(network)


@torch.no_grad()
def fold(network: Network) -> Network:
    """A copy in eval mode with plain convolutions in place of convolution and norm; the same outputs to rounding.

    UserError for group, layer and instance norm: they take the statistics of the image at hand.
    """
    if stuck := _unfoldable(network):
        raise UserError(
            f"{type(stuck[0]).__name__} cannot be merged into a convolution: it takes the statistics of each image "
            "itself, which gn, ln and in do"
        )
    folded = copy.deepcopy(network).eval()
    for index, block in enumerate(folded.layers):
        if isinstance(block, ConvNormAct) and block.norm is not None:
            folded.layers[index] = ConvNormAct(_merged(block.conv, block.norm), None, block.act, block.blur).eval()
    return folded


def _unfoldable(network: Network) -> list[nn.Module]:
    norms = [block.norm for block in network.layers if isinstance(block, ConvNormAct)]
    return [norm for norm in norms if norm is not None and not has_running_statistics(norm)]


def _merged(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias = merge_conv_norm(
        used_weight(conv), norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
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
