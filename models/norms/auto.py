"""`--norm auto`: the choice by the images in a forward that measurements support.

docs/small-batch.md has them, from scratch and from weights.
"""

from __future__ import annotations

from dataclasses import replace

from cfg.plan import Plan
from models.norms.options import NormOptions, resolve_norm
from models.norms.table import AUTO
from utils.console import counted


def enough_images(*, from_weights: bool) -> int:
    """Return the images in a forward from which on CmBN-W gained nothing over batch norm, but took time."""
    return 2 if from_weights else 4


def choose_norm(
    options: NormOptions, *, mini_batch: int, forwards: int, from_weights: bool, plan: Plan | None = None
) -> tuple[NormOptions, str]:
    """Return the resolved options and, for `auto`, a sentence with the choice and its reason. Raises as `resolve_norm`.

    mini_batch: images in a forward on one GPU. forwards: of a batch; one alone has nothing that CmBN could pool.
    from_weights: whether the training starts from trained ones. plan: of the network, whose cfg may have own norms.
    """
    asked = resolve_norm(options, plan)  # first, so that unused settings are refused in terms of what was typed
    if asked.norm != AUTO:
        return asked, ""
    images = f"{counted(mini_batch, 'image')} in a forward"
    enough = enough_images(from_weights=from_weights)
    if mini_batch >= enough:
        return resolve_norm(replace(options, norm="bn"), plan), f"bn, because {images} are enough for it"
    norm = "cmbn:carry" if forwards > 1 else "cbn"
    reason = f"{norm}, because {images} {'is' if mini_batch == 1 else 'are'} fewer than {enough}"
    reason += "" if forwards > 1 else ", and a batch has no other forward"
    return resolve_norm(replace(options, norm=norm), plan), reason
