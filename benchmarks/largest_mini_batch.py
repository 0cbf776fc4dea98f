"""The largest mini-batch that a training step fits into so much GPU memory, by network, input size and flags.

A cap is what torch may reserve of this GPU's memory: CUDA itself takes some more of a card (`outside_torch_GB` of a
row), and a desktop, too. What train.py keeps is there: weights, their average, AdamW's moments, gradients.
`python benchmarks/gpu.py` runs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from benchmarks.measured import Row, wait_for
from benchmarks.train_step import NoRecovery
from cfg.plan import Plan, load_plan
from engine.amp import choose_precision, precision_in_words
from engine.auto_subdivisions import noise_batch
from engine.build import make_network, make_step
from engine.ema import ModelEMA
from engine.step import TrainStep
from options import TrainOptions
from utils.flags import parse_flags, resolve
from utils.memory import empty_cache, free_memory_bytes, is_out_of_memory

CAPS_GB = (4, 6, 8)
BATCH = 64  # darknet's; no mini-batch is larger

# What is typed after train.py. Without flags: --amp auto, --norm bn.
WAYS = {
    "": [],
    "checkpointed": ["--checkpoint-activations"],
    "offloaded": ["--offload-activations"],
    "checkpointed, offloaded": ["--checkpoint-activations", "--offload-activations"],
    "cmbn:carry": ["--norm", "cmbn:carry"],
    "float32": ["--amp", "off"],
    "float32, checkpointed": ["--amp", "off", "--checkpoint-activations"],
}


def measure(
    net: str,
    side_px: int,
    way: str,
    device: torch.device,
    *,
    caps_gb: Sequence[int] = CAPS_GB,
    most: int = BATCH,
    flags: Sequence[str] = (),
) -> list[Row]:
    """Return a row per cap, without those that are more than the GPU has.

    Mini-batches are powers of two, at most `most` and what the host has memory to offload; 0 if a single image does not
    fit. subdivisions: of darknet's batch of 64. flags: more of train.py's.
    """
    typed = parse_flags(TrainOptions, ["--device", str(device), "--optimizer", "adamw", *flags, *WAYS[way]])
    options, _ = choose_precision(resolve(TrainOptions, typed))
    rows: list[Row] = []
    best: Row = {"mini_batch": 0}
    try:
        for cap_gb in [cap for cap in sorted(caps_gb) if cap <= 1.1 * total_gb(device)]:  # a card of 8 GB has 7.8
            set_cap(cap_gb, device)
            if not rows:
                step, _average = make_training(options, load_plan(net, input_hw=(side_px, side_px)), device)
            # What fitted under the cap before fits under this one. Twice as many images take twice the host's memory.
            while (size := 2 * best["mini_batch"] or 1) <= most and host_holds(2 * best.get("host_GB", 0)):
                if (found := tried(step, size, side_px)) is None:
                    break
                best = found
            if best["mini_batch"]:
                best["subdivisions"] = BATCH // best["mini_batch"]
            case = {"net": net, "side_px": side_px, "way": way, "flags": " ".join(WAYS[way])}
            rows.append({**case, "precision": precision_in_words(options), "cap_GB": cap_gb, **best})
    finally:
        set_cap(None, device)
    return rows


def make_training(options: TrainOptions, plan: Plan, device: torch.device) -> tuple[TrainStep, ModelEMA]:
    """Return a step of two mini-batches that does not recover from running out of memory, and the average of weights.

    Two, because gradients take memory from the second one on. The learning rate is 0.
    """
    network = make_network(options, plan, device)
    step = make_step(options, network, network, say=print)
    step.recovery = NoRecovery(network, subdivisions=2, communicates=False, say=print)
    return step, ModelEMA(network)


def tried(step: TrainStep, mini_batch: int, side_px: int) -> Row | None:
    """Return speed and peak of a training step; None if memory runs out."""
    device = next(step.network.parameters()).device
    try:
        batch = noise_batch(2 * mini_batch, (side_px, side_px)).to(device)
        for _ in range(2):  # AdamW's moments, and cuDNN's algorithms, are there from the second one on
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.reset_peak_host_memory_stats()
            wait_for(device)
            start = time.perf_counter()
            step(batch)
            wait_for(device)
            took_s = time.perf_counter() - start
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        empty_cache()
    found: Row = {"mini_batch": mini_batch, "step_s": round(took_s, 4), "images_per_s": round(len(batch) / took_s, 2)}
    if device.type == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["reserved_GB"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
        found["host_GB"] = round(torch.cuda.host_memory_stats().get("active_bytes.peak", 0) / 2**30, 2)
    return found


def host_holds(needed_gb: float) -> bool:
    """Return whether the host has so much memory for activations: page-locked, it cannot be swapped out."""
    return needed_gb * 2**30 <= 0.8 * free_memory_bytes()


def set_cap(cap_gb: float | None, device: torch.device) -> None:
    """Let torch reserve no more of the GPU's memory than this; None: all of it."""
    if device.type == "cuda":
        empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gb or math.inf) / total_gb(device)), device)


def total_gb(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else math.inf


def lines(rows: Sequence[Row]) -> str:
    """Return one line for all caps."""
    row = rows[0]
    case = f"{row['net']} {row['side_px']} px {row['flags'] or '(no flags)'} [{row['precision']}]"
    return "; ".join([case, *map(_fit, rows)])


def _fit(row: Row) -> str:
    if not row["mini_batch"]:
        return f"{row['cap_GB']} GB: 0"
    peak = f", peak {row['peak_GB']:.2f} GB" if "peak_GB" in row else ""
    return f"{row['cap_GB']} GB: {row['mini_batch']} at {row['images_per_s']:.1f} images/s{peak}"
