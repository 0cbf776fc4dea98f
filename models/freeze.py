"""The first layers of a network do not learn: for fine-tuning with few images, or in little memory.

darknet's stopbackward=1, whose layers keep their running statistics, too.
"""

from __future__ import annotations

from models.network import Network
from utils.errors import UserError


def freeze(network: Network, layers: int) -> str:
    """From now on -> what learns, in words. layers: of the cfg, in darknet's numbering, [net] not counted.

    Their parameters get no gradient, so that backward ends there and none of their activations are kept. Their norms
    stay in eval mode, whatever mode the network is put into: the statistics stay as loaded, and nobody announces
    mini-batches to them. Do it before the network is given to an optimizer, a StatisticsFreeze or a wrapper.
    UserError where nothing would be left to learn.
    """
    network.layers[:layers].requires_grad_(False)
    learning = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in network.parameters())
    if not learning:
        raise UserError(f"--freeze {layers}: none of the network's {len(network.layers)} layers is left to learn")
    network.frozen_layers = layers
    network.train(network.training)
    share = f"{learning / 1e6:.2f} M of {total / 1e6:.2f} M parameters learn"
    return f"freeze    layers 0 to {layers - 1}, with the statistics of their norms: {share}"
