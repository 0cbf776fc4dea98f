"""How many images stand behind the statistics a norm trains with: its effective norm batch, per GPU.

Wu & He 2018, figure 1: with fewer than about 8, batch norm's error rises steeply.
"""

from __future__ import annotations

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.norms.table import NORMS, NormOptions, largest_divisor
from utils.errors import UserError

FEW = 8


def effective_images(options: NormOptions, *, mini_batch: int, subdivisions: int) -> int | None:
    """Images in the statistics that normalize a mini-batch, where they are pooled the most they can be.

    Batch renormalization aims at its running average. None: no mini-batch's statistics are used in training.
    options: resolved. mini_batch: images in each of a batch's `subdivisions` mini-batches.
    """
    images = NORMS[options.norm].images
    return None if images is None or never_measures(options) else round(images(options, mini_batch, subdivisions))


def describe_norm(options: NormOptions, *, mini_batch: int, subdivisions: int) -> str:
    """cmbn (weights): mini-batches of 2 images, statistics of up to 16"""
    how = ", ".join(filter(None, (options.norm_gradient, "carried" if options.norm_carry else None)))
    name = options.norm + (f" ({how})" if how else "")
    parts = f"{name}: mini-batches of {said_images(mini_batch)}"
    images = effective_images(options, mini_batch=mini_batch, subdivisions=subdivisions)
    if images is None:
        return f"{parts}, {NORMS['frozen' if never_measures(options) else options.norm].words}"
    return f"{parts}, statistics of {'' if sees_only_its_mini_batch(options) else 'up to '}{images}"


def norm_warnings(
    options: NormOptions, *, mini_batch: int, subdivisions: int, from_scratch: bool, few: int = FEW
) -> list[str]:
    """A line where statistics are of fewer than `few` images, with the remedies; and one where they are of none."""
    warnings = []
    images = effective_images(options, mini_batch=mini_batch, subdivisions=subdivisions)
    if images is not None and images < few:
        remedies = []
        if subdivisions > 1 and sees_only_its_mini_batch(options):
            remedies.append(f"--norm cmbn pools the batch's {mini_batch * subdivisions}")
        if options.norm_window is None:
            remedies.append("--norm cbn a window of past mini-batches")
        else:
            remedies.append("a larger --norm-window pools more")
        remedies.append("--norm gn needs none")
        warnings.append(
            f"{options.norm} normalizes by the statistics of {said_images(images)}, fewer than {few}: "
            + ", ".join(remedies)
        )
    if never_measures(options) and from_scratch:
        warnings.append("running statistics stay at mean 0 and variance 1: this is meant for a start from --weights")
    return warnings


def check_values(plan: Plan, options: NormOptions, *, mini_batch: int) -> None:
    """UserError where a norm would take the variance of a single value, which has none.

    Also for norms that pool: the first mini-batch of a batch, and the steps of burn-in, have only their own. And for
    groups of one channel, which torch refuses.
    mini_batch: images in the smallest; the plan: at the smallest input of the training.
    """
    if options.norm in ("ln", "mabn", "none") or never_measures(options):
        return
    is_by_image = options.norm in ("gn", "in")
    images = 1 if is_by_image else mini_batch  # normalized together
    remedy = "" if is_by_image else "fewer --subdivisions, "
    for node in plan.nodes:
        if not isinstance(node.spec, ConvSpec) or not node.spec.batch_normalize:
            continue
        channels, height, width = node.shape
        together = channels // largest_divisor(channels, at_most=options.norm_groups) if options.norm_groups else 1
        if images * height * width * together == 1:
            raise UserError(
                f"{plan.path}:{node.line}: layer {node.index} has one value per channel in one image "
                f"at {plan.net.height}x{plan.net.width} px, and {options.norm} cannot normalize one value: take "
                f"{remedy}a larger --image-size or --norm ln"
            )


def sees_only_its_mini_batch(options: NormOptions) -> bool:
    """Whether nothing but the mini-batch at hand normalizes it in training. Several GPUs are not looked at."""
    return NORMS[options.norm].sees_only_its_mini_batch and not never_measures(options)


def never_measures(options: NormOptions) -> bool:
    """Whether running statistics are used from the first step on, and stay as they are."""
    return options.norm == "frozen" or options.norm_eval or options.norm_freeze_after == 0


def said_images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
