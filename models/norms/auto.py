"""`--norm auto`: the choice by the images in a forward that the small-batch study supports (docs/small-batch.md)."""

from __future__ import annotations

from dataclasses import replace

from cfg.plan import Plan
from models.norms.options import NormOptions, resolve_norm
from models.norms.table import AUTO
from utils.console import counted

ENOUGH = 4  # images in a forward, from which on CmBN-W gained nothing over batch norm in the study, but took time


def choose_norm(
    options: NormOptions, *, mini_batch: int, forwards: int, plan: Plan | None = None
) -> tuple[NormOptions, str]:
    """Return the resolved options and, for `auto`, a sentence with the choice and its reason. Raises as `resolve_norm`.

    mini_batch: images in a forward on one GPU. forwards: of a batch; one alone has nothing that CmBN could pool.
    plan: of the network, whose cfg may have norms of its own.
    """
    asked = resolve_norm(options, plan)  # first, so that unused settings are refused in terms of what was typed
    if asked.norm != AUTO:
        return asked, ""
    images = f"{counted(mini_batch, 'image')} in a forward"
    if mini_batch >= ENOUGH:
        return resolve_norm(replace(options, norm="bn"), plan), f"bn, because {images} are enough for it"
    norm = "cmbn:carry" if forwards > 1 else "cbn"
    reason = f"{norm}, because {images} {'is' if mini_batch == 1 else 'are'} fewer than {ENOUGH}"
    reason += "" if forwards > 1 else ", and a batch has no other forward"
    return resolve_norm(replace(options, norm=norm), plan), reason
