"""The norms by name. One entry a norm; a new norm is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.norms.bn import FrozenBatchNorm, PooledBatchNorm
from models.norms.brn import BatchRenorm
from models.norms.cbn import CBN_GRADIENTS, ESTIMATORS, CrossIterationBatchNorm, WindowGrowth
from models.norms.cbn_lite import CrossIterationBatchNormLite
from models.norms.cmbn import (
    CrossMiniBatchNorm,
    CrossMiniBatchNormR,
    CrossMiniBatchNormW,
    DarknetCrossMiniBatchNorm,
)
from models.norms.cmbn_carried import CarriedCrossMiniBatchNorm
from models.norms.kind import NormKind, of_average, of_batch, of_mini_batch, of_running_average, of_window
from models.norms.mabn import MovingAverageNorm
from models.norms.weight_centralization import CentralizedConv2d
from utils.errors import UserError
from utils.knob import knob

CMBN_GRADIENTS = ("weights", "share", "renorm", "darknet")
AUTO = "auto"  # no norm, but the choice of one: see auto.py


@dataclass(frozen=True, kw_only=True, slots=True)
class NormOptions:
    """Everything a norm can be told. A knob that the chosen norm does not read is refused, not ignored."""

    norm: str = knob(
        "bn",
        "normalization layer of every conv-norm-activation block; auto: by the images in a forward (cfg: "
        "batch_normalize=2 is cmbn; --weights: theirs)",
        choices=lambda: (*NORMS, AUTO),
    )
    norm_gradient: str | None = knob(
        None,
        "cmbn and cbn (default weights), cbn-lite (default share): gradient through the pooled statistics",
        choices=CMBN_GRADIENTS,
    )
    norm_carry: bool | None = knob(
        None,
        "cmbn weights: the batch before stands in for the mini-batches still to come (default: a batch's first "
        "mini-batches have nobody)",
    )
    norm_window: int | None = knob(
        None,
        "cbn, cbn-lite: mini-batches in the window, the current one counted; 0 = subdivisions (default 4)",
        unit="MINI_BATCHES",
        low=0,
    )
    norm_estimator: str | None = knob(
        None, "cbn: how past statistics are brought to today's weights (default std)", choices=ESTIMATORS
    )
    norm_burn_in_steps: int | None = knob(
        None,
        "cbn, cbn-lite, brn, cmbn weights: optimizer steps of plain BN at the start of training (default 100; cmbn "
        "without norm_carry 0)",
        unit="STEPS",
        low=0,
    )
    norm_growth_steps: int | None = knob(
        None, "cbn, cbn-lite: steps in which the window grows after burn-in (default 0)", unit="STEPS", low=0
    )
    norm_refresh_steps: int | None = knob(
        None, "cbn-lite: steps between two measurements of the patch covariance (default 4)", unit="STEPS", low=1
    )
    norm_positions: int | None = knob(
        None,
        "cmbn weights, cbn, cbn-lite: positions a patch covariance is taken from, 0 = all (default 256)",
        unit="POSITIONS",
        low=0,
    )
    norm_average_images: float | None = knob(
        None, "mabn: images its statistics are averaged over (default 16)", unit="IMAGES", low=1
    )
    norm_r_max: float | None = knob(None, "brn: largest ratio to the running deviation (default 3)", low=1)
    norm_d_max: float | None = knob(None, "brn: largest shift, in running deviations (default 5)", low=0)
    norm_ramp_steps: int | None = knob(
        None, "brn: steps in which the limits open after burn-in (default 400)", unit="STEPS", low=0
    )
    norm_groups: int | None = knob(
        None, "gn: groups; a layer falls back to the largest divisor of its channels (default 32)", low=1
    )
    norm_running: str | None = knob(
        None,
        "bn: running statistics as torch averages them, or pooled over each batch (default ema)",
        choices=("ema", "pooled"),
    )
    norm_sync: bool | None = knob(None, "cmbn, cbn: pool statistics over the ranks of a torchrun job too")
    norm_eps: float = knob(1e-5, "added to the variance, inside the root", low=1e-12, high=1)
    norm_momentum: float | None = knob(
        None, "rate of the running statistics, as in nn.BatchNorm2d (default 0.1; cmbn darknet 0.01)", low=0, high=1
    )
    weight_centralization: bool | None = knob(
        None, "take each filter's mean out of the convolutions that have a norm (default: with mabn)"
    )
    norm_freeze_affine: bool = knob(False, "gamma and beta stay as they start")
    norm_eval: bool | None = knob(
        None, "normalize by the running statistics from the first step on, and keep them (use with --weights)"
    )
    norm_freeze_after: float | None = knob(
        None,
        "from this fraction of training on, normalize by the running statistics and keep them (default 1: never)",
        unit="FRACTION",
        low=0,
        high=1,
    )
    precise_bn: int | None = knob(
        None,
        "training images that give the best weights exact statistics in the end (default 0: running averages)",
        unit="IMAGES",
        low=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NormFactory:
    """conv -> its norm (None: a bias instead)."""

    options: NormOptions

    @property
    def conv_class(self) -> type[nn.Conv2d]:
        """Of the convolutions to be normalized."""
        return CentralizedConv2d if self.options.weight_centralization else nn.Conv2d

    def __call__(self, conv: nn.Conv2d) -> nn.Module | None:
        norm = NORMS[self.options.norm].make(conv, self.options)
        if norm is not None and self.options.norm_freeze_affine:
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
        return norm


def norm_factory(options: NormOptions) -> NormFactory:
    """Raises as `resolve_norm`."""
    return NormFactory(options=resolve_norm(options))


def _rates(options: NormOptions) -> dict[str, Any]:
    return {"eps": options.norm_eps, "momentum": options.norm_momentum}


def _patch_shape(conv: nn.Conv2d) -> tuple[int, int]:
    """(groups, numbers in a patch) of the convolution."""
    return conv.groups, conv.weight[0].numel()


def _bn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    kind = PooledBatchNorm if options.norm_running == "pooled" else nn.BatchNorm2d
    return kind(conv.out_channels, **_rates(options))


def _cmbn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    if options.norm_gradient == "weights":
        kind = CarriedCrossMiniBatchNorm if options.norm_carry else CrossMiniBatchNormW
        return kind(
            conv.out_channels,
            patch_shape=_patch_shape(conv),
            positions=options.norm_positions,
            burn_in_steps=options.norm_burn_in_steps,
            sync=options.norm_sync,
            **_rates(options),
        )
    if options.norm_gradient == "share":
        return CrossMiniBatchNorm(conv.out_channels, sync=options.norm_sync, **_rates(options))
    if options.norm_gradient == "renorm":
        return CrossMiniBatchNormR(conv.out_channels, **_rates(options))
    return DarknetCrossMiniBatchNorm(conv.out_channels, **_rates(options))


def _windowed(conv: nn.Conv2d, options: NormOptions) -> dict[str, Any]:
    return {
        "patch_shape": _patch_shape(conv),
        "window": options.norm_window,
        "growth": WindowGrowth(burn_in_steps=options.norm_burn_in_steps, growth_steps=options.norm_growth_steps),
        "positions": options.norm_positions,
        "gradient": options.norm_gradient,
        "sync": options.norm_sync,
        **_rates(options),
    }


def _cbn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return CrossIterationBatchNorm(conv.out_channels, estimator=options.norm_estimator, **_windowed(conv, options))


def _cbn_lite(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return CrossIterationBatchNormLite(
        conv.out_channels, refresh_steps=options.norm_refresh_steps, **_windowed(conv, options)
    )


def _mabn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return MovingAverageNorm(conv.out_channels, average_images=options.norm_average_images, **_rates(options))


def _brn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return BatchRenorm(
        conv.out_channels,
        r_max=options.norm_r_max,
        d_max=options.norm_d_max,
        burn_in_steps=options.norm_burn_in_steps,
        ramp_steps=options.norm_ramp_steps,
        **_rates(options),
    )


def _gn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    """Group norm (Wu & He 2018): the same at every mini-batch size."""
    groups = largest_divisor(conv.out_channels, at_most=options.norm_groups)
    return nn.GroupNorm(groups, conv.out_channels, eps=options.norm_eps)


def _ln(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    """Layer norm over channels and positions of an image: one group (Wu & He 2018, section 3.1)."""
    return nn.GroupNorm(1, conv.out_channels, eps=options.norm_eps)


def _in(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    """Instance norm: a channel a group; with nn.BatchNorm2d's keys for the affine part, as the others have."""
    return nn.GroupNorm(conv.out_channels, conv.out_channels, eps=options.norm_eps)


