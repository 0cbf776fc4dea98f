"""How many images are behind the statistics a norm trains with: its effective norm batch, per GPU.

Wu & He 2018, figure 1: with fewer than about 8, batch norm's error rises steeply.
"""

from __future__ import annotations

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.norms.options import NormOptions
from models.norms.spec import Cut
from utils.console import counted
from utils.errors import UserError

FEW = 8


def effective_images(options: NormOptions, *, mini_batch: int, subdivisions: int) -> int | None:
    """Return the images in the statistics that normalize a mini-batch, where they are pooled the most.

    Batch renormalization aims at its running average. None: no mini-batch's statistics are used in training.
    options: resolved. mini_batch: images in each of a batch's `subdivisions` mini-batches.
    """
    if not options.spec.has_batch_statistics or options.never_measures:
        return None
    cut = Cut(mini_batch=mini_batch, subdivisions=subdivisions)
    return round(options.spec.images(cut, momentum=options.norm_momentum or 0))


def describe_norm(options: NormOptions, *, mini_batch: int, subdivisions: int) -> str:
    """Return such as "cmbn:carry: mini-batches of 2 images, statistics of up to 16; gradient ..."."""
    spec = options.spec
    text = f"{options.norm}: mini-batches of {counted(mini_batch, 'image')}"
    images = effective_images(options, mini_batch=mini_batch, subdivisions=subdivisions)
    if images is not None:
        return f"{text}, statistics of {'up to ' * spec.pools}{images}" + (f"; {spec.remark}" if spec.remark else "")
    return f"{text}, {'running statistics, which stay' if options.never_measures else spec.summary}"


def norm_warnings(
    options: NormOptions, *, mini_batch: int, subdivisions: int, from_scratch: bool, few: int = FEW
) -> list[str]:
    """Return a line where fewer than `few` images are behind the statistics, and one where there are none."""
    warnings = []
    spec, images = options.spec, effective_images(options, mini_batch=mini_batch, subdivisions=subdivisions)
    if images is not None and images < few:
        remedies = ["--norm gn needs none"]
        if hasattr(spec, "window"):
            remedies.insert(0, "a larger window pools more")
        else:
            remedies.insert(0, "--norm cbn pools a window of past mini-batches")
        if subdivisions > 1 and not spec.pools:
            remedies.insert(0, f"--norm cmbn pools the batch's {mini_batch * subdivisions}")
        warnings.append(
            f"{options.norm} normalizes by the statistics of {counted(images, 'image')}, fewer than {few}: "
            + ", ".join(remedies)
        )
    if options.never_measures and from_scratch:
        warnings.append("running statistics stay at mean 0 and variance 1: this is meant for a start from --weights")
    return warnings


def burn_in_warnings(options: NormOptions, plan: Plan, total_steps: int) -> list[str]:
    """Return a line for each norm that would not begin before the end of the training."""
    return [
        f"burn_in_steps={spec.burn_in} is the whole training: {spec} is plain batch norm here"
        for spec in options.specs(plan)
        if spec.burn_in >= total_steps
    ]


def check_values(plan: Plan, options: NormOptions, *, mini_batch: int) -> None:
    """Raise UserError where a norm would take the variance of a single value, which has none.

    Also for norms that pool: the first mini-batch of a batch, and the steps of burn-in, have only their own. And for
    groups of one channel, which torch refuses.
    mini_batch: images in the smallest one; plan: at the smallest input of the training.
    """
    for node in plan.nodes:
        if not isinstance(node.spec, ConvSpec) or not node.spec.batch_normalize:
            continue
        own, (channels, height, width) = options.of_layer(plan, node), node.shape
        spec = own.spec
        if not own.never_measures and spec.values_per_statistic(channels, height * width, mini_batch=mini_batch) == 1:
            remedy = "fewer --subdivisions, " if spec.has_batch_statistics else ""
            raise UserError(
                f"{plan.path}:{node.line}: layer {node.index} has one value per channel in one image at "
                f"{plan.net.height}x{plan.net.width} px, and {spec} cannot normalize one value: take {remedy}"
                "a larger --image-size or --norm ln"
            )
