"""Mixed precision: the dtype of the forward, and the loss scaling that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from utils.errors import UserError


class MixedPrecision:
    """kind: 'off', 'bf16', 'fp16', or 'auto' (on CUDA bf16 if the GPU has it, else fp16; elsewhere off)."""

    def __init__(self, kind: str, device: torch.device) -> None:
        if kind == "auto":
            on_cuda = device.type == "cuda"
            kind = ("bf16" if _has_bf16(device) else "fp16") if on_cuda else "off"
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


def _has_bf16(device: torch.device) -> bool:
    """Return whether the hardware has it (Ampere and later): emulated bf16 is slower than float32."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