def _frozen(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return FrozenBatchNorm(conv.out_channels, eps=options.norm_eps)


def _syncbn(conv: nn.Conv2d, options: NormOptions) -> nn.Module:
    return PooledBatchNorm(conv.out_channels, sync=True, **_rates(options))


def _none(conv: nn.Conv2d, options: NormOptions) -> None:
    """No norm: the block's convolution gets a bias instead."""


_STATISTICS = {"norm_momentum": 0.1, "precise_bn": 0, "norm_eval": False, "norm_freeze_after": 1.0}
_BURN_IN_STEPS = 100
_WINDOW = {
    "norm_window": 4,
    "norm_burn_in_steps": _BURN_IN_STEPS,
    "norm_growth_steps": 0,
    "norm_positions": 256,
    "norm_sync": False,
    **_STATISTICS,
}


NORMS: dict[str, NormKind] = {
    "bn": NormKind(make=_bn, knobs={"norm_running": "ema", **_STATISTICS}, images=of_mini_batch),
    "cmbn": NormKind(
        make=_cmbn,
        knobs={
            "norm_gradient": "weights",
            "norm_carry": False,
            "norm_burn_in_steps": 0,
            "norm_sync": False,
            "norm_positions": 256,
            **_STATISTICS,
        },
        gradients=CMBN_GRADIENTS,
        images=of_batch,
    ),
    "cbn": NormKind(
        make=_cbn,
        knobs={"norm_gradient": "weights", "norm_estimator": "std", **_WINDOW},
        gradients=CBN_GRADIENTS,
        images=of_window,
    ),
    "cbn-lite": NormKind(
        make=_cbn_lite,
        knobs={"norm_gradient": "share", "norm_refresh_steps": 4, **_WINDOW},
        gradients=[gradient for gradient in CBN_GRADIENTS if gradient != "weights"],
        images=of_window,
    ),
    "mabn": NormKind(make=_mabn, knobs={"norm_average_images": 16.0, **_STATISTICS}, images=of_average),
    "brn": NormKind(
        make=_brn,
        knobs={
            "norm_r_max": 3.0,
            "norm_d_max": 5.0,
            "norm_burn_in_steps": _BURN_IN_STEPS,
            "norm_ramp_steps": 400,
            **_STATISTICS,
        },
        images=of_running_average,
    ),
    "gn": NormKind(make=_gn, knobs={"norm_groups": 32}),
    "ln": NormKind(make=_ln),
    "in": NormKind(make=_in),
    "frozen": NormKind(make=_frozen, knobs={"precise_bn": 0}, words="running statistics, which stay"),
    "syncbn": NormKind(make=_syncbn, knobs=_STATISTICS, images=of_mini_batch),
    "none": NormKind(make=_none, words="no statistics"),
}

_KNOBS = {**{name: kind.knobs for name, kind in NORMS.items()}, AUTO: _STATISTICS}


def resolve_norm(options: NormOptions) -> NormOptions:
    """Options with the chosen norm's defaults filled in. UserError for an unknown norm or a knob it ignores."""
    norm, gradient = options.norm, options.norm_gradient
    if norm not in (*NORMS, AUTO):
        raise UserError(f"unknown norm '{norm}': choose one of {', '.join((*NORMS, AUTO))}")
    own = dict(_KNOBS[norm])
    if norm == "cmbn" and gradient not in (None, "weights"):
        del own["norm_positions"], own["norm_carry"], own["norm_burn_in_steps"]
        if gradient != "share":
            del own["norm_sync"]
        if gradient == "darknet":
            own["norm_momentum"] = 0.01
    elif norm == "cmbn" and options.norm_carry:
        own["norm_burn_in_steps"] = _BURN_IN_STEPS  # its history, too, is of other weights
    if norm == "cbn" and options.norm_estimator == "none":
        own["norm_gradient"] = "share"  # nothing tells how the past moves with the weights
    if norm == "cbn-lite" and gradient == "weights":
        raise UserError("--norm-gradient weights needs every mini-batch's own covariance: use --norm cbn")
    gradients = NORMS[norm].gradients if norm in NORMS else ()
    if gradients and gradient not in (None, *gradients):
        raise UserError(f"--norm-gradient of {norm} is one of {', '.join(gradients)}, not {gradient}")
    if norm == "cbn" and gradient == "weights" and options.norm_estimator == "none":
        raise UserError("--norm-gradient weights follows the compensation, which --norm-estimator none leaves out")
    if options.norm_eval and options.norm_freeze_after not in (None, 1.0):
        raise UserError("--norm-eval freezes the statistics from the start: --norm-freeze-after has nothing to add")
    for knob_name in sorted({each for knobs in _KNOBS.values() for each in knobs} - own.keys()):
        # A checkpoint's settings name every knob; what was resolved once resolves to itself.
        if getattr(options, knob_name) is not None:
            readers = ", ".join(reader for reader, knobs in _KNOBS.items() if knob_name in knobs)
            flag = "--" + knob_name.replace("_", "-")
            chosen = f"--norm {norm}" + (f" --norm-gradient {gradient}" if norm == "cmbn" and gradient else "")
            raise UserError(f"{flag} is read by {readers}, not by {chosen}")
    if norm == "none":
        for shared in ("norm_eps", "norm_freeze_affine", "weight_centralization"):
            if getattr(options, shared) not in (None, NormOptions.__dataclass_fields__[shared].default, False):
                raise UserError(f"--{shared.replace('_', '-')} is about a norm, and --norm none is not one")
    own["weight_centralization"] = norm == "mabn"
    return replace(options, **{name: value for name, value in own.items() if getattr(options, name) is None})


def norm_of_weights(stored: Mapping[str, Any], chosen: str | None) -> dict[str, Any]:
    """What trained weights say of the norm that goes on with them, by field name; `chosen` may be another norm.

    Without these they would be another function: how convolutions see their weights, what is added to variances,
    and the groups of group norm. How a training pools or treats statistics is not the weights' business.
    """
    if chosen == "none":
        return {}
    same = ("norm", "norm_groups") if chosen in (None, stored["norm"]) else ()
    return {name: stored[name] for name in ("weight_centralization", "norm_eps", *same) if stored.get(name) is not None}


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is <= at_most (at least 1)."""
    return next(d for d in range(min(number, max(at_most, 1)), 0, -1) if number % d == 0)


def has_batch_statistics(norm: nn.Module) -> bool:
    """Whether the norm has running statistics, of batches of its own or of the network it was loaded from."""
    return hasattr(norm, "running_mean")
