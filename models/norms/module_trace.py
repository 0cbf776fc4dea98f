"""Which module made the input of which: seen in one forward of a copy of any model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from models.norms.running_stats import has_running_statistics
from utils.errors import UserError
from utils.seed import random_state, set_random_state

_FUNCTIONAL = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTrace:
    """What one forward did, by the names of modules.

    runs: how often each ran. makers: for each, the module whose output its input is, the very tensor and not written
    to since; missing where there is none. functional: modules that compute a batch norm which is no module.
    """

    runs: Counter[str] = field(default_factory=Counter)
    makers: dict[str, str] = field(default_factory=dict)
    functional: set[str] = field(default_factory=set)


def trace_forward(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> ModuleTrace:
    """Run model(*inputs, **keywords) once without gradients, on copies: nothing of the model, its inputs or the random
    generators changes. Its batch norms normalize by their running statistics, so one image is enough.
    """
    trace, running = ModuleTrace(), [""]  # names of the modules at work, the innermost last
    try:
        model, inputs, keywords = copy.deepcopy((model, inputs, keywords))
    except RuntimeError as error:  # such as an activation that the model keeps
        raise UserError(f"{type(model).__name__} cannot be copied to trace it: {error}") from error
    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_pre_hook(partial(_enter, trace, running, name))
        module.register_forward_hook(partial(_leave, running, name))
        if getattr(module, "running_mean", None) is not None:
            module.eval()
    state = random_state()
    try:
        with torch.no_grad(), _FunctionalBatchNorms(trace, lambda: running[-1], modules):
            model(*inputs, **keywords)
    finally:
        set_random_state(state)
    return trace


def _enter(trace: ModuleTrace, running: list[str], name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    running.append(name)
    trace.runs[name] += 1
    maker, version = getattr(inputs[0], "maker", ("", -1)) if inputs else ("", -1)
    if maker and version == inputs[0]._version:
        trace.makers[name] = maker


def _leave(running: list[str], name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Sign the output, unless an inner module has. The signature dies with the tensor, as its id would not."""
    running.pop()
    if isinstance(output, Tensor) and getattr(output, "maker", ("", -1))[1] != output._version:
        output.maker = (name, output._version)  # type: ignore[attr-defined]


class _FunctionalBatchNorms(TorchFunctionMode):
    def __init__(self, trace: ModuleTrace, innermost: Callable[[], str], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._trace, self._innermost, self._modules = trace, innermost, modules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUNCTIONAL and not has_running_statistics(self._modules[self._innermost()]):
            self._trace.functional.add(self._innermost())
        return func(*args, **(kwargs or {}))


def trace_symbolically(model: nn.Module) -> ModuleTrace:
    """Trace the forward by torch.fx, without inputs. Raises UserError where it cannot, as with inputs in lists."""
    try:
        graph = _Tracer().trace(copy.deepcopy(model))
    except Exception as error:  # of any class: the model's own code has met values that are none
        raise UserError(
            f"{type(model).__name__} cannot be traced without inputs: give what your loop calls the model with, as in "
            "adopt(model, norm, images) or adopt(model, norm, images, targets)"
        ) from error
    trace = ModuleTrace()
    for node in graph.nodes:
        if node.op == "call_module":
            trace.runs[node.target] += 1
            made_by = node.args[0] if node.args else None
            # An activation in place is another user: whether it has run before is not seen here.
            if isinstance(made_by, fx.Node) and made_by.op == "call_module" and len(made_by.users) == 1:
                trace.makers[node.target] = str(made_by.target)
        elif node.op == "call_function" and node.target in _FUNCTIONAL:
            trace.functional.add(next(reversed(node.meta.get("nn_module_stack", {"": None}))))
    return trace


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)
