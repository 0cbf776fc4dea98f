"""`--norm auto`: what the small-batch study found best for the images a forward holds (docs/small-batch.md)."""

from __future__ import annotations

from dataclasses import replace

from models.norms.effective_batch import said_images
from models.norms.table import AUTO, NormOptions, resolve_norm

ENOUGH = 4  # images in a forward, from which on CmBN-W gained nothing over batch norm in the study, but took time


def choose_norm(options: NormOptions, *, mini_batch: int) -> tuple[NormOptions, str]:
    """Resolved options, and for `auto` what was chosen and why, in a sentence; raises as `resolve_norm`.

    mini_batch: images in a forward on one GPU.
    """
    asked = resolve_norm(options)  # first, so that what nobody reads is refused in terms of what was typed
    if asked.norm != AUTO:
        return asked, ""
    images = f"{said_images(mini_batch)} in a forward"
    if mini_batch >= ENOUGH:
        return resolve_norm(replace(options, norm="bn")), f"bn, because {images} are enough for it"
    chosen = resolve_norm(replace(options, norm="cmbn", norm_carry=True))
    return chosen, f"cmbn --norm-carry, because {images} {'is' if mini_batch == 1 else 'are'} fewer than {ENOUGH}"
