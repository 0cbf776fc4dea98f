"""An exponential moving average of a model's weights (Polyak averaging), for evaluation and detection.

Not `torch.optim.swa_utils.AveragedModel`: it averages, or copies in each step, all buffers, among them the histories of
norms, which are as large as the weights and mean nothing outside training. Here the state dict is averaged.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from models.network import Network
from utils import ranks


class ModelEMA:
    """`model` is the averaged copy, in eval mode, without gradients.

    The decay grows as decay * (1 - exp(-step / warm_up_steps)), so that the random start is soon forgotten. Integer
    buffers (counters) are copied. Build it before the first mini-batch is announced, while norms hold no history.
    """

    def __init__(self, model: Network, *, decay: float, warm_up_steps: int = 100) -> None:
        self.model = copy.deepcopy(model)
        self.model.eval().requires_grad_(False)
        self.decay, self.warm_up_steps = decay, warm_up_steps

    @torch.no_grad()
    def update(self, model: Network, *, step: int) -> None:
        """Average in the weights after optimizer step number `step` (from 1)."""
        decay = self.decay * (1 - math.exp(-step / max(1, self.warm_up_steps)))
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
