"""Which norms a network has: what is typed of them, what a checkpoint stores, and what trained weights fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cfg.backbone import backbone_layers
from cfg.convolution import ConvSpec
from cfg.plan import Node, Plan
from models.norms.old_spelling import respelled
from models.norms.spec import NormSpec
from models.norms.table import AUTO, checked_norm, checked_part, options_in, parse_norm
from utils.errors import UserError
from utils.flags import flag_of
from utils.knob import check_limits, knob


@dataclass(frozen=True, kw_only=True, slots=True)
class NormOptions:
    """Which norms, and what is common to all norms. A setting that none of them uses is refused.

    Resolved options may leave norm_momentum and weight_centralization at None: the norms have different defaults then,
    and each layer has that of its own (`of_layer`).
    """

    norm: str = knob(
        "bn",
        "normalization layer of every conv-norm-activation block, with its options, such as cmbn:carry or gn:groups=8; "
        "auto: chosen by the images in a forward (default, unless --weights of another norm than bn, a cfg with "
        "batch_normalize=2, which is cmbn, or --loss darknet decide); help: lists all",
        unit="NAME[:OPTION[=VALUE],...]",
        parse=checked_norm,
    )
    norm_heads: str | None = knob(
        None,
        "norm of neck and heads, where --norm is that of the backbone; a layer's norm= in the cfg goes before both",
        unit="NAME[:OPTION[=VALUE],...]",
        parse=checked_part,
    )
    norm_eps: float = knob(1e-5, "added to the variance, inside the root", low=1e-12, high=1)
    norm_momentum: float | None = knob(
        None,
        "rate of the running statistics, as in nn.BatchNorm2d (default 0.1; cmbn:gradient=darknet 0.01)",
        low=0,
        high=1,
    )
    weight_centralization: bool | None = knob(
        None, "subtract each filter's mean in the convolutions that have a norm (default: with mabn)"
    )
    domain_statistics: str = knob(
        "shared",
        "with several --data: own = each normalizes by statistics of its own images, in training and afterwards",
        choices=("shared", "own"),
    )
    domain_affine: str = knob(
        "shared", "with several --data: own = each has its gamma and beta", choices=("shared", "own")
    )
    norm_freeze_affine: bool = knob(False, "keep gamma and beta at their initial values")
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
    shuffle_bn: bool | None = knob(
        None,
        "with torchrun: shuffle a mini-batch's images among the ranks (where those of one are alike, as of one video)",
    )
    precise_bn: int | None = knob(
        None,
        "training images that give the best weights exact statistics in the end (default 0: running averages)",
        unit="IMAGES",
        low=0,
    )

    @property
    def spec(self) -> NormSpec:
        """The norm with its options. Raises UserError for `auto`, which choose_norm replaces."""
        return parse_norm(self.norm)

    def specs(self, plan: Plan | None = None) -> list[NormSpec]:
        """Return all norms of a network: those typed and those in the plan's cfg. `auto` counts as batch norm.

        Raises UserError for a bad norm in the cfg.
        """
        typed = [parse_norm("bn" if text == AUTO else text) for text in (self.norm, self.norm_heads) if text]
        in_cfg = [_in_cfg(plan, node) for node in plan.nodes] if plan is not None else []
        return list(dict.fromkeys([*typed, *filter(None, in_cfg)]))

    def of_layer(self, plan: Plan, node: Node) -> NormOptions:
        """Return the resolved options of one layer's norm, without what it does not use. self: resolved."""
        heads = self.norm_heads
        typed = heads if heads is not None and node.index >= backbone_layers(plan) else self.norm
        spec = _in_cfg(plan, node) or parse_norm(typed)
        unused: dict[str, Any] = {"shuffle_bn": None}  # of the whole network
        if not spec.has_batch_statistics:
            unused |= dict.fromkeys(("norm_momentum", "norm_eval", "norm_freeze_after"))
            unused["domain_statistics"] = "shared"
        if not spec.has_running_statistics:
            unused["precise_bn"] = None
        if not spec.normalizes:
            default = NormOptions(norm=str(spec))
            unused |= {name: getattr(default, name) for name in _OF_NORMS}
        return resolve_norm(replace(self, norm=str(spec), norm_heads=None, **unused))

    def for_training(self, total_steps: int) -> NormOptions:
        """Return the options with a burn-in that fits the training (`NormSpec.for_training`). self: resolved."""
        heads = self.norm_heads and str(parse_norm(self.norm_heads).for_training(total_steps))
        return replace(self, norm=str(self.spec.for_training(total_steps)), norm_heads=heads)

    @property
    def never_measures(self) -> bool:
        """Whether running statistics are used from the first step on, and stay as they are, in some part at least."""
        return any(spec.is_frozen for spec in self.specs()) or bool(self.norm_eval) or self.norm_freeze_after == 0


# Settings that a bias does not use.
_OF_NORMS = ("norm_eps", "domain_affine", "norm_freeze_affine", "weight_centralization")


def _in_cfg(plan: Plan, node: Node) -> NormSpec | None:
    """Return the norm that the cfg gives the layer; None without one."""
    if not isinstance(node.spec, ConvSpec) or not node.spec.norm:
        return None
    try:
        return parse_norm(node.spec.norm)
    except UserError as error:
        raise UserError(f"{plan.path}:{node.line}: norm={node.spec.norm}: {error}") from error


