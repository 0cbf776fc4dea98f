"""How far each norm on a device is from the same norm in float64 on a CPU: forward, gradients, statistics.

A small network of dense and grouped convolutions, whose activations have no kink that rounding could cross. It trains
two batches of four mini-batches of two images: what norms carry from one mini-batch and batch to the next takes part.
`python benchmarks/gpu.py` runs it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measured import Row
from benchmarks.train_step import has_bf16
from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from study.recipes import settings_of, with_burn_in
from utils.clock import BatchClock

TOLERANCE = 1e-4  # of float32, which is up to 1e-5 off on a CPU; TF32 would be 1e-3 off
SIDE_PX = 16

_CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize={}\nstride={}\npad=1\ngroups={}\nactivation={}\n"
CFG = (  # at least 64 channels: two in each of gn's groups
    f"[net]\nwidth={SIDE_PX}\nheight={SIDE_PX}\n"
    + _CONV.format(64, 3, 1, 1, "swish")
    + _CONV.format(64, 3, 2, 2, "mish")
    + _CONV.format(128, 1, 1, 1, "linear")
    + "[convolutional]\nfilters=8\nactivation=linear\n"
)

Found = dict[str, dict[str, Tensor]]  # "forward", "gradients", "statistics" -> tensors by name


def measure(recipe: str, device: torch.device) -> list[Row]:
    """Return a row per precision and memory format. recipe: what is typed after --norm."""
    expected = trained(recipe, torch.device("cpu"), torch.float64)
    on_cpu = errors(trained(recipe, torch.device("cpu"), torch.float32), expected)
    rows: list[Row] = []
    for precision, layout in ways_on(device):
        amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format
        with without_tf32():
            found = errors(trained(recipe, device, torch.float32, amp, memory_format), expected)
        row: Row = {"norm": recipe, "precision": precision, "layout": layout, **found}
        if amp is None:
            row |= {f"cpu_{part}": value for part, value in on_cpu.items()}
            row |= {"tolerance": TOLERANCE, "ok": max(found.values()) <= TOLERANCE}
        rows.append(row)
    return rows


def ways_on(device: torch.device) -> list[tuple[str, str]]:
    """Return precisions and memory formats: fp16 on GPUs only, bf16 where the hardware has it."""
    mixed = ["bf16"] * has_bf16(device) + ["fp16"] * (device.type == "cuda")
    return [("float32", "NCHW"), ("float32", "channels last"), *((kind, "channels last") for kind in mixed)]


def trained(
    recipe: str,
    device: torch.device,
    dtype: torch.dtype,
    amp: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Found:
    """Train two batches of four mini-batches, and return what was seen, on the CPU in float64."""
    torch.manual_seed(0)
    options = NormOptions(**settings_of(recipe))
    options = replace(options, norm=str(with_burn_in(options.spec, 0)))
    network = Network(parse_plan(CFG, path="small.cfg"), norm_factory(options))
    network = network.to(device, dtype).to(memory_format=memory_format).train()
    generator = torch.Generator().manual_seed(1)
    clock, optimizer = BatchClock(network), torch.optim.SGD(network.parameters(), lr=1e-4)
    found: Found = {"forward": {}, "gradients": {}, "statistics": {}}
    for step in range(2):
        parts = [torch.rand(2, 3, SIDE_PX, SIDE_PX, generator=generator) * (1 + part) / 2 for part in range(4)]
        for index, part in enumerate(clock.minibatches(parts)):
            images = part.to(device, dtype).to(memory_format=memory_format).requires_grad_()
            with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                output = network.last_output(images)
            # Random, because a norm's gradient cancels that of losses which look at mean or spread.
            gradient = torch.randn(output.shape, generator=generator)
            torch.autograd.backward(output, gradient.to(device, output.dtype))
            found["forward"][f"{step}.{index}"] = _kept(output)
            assert images.grad is not None
            found["gradients"][f"{step}.{index}.images"] = _kept(images.grad)
        named = network.named_parameters()
        found["gradients"] |= {f"{step}.{name}": _kept(p.grad) for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    found["statistics"] = {name: _kept(buffer) for name, buffer in network.named_buffers()}
    return found


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def errors(found: Found, expected: Found) -> dict[str, float]:
    """Return by part the largest error of a tensor, relative by Euclidean norms; absolute of what is all but 0."""
    return {
        part: float(f"{max((_error(found[part][name], ours) for name, ours in tensors.items()), default=0.0):.2g}")
        for part, tensors in expected.items()
    }


def _error(found: Tensor, expected: Tensor) -> float:
    size = expected.norm().item()
    error = (found - expected).norm().item() / (size if size > 1e-6 else 1.0)
    return error if math.isfinite(error) else math.inf


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 as such: with TF32 a product has 10 bits of mantissa."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def lines(rows: Sequence[Row]) -> str:
    """Return a line per row."""
    made = []
    for row in rows:
        verdict = "" if "ok" not in row else f"  (a CPU: {max(row[f'cpu_{part}'] for part in PARTS):.0e})"
        verdict += "" if row.get("ok", True) else f"  ABOVE {TOLERANCE:.0e}"
        numbers = "  ".join(f"{part} {row[part]:.0e}" for part in PARTS)
        made.append(f"{row['norm']:<48}{row['precision']:<8} {row['layout']:<14} {numbers}{verdict}")
    return "\n".join(made)


PARTS = ("forward", "gradients", "statistics")
