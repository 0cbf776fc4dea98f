"""Norms of the user's own, typed by where their class is: `--norm package.module.Class:option=value` (docs/norms.md).

To import a module is to run it. Only modules that the user has named in this process are imported (`trust`), never
those that a checkpoint or a cfg names.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from dataclasses import make_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from models.norms.spec import NormSpec
from utils.errors import UserError
from utils.knob import knob

_trusted: set[str] = set()
_ROOMS = ("cfg", "data", "engine", "evaluation", "models", "study", "utils")


def is_own(name: str) -> bool:
    """Return whether the name of a norm is that of a class, with its module."""
    return re.fullmatch(r"([^\W\d]\w*\.)+[^\W\d]\w*", name) is not None


def trust(module: str) -> str:
    """Import a module of the user's, from the current folder or installed, and let classes come from it. Returns it.

    Raises UserError if it is not found, or fails itself.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file of the user's must not take the place of one of ours
    try:
        import_module(module)
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if is_missing or not module:
            package = module.partition(".")[0]
            hidden = f"; the package {package} of this project hides others of its name" if package in _ROOMS else ""
            raise UserError(f"there is no module '{module}' in {folder}, nor installed{hidden}") from error
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"the module {module} cannot be imported: {reason}") from error
    _trusted.add(module)
    return module


def trust_knob() -> Any:
    """Return the knob of the modules, a,b, that checkpoints and cfgs may name norms and loggers of."""
    text = "import these modules of yours, whose norms a checkpoint or cfg may use (a module typed with --norm is, too)"
    return knob((), text, unit="MODULES", parse=lambda names: tuple(map(trust, names.split(","))))


def own_spec(name: str) -> type[NormSpec]:
    """Return the spec of the class `module.Class`, whose module must be trusted. Raises UserError."""
    check_trust(name.rpartition(".")[0], f"the norm {name}")
    return _spec_of(name)


def check_trust(module: str, what: str) -> None:
    """Raise UserError unless the user has named the module. what: is found in it, such as "the norm my_norms.Mine"."""
    if module not in _trusted:
        raise UserError(
            f"{what} is not one of this project's, and nobody but you can know what is in {module}: "
            f"if you trust it, type --trust {module}"
        )


@cache
def _spec_of(name: str) -> type[NormSpec]:
    module, _, class_name = name.rpartition(".")
    found = getattr(sys.modules[module], class_name, None)
    if found is None:
        near = get_close_matches(class_name, vars(sys.modules[module]), n=1)
        raise UserError(f"the module {module} has no '{class_name}'" + (f", did you mean {near[0]}?" if near else ""))
    if isinstance(found, type) and issubclass(found, NormSpec) and not inspect.isabstract(found):
        own = {"name": name, "__slots__": (), "__module__": module}
        own |= {text: getattr(found, text, name) for text in ("summary", "source")}
        made: type[NormSpec] = type(found)(found.__name__, (found,), own)  # type: ignore[misc]
        return made
    if isinstance(found, type) and issubclass(found, nn.Module):
        return _spec_of_module(found, name)
    raise UserError(f"{name} is no norm: neither a subclass of torch.nn.Module nor of models.norms.spec.NormSpec")


def _spec_of_module(norm: type[nn.Module], name: str) -> type[NormSpec]:
    """Return a spec that makes `norm(channels, ...)`, with the options that its constructor has defaults for.

    `eps` and `momentum` are given to one that takes them, and a norm with momentum is one of mini-batch statistics.
    """
    others = list(inspect.signature(norm).parameters.values())[1:]
    kinds = {kind.__name__: kind for kind in (bool, int, float, str)}
    takes = {parameter.name for parameter in others}
    options = {p.name: p for p in others if p.name not in ("eps", "momentum") and type(p.default) in kinds.values()}

    def make(self: NormSpec, conv: nn.Conv2d, *, eps: float, momentum: float) -> nn.Module:
        given = {option: getattr(self, option) for option in options}
        given |= {rate: value for rate, value in (("eps", eps), ("momentum", momentum)) if rate in takes}
        try:
            return norm(conv.out_channels, **given)
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"{name} cannot be made for {conv.out_channels} channels: {error}") from error

    def values_per_statistic(self: NormSpec, channels: int, positions: int, *, mini_batch: int) -> int | None:
        return mini_batch * positions if self.has_batch_statistics else None

    fields: list[Any] = [
        (option, kinds.get(getattr(p.annotation, "__name__", p.annotation), type(p.default)), knob(p.default, ""))
        for option, p in options.items()
    ]
    own = {
        "name": name,
        "summary": (inspect.getdoc(norm) or norm.__name__).splitlines()[0].rstrip("."),
        "source": f"{norm.__module__}.py",
        "has_batch_statistics": "momentum" in takes,
        "has_running_statistics": "momentum" in takes,
        "weight_options": tuple(options),
        "make": make,
        "values_per_statistic": values_per_statistic,
    }
    settings: dict[str, Any] = {"frozen": True, "kw_only": True, "slots": True}
    return make_dataclass(norm.__name__, fields, bases=(NormSpec,), namespace=own, **settings)
