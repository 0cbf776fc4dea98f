"""The norms by name, and what is typed of them. A new norm is one file here and its name in `_FILES`."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

from torch import nn

from models.norms.old_spelling import respelled
from models.norms.spec import NormSpec
from models.norms.weight_centralization import CentralizedConv2d
from utils.errors import UserError
from utils.knob import check_limits, knob, outside_limits

_FILES = (
    "bn",
    "cmbn",
    "cbn",
    "cbn_lite",
    "mabn",
    "brn",
    "group_norm",
    "none",
)

NORMS: dict[str, type[NormSpec]] = {
    spec.name: spec for file in _FILES for spec in import_module(f"models.norms.{file}").SPECS
}
AUTO = "auto"  # no norm, but the choice of one: auto.py


def parse_norm(text: str) -> NormSpec:
    """Read NAME[:OPTION[=VALUE],...]. Raises UserError, with the options there are, for what is none of them."""
    name = text.partition(":")[0]
    if name == AUTO:
        raise UserError(f"--norm {AUTO} has no options, and is no norm of a network: it chooses one")
    if name not in NORMS:
        raise UserError(f"unknown norm '{name}': choose one of {', '.join((*NORMS, AUTO))}; --norm help describes them")
    spec = NORMS[name]
    return spec(**{option: _value(spec, option, value) for option, value in _options_in(text).items()})


def _options_in(text: str) -> dict[str, str | None]:
    """Split NAME:OPTION=VALUE,SWITCH into {"OPTION": "VALUE", "SWITCH": None}."""
    _, colon, rest = text.partition(":")
    options: dict[str, str | None] = {}
    for part in rest.split(",") if colon else ():
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not name or name in options:
            wrong = f"{name} is given twice" if name else "an option is missing after : or ,"
            raise UserError(f"--norm {text}: {wrong}")
        options[name] = value.strip() if equals else None
    return options


def checked_norm(text: str) -> str:
    """Return what was typed after --norm, once it is known to be a norm. `help` prints the norms and exits with 0."""
    if text == "help":
        print(norms_help())
        raise SystemExit(0)
    if text != AUTO:
        parse_norm(text)
    return text


def norms_help() -> str:
    """Return every norm with its options, their defaults, and its source."""
    usage = "--norm NAME[:OPTION[=VALUE],...], such as cmbn:carry or cbn:window=8,estimator=taylor"
    auto = f"{AUTO:10}cmbn:carry where few images are in a forward, else bn"
    return "\n\n".join([usage, auto, *map(_help, NORMS.values())])


def _help(spec: type[NormSpec]) -> str:
    lines = [f"{spec.name:10}{spec.summary}", f"{'':10}{spec.source}"]
    for f in fields(spec):
        value = {True: "on", False: "off"}.get(f.default, f.default) if isinstance(f.default, bool) else f.default
        default = "" if value is None else f" (default {value})"
        text = textwrap.wrap(f.metadata["text"] + default, width=80)
        lines += [f"{'':12}{f.name if n == 0 else '':16}{part}" for n, part in enumerate(text)]
    return "\n".join(lines)


def _value(spec: type[NormSpec], option: str, text: str | None) -> Any:
    """Read one option's value; None where only its name was typed. Raises UserError."""
    field = next((f for f in fields(spec) if f.name == option), None)
    if field is None:
        raise UserError(f"--norm {spec.name} has no option '{option}'\n\n{_help(spec)}")
    hint = typing.get_type_hints(spec)[option]
    kind = next(iter(set(typing.get_args(hint)) - {type(None)}), hint)
    switches = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
    wrong = f"--norm {spec.name}: {option}" + ("" if text is None else f"={text}")
    if kind is bool:
        value = switches.get("on" if text is None else text.lower())
        if value is None:
            raise UserError(f"{wrong} must be on or off")
        return value
    choices = field.metadata["choices"]
    if choices and text not in choices:
        raise UserError(f"{wrong} must be one of {', '.join(choices)}")
    try:
        value = kind(text)
    except (TypeError, ValueError):
        raise UserError(f"{wrong} needs {'a whole number' if kind is int else 'a number'}") from None
    if limits := outside_limits(field, value):
        raise UserError(f"{wrong} {limits}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class NormOptions:
    """Which norm, and what is common to all norms. A setting that the chosen norm does not use is refused."""

    norm: str = knob(
        "bn",
        "normalization layer of every conv-norm-activation block, with its options, such as cmbn:carry or gn:groups=8; "
        "auto: chosen by the images in a forward; help: lists all (cfg: batch_normalize=2 is cmbn; --weights: theirs)",
        unit="NAME[:OPTION[=VALUE],...]",
        parse=checked_norm,
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

    @property
    def never_measures(self) -> bool:
        """Whether running statistics are used from the first step on, and stay as they are."""
        frozen = self.spec.has_running_statistics and not self.spec.has_batch_statistics
        return frozen or bool(self.norm_eval) or self.norm_freeze_after == 0


def resolve_norm(options: NormOptions) -> NormOptions:
    """Return the options with the chosen norm's defaults filled in. Raises UserError for a setting it does not use."""
    if options.norm == AUTO:
        uses_batches, uses_running, normalizes, momentum, centralizes = True, True, True, None, None
    else:
        spec = options.spec
        uses_batches, uses_running, normalizes = spec.has_batch_statistics, spec.has_running_statistics, spec.normalizes
        momentum, centralizes = spec.default_momentum, spec.centralizes_weights
        options = replace(options, norm=str(spec))
    own: dict[str, Any] = {}
    if uses_batches:
        own |= {"norm_momentum": momentum, "norm_eval": False, "norm_freeze_after": 1.0, "shuffle_bn": False}
    if uses_running:
        own["precise_bn"] = 0
    for name in ("norm_momentum", "norm_eval", "norm_freeze_after", "shuffle_bn", "precise_bn"):
        if name not in own and getattr(options, name) is not None:
            statistics = "running statistics" if name == "precise_bn" else "statistics of mini-batches"
            raise UserError(f"{_flag(name)} is for norms with {statistics}, which --norm {options.norm} does not have")
    if not normalizes:
        for name in ("norm_eps", "norm_freeze_affine", "weight_centralization"):
            if getattr(options, name) not in (None, False, NormOptions.__dataclass_fields__[name].default):
                raise UserError(f"{_flag(name)} is about a norm, and --norm {options.norm} is not one")
    if options.norm_eval and options.norm_freeze_after not in (None, 1.0):
        raise UserError("--norm-eval freezes the statistics from the start: --norm-freeze-after has nothing to add")
    if options.shuffle_bn and options.norm != AUTO and options.spec.is_synchronized:
        raise UserError(f"--shuffle-bn has no purpose with --norm {options.norm}, which pools over all ranks")
    own["weight_centralization"] = centralizes
    return replace(options, **{name: value for name, value in own.items() if getattr(options, name) is None})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def stored_norm(stored: Mapping[str, Any]) -> NormOptions:
    """Return the resolved options that a checkpoint's `norm` entry, of any version, spells."""
    return resolve_norm(_options_of(stored))


def _options_of(stored: Mapping[str, Any]) -> NormOptions:
    """Read a checkpoint's `norm` entry. Raises UserError for one that is not of this project's making."""
    try:
        options = NormOptions(**respelled(stored))
        check_limits(options)
        options.spec  # noqa: B018  raises what is wrong with it
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"a checkpoint's norm settings {dict(stored)} are not understood ({error})") from error
    return options


def norm_of_weights(stored: Mapping[str, Any], chosen: str | None) -> dict[str, Any]:
    """Return the norm that continues with trained weights, and what else they fix about it, by field name.

    Otherwise they would compute another function: how convolutions use their weights, what is added to variances, and
    the norm's `weight_options`, where they were not typed. How a training pools or freezes statistics is not fixed.
    stored: a checkpoint's `norm` entry. chosen: what was typed after --norm, None for the weights' own norm.
    """
    before = _options_of(stored)
    if chosen == AUTO:
        spec: NormSpec | None = None
    else:
        typed = before.spec.name if chosen is None else chosen
        spec = parse_norm(typed)
        if type(spec) is type(before.spec):
            untyped = [option for option in spec.weight_options if option not in _options_in(typed)]
            spec = replace(spec, **{option: getattr(before.spec, option) for option in untyped})
        if not spec.normalizes:
            return {"norm": spec.name}
    fixed = {"weight_centralization": before.weight_centralization, "norm_eps": before.norm_eps}
    norm = {"norm": AUTO if spec is None else str(spec)}
    return norm | {name: value for name, value in fixed.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class NormFactory:
    """Maker of a convolution's norm (None: a bias instead), by resolved options."""

    options: NormOptions

    @property
    def conv_class(self) -> type[nn.Conv2d]:
        """Class of the convolutions to be normalized."""
        return CentralizedConv2d if self.options.weight_centralization else nn.Conv2d

    def __call__(self, conv: nn.Conv2d) -> nn.Module | None:
        momentum = self.options.norm_momentum
        norm = self.options.spec.make(conv, eps=self.options.norm_eps, momentum=0.1 if momentum is None else momentum)
        if norm is not None and self.options.norm_freeze_affine:
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
        return norm


def norm_factory(options: NormOptions) -> NormFactory:
    """Return the factory of the resolved options. Raises as `resolve_norm`."""
    return NormFactory(options=resolve_norm(options))
