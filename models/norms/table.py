"""The norms by name. One entry a norm; a new norm is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.norms.cbn import CrossIterationBatchNorm
from models.norms.cmbn import CrossMiniBatchNorm, CrossMiniBatchNormW
from utils.errors import UserError
from utils.knob import knob

CMBN_GRADIENTS = ("weights", "share")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormOptions:
    """Everything a norm can be told. A knob that the chosen norm does not read is refused, not ignored."""

    norm: str = knob("bn", "normalisation layer of every conv-norm-activation block", choices=lambda: tuple(NORMS))
    norm_gradient: str | None = knob(
        None,
        "cmbn: gradient through the pooled statistics (default weights)",
        choices=CMBN_GRADIENTS,
    )
    norm_window: int | None = knob(
        None, "cbn: mini-batches in the window, the current one counted (default 4)", unit="MINI_BATCHES", low=1
    )
    norm_burn_in_steps: int | None = knob(
        None, "cbn: optimizer steps of plain BN before the window is trusted (default 100)", unit="STEPS", low=0
    )
    norm_groups: int | None = knob(
        None, "gn: groups; a layer falls back to the largest divisor of its channels (default 32)", low=1
    )
    norm_eps: float = knob(1e-5, "added to the variance, inside the root", low=1e-12, high=1)
    norm_momentum: float = knob(0.1, "rate of the running statistics, as in nn.BatchNorm2d", low=0, high=1)


NormFactory = Callable[[nn.Conv2d], nn.Module | None]


def _patch_shape(conv: nn.Conv2d) -> tuple[int, int]:
    """(groups, numbers in a patch) of the convolution."""
    return conv.groups, conv.weight[0].numel()


def _bn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    """Stock batch norm (Ioffe & Szegedy 2015): the baseline must be the real one."""
    return nn.BatchNorm2d(conv.out_channels, eps=options.norm_eps, momentum=options.norm_momentum)


def _cmbn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    rates = {"eps": options.norm_eps, "momentum": options.norm_momentum}
    if options.norm_gradient == "share":
        return CrossMiniBatchNorm(conv.out_channels, **rates)
    return CrossMiniBatchNormW(conv.out_channels, patch_shape=_patch_shape(conv), **rates)


def _cbn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    assert options.norm_window is not None and options.norm_burn_in_steps is not None
    return CrossIterationBatchNorm(
        conv.out_channels,
        patch_shape=_patch_shape(conv),
        window=options.norm_window,
        burn_in_steps=options.norm_burn_in_steps,
        eps=options.norm_eps,
        momentum=options.norm_momentum,
    )


def _gn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    """Group norm (Wu & He 2018): the same at every mini-batch size."""
    assert options.norm_groups is not None
    groups = largest_divisor(conv.out_channels, at_most=options.norm_groups)
    return nn.GroupNorm(groups, conv.out_channels, eps=options.norm_eps)


def _none(conv: nn.Conv2d, options: NormOptions) -> None:
    """No norm: the block's convolution gets a bias instead."""


NORMS: dict[str, Callable[[nn.Conv2d, NormOptions], nn.Module | None]] = {
    "bn": _bn,
    "cmbn": _cmbn,
    "cbn": _cbn,
    "gn": _gn,
    "none": _none,
}

# The knobs that only some norms read, with their defaults there.
_OWN_KNOBS: dict[str, dict[str, Any]] = {
    "cmbn": {"norm_gradient": "weights"},
    "cbn": {"norm_window": 4, "norm_burn_in_steps": 100},
    "gn": {"norm_groups": 32},
}


def resolve_norm(options: NormOptions) -> NormOptions:
    """Options with the chosen norm's defaults filled in. UserError for an unknown norm or a knob it ignores."""
    if options.norm not in NORMS:
        raise UserError(f"unknown norm '{options.norm}': choose one of {', '.join(NORMS)}")
    own = _OWN_KNOBS.get(options.norm, {})
    for reader, knobs in _OWN_KNOBS.items():
        for field in knobs.keys() - own.keys():
            if getattr(options, field) is not None:
                flag = "--" + field.replace("_", "-")
                raise UserError(f"{flag} is read by {reader}, not by --norm {options.norm}")
    return replace(options, **{field: value for field, value in own.items() if getattr(options, field) is None})


def norm_factory(options: NormOptions) -> NormFactory:
    """conv -> its norm (None: a bias instead). Raises as `resolve_norm`."""
    settled = resolve_norm(options)
    make = NORMS[settled.norm]
    return lambda conv: make(conv, settled)


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is <= at_most (at least 1)."""
    return next(d for d in range(min(number, max(at_most, 1)), 0, -1) if number % d == 0)
