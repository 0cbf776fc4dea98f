"""When norms normalize by the mini-batches' statistics, and when by the running ones.

Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 4: training and inference can be made consistent from either
side, by training the last part with the running statistics, or by using a mini-batch's own in inference.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.norms.options import NormOptions
from models.norms.running_stats import has_running_statistics, norms_with_statistics, use_mini_batch


class StatisticsFreeze:
    """Switch of a training's norms from the mini-batches' statistics to the running ones, at a step of its own.

    In eval mode they use their running statistics, which then stay; the trainer announces no mini-batches to them.
    Norms that are in eval mode to begin with, because their layer is frozen (`models/freeze.py`), stay there. There is
    no state to save: the step decides. total_steps: may be changed on the way.
    """

    def __init__(self, network: nn.Module, options: NormOptions, total_steps: int) -> None:
        self.total_steps = total_steps
        self._norms = [norm for norm in network.modules() if has_running_statistics(norm) and norm.training]
        share = 1.0 if options.norm_freeze_after is None else options.norm_freeze_after
        self._share_by_batches = 0.0 if options.norm_eval else share

    def set_mode(self, step: int) -> None:
        """Set the norms' mode before the batch of `step`: `network.train()` puts norms into training mode as well."""
        by_batches = step < self._share_by_batches * self.total_steps
        for norm in self._norms:
            if norm.training != by_batches:
                norm.train(by_batches)


def use_batch_statistics(network: nn.Module) -> None:
    """Let each norm normalize every mini-batch by its own statistics in eval mode, from now on.

    Detections then depend on batch mates. Overwrites the running statistics of this network. Raises UserError where
    there are none.
    """
    for norm in norms_with_statistics(network).values():
        norm.register_forward_pre_hook(_use_input)


def _use_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    use_mini_batch(norm, inputs[0])
