"""Mixed precision and memory format of a training, and the loss scaling that float16 needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from cfg.plan import Plan
from models.norms.auto import choose_norm
from options import TrainOptions
from utils import ranks
from utils.environment import pick_device
from utils.errors import UserError
from utils.fast_precision import fast_precision


class MixedPrecision:
    """The dtype of forward and loss, 'off', 'bf16' or 'fp16', on a device. Raises UserError for fp16 on a CPU."""

    def __init__(self, kind: str, device: torch.device) -> None:
        if kind == "fp16" and device.type == "cpu":
            raise UserError("--amp fp16 needs a GPU: choose bf16 or off")
        self.kind = kind
        self._device = device.type
        self._dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device, dtype=self._dtype, enabled=self.kind != "off")

    def may_overflow(self) -> bool:
        """Return whether a gradient that is not finite may be due to the loss scale, which `step` then lowers."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights; a float16 overflow skips the update and lowers the loss scale."""
        self.scaler.step(optimizer)
        self.scaler.update()


def choose_precision(options: TrainOptions, plan: Plan | None = None) -> tuple[TrainOptions, str]:
    """Return the options with `--amp auto` and `--channels-last auto` decided, and why; "" if both were given.

    Every rank takes what rank 0 chooses: weights in two memory formats could not be averaged.
    """
    kind, layout = options.optim.amp, options.speed.channels_last
    if "auto" not in (kind, layout):
        return options, ""
    device = ranks.local_device(pick_device(options.device))
    if options.loss.loss == "darknet":
        fast, has_fast_layout, reason = "off", False, "as darknet computes"
    else:
        fast, has_fast_layout, reason = fast_precision(device)
    norm, _ = choose_norm(options.norm, mini_batch=1, forwards=1, from_weights=options.weights is not None, plan=plan)
    if any(spec.has_image_statistics for spec in norm.specs(plan)):
        has_fast_layout = False  # torch's group norm takes 6 to 25 times as long with it, in bf16 on a CPU
    kind = fast if kind == "auto" else kind
    if layout == "auto":
        layout = "on" if has_fast_layout and kind != "off" else "off"
    if options.optim.amp != "auto" and layout == "off":
        reason = ""  # nothing follows from the device
    kind, layout, reason = ranks.broadcast((kind, layout, reason))
    optim, speed = replace(options.optim, amp=kind), replace(options.speed, channels_last=layout)
    return replace(options, optim=optim, speed=speed), reason


def as_it_ran(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a run's settings as `choose_precision` left them, also those of an earlier version.

    There `auto` was stored, which meant float32 but on CUDA, and channels_last was a bool.
    """
    layout = settings.get("channels_last", False)
    if isinstance(layout, str):
        return dict(settings)
    is_float32 = settings.get("amp", "auto") == "auto" and device.type != "cuda"
    return {**settings, "channels_last": "on" if layout else "off", **({"amp": "off"} if is_float32 else {})}


def precision_in_words(options: TrainOptions) -> str:
    """bf16, channels last"""
    kind = "float32" if options.optim.amp == "off" else options.optim.amp
    return f"{kind}{', channels last' if options.speed.channels_last == 'on' else ''}"
