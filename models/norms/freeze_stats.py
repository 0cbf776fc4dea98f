"""Which statistics norms normalize by, and when: the mini-batches' or the running ones.

Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 4: what differs between training and inference can be
made the same from either side, by training the last part with the statistics that the network will be used with, or
by a mini-batch's own in inference.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.norms.running_stats import adopt_mini_batch, norms_with_statistics
from models.norms.table import NormOptions, has_batch_statistics


class NormRegime:
    """Keeps the batch-statistics norms of a training in the mode they shall be in: no flag to store or to resume.

    In eval mode they use their running statistics, which stay; nobody announces mini-batches to them. Those that are
    in eval mode to begin with, because their layer is frozen (`models/freeze.py`), are left there.
    """

    def __init__(self, network: nn.Module, options: NormOptions, total_steps: int) -> None:
        self._norms = [norm for norm in network.modules() if has_batch_statistics(norm) and norm.training]
        fraction = 1.0 if options.norm_freeze_after is None else options.norm_freeze_after
        self._frozen_from_step = 0.0 if options.norm_eval else fraction * total_steps

    def prepare(self, step: int) -> None:
        """Before each batch, because `network.train()` puts norms into training mode as well."""
        by_batches = step < self._frozen_from_step
        for norm in self._norms:
            if norm.training != by_batches:
                norm.train(by_batches)


def use_batch_statistics(network: nn.Module) -> None:
    """From now on, in eval mode: each norm normalizes every mini-batch by its own statistics.

    Detections then depend on batch mates. The running statistics are overwritten, on this copy of the network.
    UserError for a network without batch statistics.
    """
    for norm in norms_with_statistics(network).values():
        norm.register_forward_pre_hook(_adopt_input)


def _adopt_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    adopt_mini_batch(norm, inputs[0])
