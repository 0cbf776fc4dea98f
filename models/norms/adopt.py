"""The norms of this project in anybody's model: docs/any-model.md."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from models.norms.batch_stat import BatchStatNorm
from models.norms.contract import ConvAware, ConvView
from models.norms.factory import norm_factory
from models.norms.module_trace import ModuleTrace, trace_forward, trace_symbolically
from models.norms.options import NormOptions
from models.norms.own import is_own, trust
from models.norms.spec import NormSpec
from models.norms.table import parse_norm
from utils.clock import BatchClock
from utils.errors import UserError


class AdoptedClock(BatchClock):
    """Clock of a model with adopted norms.

    adopted: names of the batch norms that were replaced. skipped: of those that stay as they are, with the reason.
    """

    def __init__(self, model: nn.Module, *, adopted: tuple[str, ...], skipped: Mapping[str, str]) -> None:
        super().__init__(model)
        self.adopted, self.skipped = adopted, skipped


def adopt(model: nn.Module, norm: str, /, *inputs: Any, **keywords: Any) -> AdoptedClock:
    """Replace the model's `nn.BatchNorm2d`s in place by `norm`, such as "cmbn:carry", and return its clock.

    inputs, keywords: what your loop calls the model with, such as images (N, 3, H, W), and targets; what they are does
    not matter, but which modules run does. One forward of a copy shows which convolution each batch norm follows.
    Without inputs torch.fx traces the model, if it can.

    The new norms hold the same parameters and running statistics under the same names, so optimizers and checkpoints
    still fit, and each one's eps, momentum (None becomes 0: the average of all batches), mode, device and dtype. Call
    it before DistributedDataParallel and torch.compile. Batch norms that cannot be replaced are named in a warning and
    in the clock's `skipped`. Raises UserError for a norm that other models cannot have, and where none was replaced.
    """
    spec = _adoptable(norm)
    _check(model)
    trace = trace_forward(model, inputs, keywords) if inputs or keywords else trace_symbolically(model)
    modules = dict(model.named_modules())
    skipped = dict.fromkeys(trace.functional, "calls F.batch_norm, which is no module")
    made: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():
        if not isinstance(module, _BatchNorm) and getattr(module, "running_mean", None) is None:
            continue
        found = _why_not(name, module, model, trace) or _replacement(spec, name, modules, trace)
        if isinstance(found, str):
            skipped[name] = found
        else:
            made[module] = found
    _exchange(modules, made)
    if made and (inputs or keywords):
        # A list of the model's own may hold the old norms, and run them.
        runs = trace_forward(model, inputs, keywords).runs
        unused = {module: name for name, module in modules.items() if module in made and not runs[name]}
        _exchange(modules, {made[module]: module for module in unused})
        skipped |= dict.fromkeys(unused.values(), "is run by another reference than its name in the model")
        made = {module: new for module, new in made.items() if module not in unused}
    if not made:
        raise UserError(f"no batch norm of {type(model).__name__} can become {norm}" + _listed(skipped))
    if skipped:
        warnings.warn(f"not {norm}, but as before:" + _listed(skipped), stacklevel=2)
    adopted = tuple(name for name, module in modules.items() if module in made)
    _hide_histories_from_ddp(model)
    return AdoptedClock(model, adopted=adopted, skipped=skipped)


def _exchange(modules: Mapping[str, nn.Module], made: Mapping[nn.Module, nn.Module]) -> None:
    """Put what was made in the place of each module it was made for."""
    for parent in modules.values():
        for attribute, child in parent._modules.items():
            if child is not None and child in made:
                setattr(parent, attribute, made[child])


def _adoptable(norm: str) -> NormSpec:
    if is_own(name := norm.partition(":")[0]):
        trust(name.rpartition(".")[0])  # the caller has named it
    spec = parse_norm(norm)
    if norm_factory(NormOptions(norm=norm)).conv_class is not nn.Conv2d:
        raise UserError(f"{norm} changes how convolutions use their weights, and adopt() replaces norms only")
    one = spec.make(nn.Conv2d(1, 1, 1, device="meta"), eps=1e-5, momentum=0.1)
    if one is None or one.state_dict().keys() != nn.BatchNorm2d(1).state_dict().keys():
        raise UserError(f"{norm} keeps other weights or statistics than batch norm, so no checkpoint would fit")
    return spec


def _check(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        raise UserError(f"adopt() is for the model inside the {type(model).__name__}, before it is wrapped")
    if any(map(is_lazy, model.parameters())):
        raise UserError(f"{type(model).__name__} has lazy parameters: run it once before adopt()")


def _why_not(name: str, norm: nn.Module, model: nn.Module, trace: ModuleTrace) -> str:
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
        return f"is a {type(norm).__name__}, not an nn.BatchNorm2d"
    if norm is model:
        return "is the model itself"
    if norm.weight is None or norm.running_mean is None:
        return "has no affine parameters or no running statistics"
    if norm.weight.dtype not in (torch.float32, torch.float64):
        return f"has parameters in {norm.weight.dtype}: keep them in float32, and use autocast"
    if model.training and not norm.training:
        return "is frozen: in eval mode, in a model in training mode"
    if trace.runs[name] != 1:
        return f"runs {trace.runs[name]} times in a forward" if trace.runs[name] else "does not run in this forward"
    return ""


def _replacement(spec: NormSpec, name: str, modules: Mapping[str, nn.Module], trace: ModuleTrace) -> nn.Module | str:
    """Return the norm that replaces the batch norm `name`, or why there is none."""
    before = modules[name]
    assert isinstance(before, nn.BatchNorm2d)
    maker = trace.makers.get(name, "")
    why_no_view = _why_no_view(maker, modules, trace)
    # A norm that does not look at its convolution takes any of so many channels.
    conv = nn.Conv2d(1, before.num_features, 1, device="meta") if why_no_view else modules[maker]
    assert isinstance(conv, nn.Conv2d)
    norm = spec.make(conv, eps=before.eps, momentum=before.momentum or 0.0)
    assert norm is not None, "norms with running statistics are modules"
    if isinstance(norm, ConvAware):
        if why_no_view:
            return why_no_view
        handover = _Handover()
        conv.register_forward_hook(handover.take)
        norm.register_forward_pre_hook(handover.give)
    if isinstance(norm, BatchStatNorm):
        norm.takes_stock_kernel = True
    norm.to(before.weight.device, before.weight.dtype)
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, key, getattr(before, key))  # the very tensors: an optimizer may hold them
    return norm.train(before.training)


def _why_no_view(maker: str, modules: Mapping[str, nn.Module], trace: ModuleTrace) -> str:
    """Return why there is no ConvView of what the module `maker` made, empty if there is one."""
    conv = modules[maker] if maker else None
    if not isinstance(conv, nn.Conv2d):
        source = f"{maker}, a {type(conv).__name__}" if maker else "what is no module's output"
        return f"follows {source}, not an nn.Conv2d"
    plain = (type(conv).forward, type(conv)._conv_forward) == (nn.Conv2d.forward, nn.Conv2d._conv_forward)
    if not plain or is_parametrized(conv):
        return f"follows {maker}, a {type(conv).__name__}, which computes with other numbers than nn.Conv2d"
    if trace.runs[maker] != 1:
        return f"follows {maker}, which runs {trace.runs[maker]} times in a forward"
    hooks = (*conv._forward_pre_hooks.values(), *conv._forward_hooks.values())
    if not all(isinstance(getattr(hook, "__self__", None), _Handover) for hook in hooks):  # spectral_norm has one
        return f"follows {maker}, which has hooks that may change what it computes"
    return ""


class _Handover:
    """Bearer of a convolution's input to its norm, in two hooks; empty between forwards.

    Its bound methods are copied and pickled with the two modules, and torch.compile traces them.
    """

    def __init__(self) -> None:
        self.held: tuple[nn.Conv2d, Tensor, Tensor] | None = None

    def take(self, conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        self.held = (conv, inputs[0], output)

    def give(self, norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Any, ...]:
        held, self.held = self.held, None
        if not norm.training:
            return inputs
        if held is None:
            raise UserError(
                "an adopted norm runs without the convolution that it followed in the traced forward: give adopt() "
                "inputs that take the way of your training"
            )
        conv, x, y = held
        if not torch.compiler.is_compiling() and inputs[0] is not y:
            raise UserError(
                "an adopted norm gets something else than what its convolution computed, though not in the traced "
                "forward (such as a dropout in between): call adopt() on the model in training mode"
            )
        return (*inputs, ConvView(conv, x))


def _hide_histories_from_ddp(model: nn.Module) -> None:
    """Keep DistributedDataParallel from overwriting each rank's histories by those of rank 0 at every forward."""
    hidden = [
        f"{name}.{buffer}"
        for name, norm in model.named_modules()
        if isinstance(norm, BatchStatNorm)
        for buffer in norm._non_persistent_buffers_set
    ]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [*before, *hidden]  # type: ignore[assignment]


def _listed(skipped: Mapping[str, str]) -> str:
    return "".join(f"\n  {name or 'the model'} {reason}" for name, reason in skipped.items())