def resolve_norm(options: NormOptions, plan: Plan | None = None) -> NormOptions:
    """Return the options with the norms' defaults filled in. Raises UserError for a setting that none of them uses.

    plan: of the network, whose cfg may have norms of its own.
    """
    specs = options.specs(plan)
    if options.norm != AUTO:
        options = replace(options, norm=str(options.spec))
    if options.norm_heads is not None:
        heads = str(parse_norm(options.norm_heads))
        options = replace(options, norm_heads=None if heads == options.norm else heads)
    own: dict[str, Any] = {}
    if any(spec.has_batch_statistics for spec in specs):
        momentum = _common(spec.default_momentum for spec in specs if spec.has_batch_statistics)
        own |= {"norm_momentum": momentum, "norm_eval": False, "norm_freeze_after": 1.0, "shuffle_bn": False}
    if any(spec.has_running_statistics for spec in specs):
        own["precise_bn"] = 0
    typed = options.norm if options.norm_heads is None else f"{options.norm} --norm-heads {options.norm_heads}"
    for name in ("norm_momentum", "norm_eval", "norm_freeze_after", "shuffle_bn", "precise_bn"):
        if name not in own and getattr(options, name) is not None:
            statistics = "running statistics" if name == "precise_bn" else "statistics of mini-batches"
            raise UserError(f"{flag_of(name)} is for norms with {statistics}, which --norm {typed} does not have")
    if options.domain_statistics == "own" and not any(spec.has_batch_statistics for spec in specs):
        raise UserError(
            f"--domain-statistics is for norms with statistics of mini-batches, which {typed} does not have"
        )
    if not any(spec.normalizes for spec in specs):
        for name in _OF_NORMS:
            if getattr(options, name) not in (None, False, NormOptions.__dataclass_fields__[name].default):
                raise UserError(f"{flag_of(name)} is about a norm, and --norm {typed} is not one")
    if options.norm_eval and options.norm_freeze_after not in (None, 1.0):
        raise UserError("--norm-eval freezes the statistics from the start: --norm-freeze-after has nothing to add")
    if options.shuffle_bn and all(spec.is_synchronized for spec in specs if spec.has_batch_statistics):
        raise UserError(f"--shuffle-bn has no purpose with --norm {typed}, which pools over all ranks")
    if options.weight_centralization and (standardized := next((spec for spec in specs if spec.ws), None)):
        raise UserError(f"--weight-centralization adds nothing to {standardized}, whose filters have no mean already")
    own["weight_centralization"] = _common(spec.centralizes_weights and not spec.ws for spec in specs)
    return replace(options, **{name: value for name, value in own.items() if getattr(options, name) is None})


def _common(defaults: Iterable[Any]) -> Any:
    """Return what all of them are; None where they differ."""
    found = set(defaults)
    return found.pop() if len(found) == 1 else None


def stored_norm(stored: Mapping[str, Any], plan: Plan | None = None) -> NormOptions:
    """Return the resolved options that a checkpoint's `norm` entry, of any version, spells. plan: as `resolve_norm`."""
    return resolve_norm(_options_of(stored), plan)


def _options_of(stored: Mapping[str, Any]) -> NormOptions:
    """Read a checkpoint's `norm` entry. Raises UserError for one that is not of this project's making."""
    try:
        options = NormOptions(**respelled(stored))
        check_limits(options)
        options.specs()  # raises what is wrong with them
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"a checkpoint's norm settings {dict(stored)} are not understood ({error})") from error
    return options


def norm_of_weights(stored: Mapping[str, Any], chosen: str | None, heads: str | None = None) -> dict[str, Any]:
    """Return the norms that continue with trained weights, and what else they fix about them, by field name.

    Otherwise they would compute another function: how convolutions use their weights, what is added to variances, and
    the norm's `weight_options`, where they were not typed. How a training pools or freezes statistics is not fixed.
    stored: a checkpoint's `norm` entry. chosen, heads: what was typed after --norm and --norm-heads, None for the
    weights' own norm; a typed --norm alone is that of all layers.
    """
    before = _options_of(stored)
    heads_before = before.norm_heads or before.norm
    norm = _continued(before.norm, chosen)
    heads = _continued(heads_before, heads or chosen)
    norms: dict[str, Any] = {"norm": norm} if heads == norm else {"norm": norm, "norm_heads": heads}
    specs = NormOptions(**norms).specs()
    if not any(spec.normalizes for spec in specs):
        return norms
    fixed = {"weight_centralization": before.weight_centralization, "norm_eps": before.norm_eps}
    if any(spec.ws for spec in specs):
        fixed["weight_centralization"] = False
    return norms | {name: value for name, value in fixed.items() if value is not None}


def _continued(before: str, typed: str | None) -> str:
    """Return the norm, as typed or None, that continues with weights of norm `before`, with their `weight_options`."""
    if typed == AUTO:
        return AUTO
    trained = parse_norm(before)
    typed = trained.name if typed is None else typed
    spec = parse_norm(typed)
    fixed = ("ws", *spec.weight_options) if type(spec) is type(trained) else ("ws",) if spec.normalizes else ()
    untyped = {option: getattr(trained, option) for option in fixed if option not in options_in(typed)}
    return str(replace(spec, **untyped))
