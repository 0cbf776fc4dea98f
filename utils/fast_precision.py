"""The precision that a device computes fast in."""

from __future__ import annotations

import re

import torch

# Chips that have float16 without tensor cores (TU116, TU117): their convolutions give NaN (pytorch #58123, #77955).
_NAN_IN_FLOAT16 = re.compile(r"GTX 16\d\d|\bT(400|500|550|600|1000|1200|2000)\b")


def fast_precision(device: torch.device) -> tuple[str, bool, str]:
    """Return bf16, fp16 or off (float32), whether channels last is fast with it, and why."""
    if device.type == "cuda":
        return _fast_on_cuda(device)
    if device.type == "cpu" and (instructions := cpu_bf16()):
        return "bf16", True, f"the CPU has {instructions}"
    return "off", False, f"no bf16 is known on this {device.type.upper()}"


def cpu_bf16() -> str:
    """Return the name of this CPU's instructions for bf16, "" without any: emulated it is slower than float32."""
    asked = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return next((name for name, function in asked.items() if getattr(torch.cpu, function, bool)()), "")


def _fast_on_cuda(device: torch.device) -> tuple[str, bool, str]:
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # Ampere and later
    name = torch.cuda.get_device_name(device)
    if not has_bf16 and _NAN_IN_FLOAT16.search(name):
        return "off", False, f"fp16 gives NaN on {name}"
    has_tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
    if has_bf16:
        return "bf16", has_tensor_cores, "the GPU has bf16"
    return "fp16", has_tensor_cores, "the GPU has no bf16"
