"""A network for inference only: norms with batch statistics merged into their convolutions.

In inference such a norm is y * a + b per channel, a = gamma / sqrt(var + eps), b = beta - mean * a: the same as
filters times a, and b as the bias (torch.nn.utils.fusion).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.blocks import ConvNormAct, merge_conv_norm
from models.network import Network
from models.norms.batch_stat import BatchStatNorm
from models.norms.running_stats import is_batch_norm
from models.norms.used_weight import used_weight
from utils.errors import UserError


def can_fold(network: Network) -> bool:
    """Return whether every norm is batch norm in inference, so that none depends on the image at hand."""
    return not unfoldable(network)


@torch.no_grad()
def fold(network: Network, *, partly: bool = False) -> Network:
    """Return a copy in eval mode with plain convolutions in place of convolution and norm: equal outputs to rounding.

    Raises UserError for norms that are not batch norm in inference, such as group norm, which uses the image at hand;
    with `partly` these stay.
    """
    if (stuck := unfoldable(network)) and not partly:
        raise UserError(
            f"{type(stuck[0]).__name__} cannot be merged into a convolution: in inference it is not batch norm"
        )
    folded = copy.deepcopy(network).eval()
    for index, block in enumerate(folded.layers):
        if isinstance(block, ConvNormAct) and block.norm is not None and is_batch_norm(block.norm):
            folded.layers[index] = ConvNormAct(_merged(block.conv, block.norm), None, block.act, block.blur).eval()
    return folded


def unfoldable(network: Network) -> list[nn.Module]:
    """Return the norms that depend on the image at hand."""
    norms = [block.norm for block in network.layers if isinstance(block, ConvNormAct)]
    return [norm for norm in norms if norm is not None and not is_batch_norm(norm)]


def _merged(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(norm, BatchStatNorm | _BatchNorm)
    weight, bias = merge_conv_norm(used_weight(conv), norm.state_dict(), norm.eps)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    merged = nn.Conv2d(**{name: getattr(conv, name) for name in names})
    merged.weight, merged.bias = (nn.Parameter(tensor.to(conv.weight)) for tensor in (weight, bias))
    return merged
