"""An exponential moving average of a model's weights (Polyak averaging), for evaluation and detection.

Not `torch.optim.swa_utils.AveragedModel`: it averages, or copies in each step, all buffers, among them the histories of
norms, which are as large as the weights and mean nothing outside training. Here the state dict is averaged.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from models.network import Network
from utils import ranks

DECAY = 0.9999


class ModelEMA:
    """`model` is the averaged copy, in eval mode, without gradients.

    The decay of step n is (1 + n) / (10 + n), at most `decay` (None: DECAY): a memory of about the last ninth of the
    steps so far. So it follows the weights closely while they move fast, smooths them in a training of 100 steps as in
    one of 100,000, and does not depend on how long the training will be. Source: TensorFlow's
    ExponentialMovingAverage, num_updates. Integer buffers (counters) are copied. Build it before the first mini-batch
    is announced, while norms hold no history.
    """

    def __init__(self, model: Network, *, decay: float | None = None) -> None:
        self.model = copy.deepcopy(model)
        self.model.eval().requires_grad_(False)
        self.decay = DECAY if decay is None else decay

    @torch.no_grad()
    def update(self, model: Network, *, step: int) -> None:
        """Average in the weights after optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averaged, fresh = [], []
        for name, mean in self.model.state_dict().items():
            if mean.is_floating_point():
                averaged.append(mean)
                fresh.append(current[name].to(mean.dtype))
            else:
                mean.copy_(current[name])
        torch._foreach_lerp_(averaged, fresh, 1 - decay)

    def agree(self) -> None:
        """Replace running statistics by their mean over ranks (the weights are equal already). A collective."""
        ranks.all_reduce_mean([t for t in persistent_buffers(self.model).values() if t.is_floating_point()])


def persistent_buffers(model: Network) -> dict[str, Tensor]:
    """Return what a state dict holds beside the parameters, by name."""
    parameters = dict(model.named_parameters())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
