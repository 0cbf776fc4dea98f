"""Freezing the first layers of a network, for fine-tuning with few images or in little memory.

darknet's stopbackward=1, whose layers keep their running statistics, too.
"""

from __future__ import annotations

from models.network import Network
from utils.errors import UserError


def freeze(network: Network, layers: int) -> str:
    """Freeze the first `layers` layers of the cfg ([net] not counted). Returns a summary.

    Their parameters get no gradient, so backward ends there and none of their activations are stored. Their norms stay
    in eval mode whatever the network's mode is: their statistics stay as loaded, and mini-batches are not announced to
    them. Call it before making an optimizer, a StatisticsFreeze or a wrapper. Raises UserError if nothing is left to
    train.
    """
    network.layers[:layers].requires_grad_(False)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in network.parameters())
    if not trained:
        raise UserError(f"--freeze {layers}: none of the network's {len(network.layers)} layers is left to train")
    network.frozen_layers = layers
    network.train(network.training)
    share = f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters are trained"
    return f"layers 0 to {layers - 1}, with their norm statistics: {share}"
