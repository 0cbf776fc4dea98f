"""`--norm auto`: the choice by the images in a forward that the small-batch study supports (docs/small-batch.md)."""

from __future__ import annotations

from dataclasses import replace

from models.norms.effective_batch import count_images
from models.norms.table import AUTO, NormOptions, resolve_norm

ENOUGH = 4  # images in a forward, from which on CmBN-W gained nothing over batch norm in the study, but took time


def choose_norm(options: NormOptions, *, mini_batch: int) -> tuple[NormOptions, str]:
    """Return the resolved options and, for `auto`, a sentence with the choice and its reason. Raises as `resolve_norm`.

    mini_batch: images in a forward on one GPU.
    """
    asked = resolve_norm(options)  # first, so that unused settings are refused in terms of what was typed
    if asked.norm != AUTO:
        return asked, ""
    images = f"{count_images(mini_batch)} in a forward"
    if mini_batch >= ENOUGH:
        return resolve_norm(replace(options, norm="bn")), f"bn, because {images} are enough for it"
    chosen = resolve_norm(replace(options, norm="cmbn:carry"))
    return chosen, f"cmbn:carry, because {images} {'is' if mini_batch == 1 else 'are'} fewer than {ENOUGH}"
