"""A GPU that is none: tensors that say they are on `cuda:0` and are computed on the CPU.

Every operator is checked as CUDA would check it: with a tensor of the GPU it takes no tensor of the CPU, but for single
numbers, copies, and a GPU tensor's indices. So code that forgets `device=` fails here as it would there, and whatever
branches on the device takes the GPU's way. `waits` counts where the host would wait for the GPU to finish what it was
told before.

What this cannot show: CUDA's own kernels, their rounding, speed, memory, and autocast; and what autograd's formulas do
for real data alone, which takes an OnGpu for a tensor without any: the gradient of `prod` looks for zeros, and waits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_COPIES = {_aten.copy_.default, _aten._to_copy.default}


_SIZE_DEPENDS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
}

waits: Counter[str] = Counter()  # by operator
_page_locked = WeakIdKeyDictionary()


class OnGpu(Tensor):
    """To autograd a tensor of the meta device, which has no data and no streams; `_host` has the data."""

    _host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        meta = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        made = Tensor._make_subclass(cls, meta)
        made._host = host
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._host.__reduce_ex__(protocol)  # saved to be read with map_location="cpu"

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self._host})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # the default calls all that it returns OnGpu
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self._host.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    on_gpu = {id(each._host): each for each in tensors if isinstance(each, OnGpu)}
    # Indices may be on the CPU, of what is on the GPU; not the other way round.
    checked = [args[0], *args[2:3]] if func in _INDEXED and isinstance(args[0], OnGpu) else tensors
    others = [tuple(each.shape) for each in checked if not isinstance(each, OnGpu) and each.ndim]
    if on_gpu and others and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and, on cpu, {others}")
    if _waits(func, args, kwargs, bool(on_gpu)):
        waits[str(func)] += 1
    is_pinned, kwargs = kwargs.get("pin_memory"), {n: value for n, value in kwargs.items() if n != "pin_memory"}
    asked = kwargs.get("device")
    if asked is None:
        to_gpu = isinstance(args[0], OnGpu) if func is _aten.copy_.default else bool(on_gpu)
    else:
        to_gpu = _is_gpu(asked)
        kwargs = {**kwargs, "device": CPU}
    host_args, host_kwargs = tree_map(lambda each: each._host if isinstance(each, OnGpu) else each, (args, kwargs))
    made = func(*host_args, **host_kwargs)
    if is_pinned:
        _page_locked[made] = True
    if func is _aten.resize_.default and on_gpu:
        with no_dispatch():
            args[0].resize_(args[1])

    def placed(each: Any) -> Any:
        if not isinstance(each, Tensor) or not to_gpu:
            return each
        return on_gpu[id(each)] if id(each) in on_gpu else OnGpu(each)  # in place: the same tensor

    return tree_map(placed, made)


def _waits(func: Any, args: Any, kwargs: dict[str, Any], on_gpu: bool) -> bool:
    if func in _INDEXED:
        indices = [each for each in args[1] if each is not None]
        return on_gpu and any(each.dtype == torch.bool or not isinstance(each, OnGpu) for each in indices)
    if func is _aten._to_copy.default and kwargs.get("device") is not None:
        crosses = on_gpu != _is_gpu(kwargs["device"])
        return crosses and not (kwargs.get("non_blocking") and args[0] in _page_locked)
    if func is _aten.copy_.default:
        crosses = isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu)
        return crosses and not (any(args[2:]) and (args[0] in _page_locked or args[1] in _page_locked))
    return on_gpu and func in _SIZE_DEPENDS


def _is_gpu(asked: torch.device | str) -> bool:
    return torch.device(asked).type in ("cuda", "meta")  # meta: what C++ takes an OnGpu's device for


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """Functions that would go to CUDA before any operator is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func == Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(device)
        return func(*args, **kwargs)


def _pinned(host: Tensor) -> Tensor:
    made = host.clone()
    _page_locked[made] = True
    return made


def _check_fraction(fraction: float, device: torch.device) -> None:
    """As torch does, which takes no device without an index here."""
    if not isinstance(fraction, float) or not 0 <= fraction <= 1 or device.index is None:
        raise ValueError(f"a fraction of {fraction} on {device}")


@contextlib.contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The GPU's device; `torch.cuda` says that it is there, with 8 GiB."""
    patched = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (7, 0),
        "is_bf16_supported": lambda including_emulation=True: False,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "manual_seed_all": lambda seed: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: 2**29,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 2**30,
        "max_memory_reserved": lambda device=None: 2**30,
        "reset_peak_host_memory_stats": lambda: None,
        "host_memory_stats": lambda: {"active_bytes.peak": 2**28},
        "set_per_process_memory_fraction": _check_fraction,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (8 << 30, 8 << 30),
    }
    with monkeypatch.context() as patch:
        for name, function in patched.items():
            patch.setattr(torch.cuda, name, function)
        # Adam asks it whether a CUDA graph is being captured.
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch.setattr(Tensor, "pin_memory", _pinned)  # not above: a thread does it
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        waits.clear()
        try:
            with _Operators(), _Makers():
                yield GPU
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
