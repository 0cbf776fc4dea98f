"""Cost of a training step by the way it is computed: time and memory, relative to plain eager PyTorch.

    python -m benchmarks.train_step [--nets yolov4-tiny yolov4] [--image-size 416] [--device cpu] [--images 1]
        [--rounds 5] [--only ...]

A step is one forward, the loss and backward of a mini-batch, and SGD, through the project's own TrainStep.
"eager" is stock nn.BatchNorm2d followed by an activation, in float32. All ways take turns in every round, because the
speed of a machine changes; a ratio is the median over rounds of t(way) / t(eager) in the same round.

Memory: on CUDA the peak of a step above what was allocated before. On a CPU, which has no such counter, what autograd
saves for the backward and what crosses the spans of a network with activation checkpointing; a compiled network is not
measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measured import Row, against, circumstances, results_path, write
from cfg.plan import load_plan
from engine.amp import MixedPrecision
from engine.oom_recovery import OutOfMemoryRecovery
from engine.step import TrainStep
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.yolo.loss import LossOptions, YoloLoss
from study.memory import saved_bytes
from utils.clock import BatchClock
from utils.environment import pick_device
from utils.fast_precision import cpu_bf16
from utils.structures import Batch, Targets

BOXES = 12  # in each image


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    fused: bool = False  # batch norm and activation in one operation, as in bn:running=pooled
    channels_last: bool = False
    bf16: bool = False
    fp16: bool = False  # on GPUs
    compiled: bool = False
    recomputes: bool = False
    offloads: bool = False  # activations to host memory; on a CPU they are there


WAYS = {
    "eager": Way(),
    "fused": Way(fused=True),
    "channels last": Way(channels_last=True),
    "fused, channels last": Way(fused=True, channels_last=True),
    "bf16": Way(bf16=True),
    "channels last, bf16": Way(channels_last=True, bf16=True),
    "fused, channels last, bf16": Way(fused=True, channels_last=True, bf16=True),
    "channels last, fp16": Way(channels_last=True, fp16=True),
    "compiled": Way(compiled=True),
    "compiled, channels last, bf16": Way(compiled=True, channels_last=True, bf16=True),
    "recomputed": Way(recomputes=True),
    "offloaded": Way(offloads=True),
    "recomputed, offloaded": Way(recomputes=True, offloads=True),
}


class NoRecovery(OutOfMemoryRecovery):
    """One attempt at what it takes: a batch that was cut finer would not be compared with others."""

    def attempts(self, images: int) -> Iterator[AbstractContextManager[None]]:
        self._snapshot.take()
        yield nullcontext()


class Contestant:
    def __init__(self, net: str, side_px: int, way: Way, device: torch.device) -> None:
        torch.manual_seed(0)
        norm = NormOptions(norm="bn:running=pooled" if way.fused else "bn")
        self.way, self.device = way, device
        self.network = Network(load_plan(net, input_hw=(side_px, side_px)), norm_factory(norm)).to(device).train()
        if way.recomputes:
            self.network.recompute_activations()
        if way.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if way.compiled:
            self.network.compile(dynamic=False)
        self.step = TrainStep(
            network=self.network,
            forward=self.network,
            criterion=YoloLoss(LossOptions()),
            optimizer=torch.optim.SGD(parameter_groups(self.network, weight_decay=5e-4), lr=1e-4, momentum=0.9),
            precision=MixedPrecision("bf16" if way.bf16 else "fp16" if way.fp16 else "off", device),
            clock=BatchClock(self.network),
            recovery=NoRecovery(self.network, subdivisions=1, communicates=False, say=print),
            clip_norm=None,
            offload_activations=way.offloads,
        )

    def timed(self, batch: Batch) -> tuple[float, int]:
        """Return the seconds of a step and, on CUDA, its peak of memory in bytes, else 0."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            self.step.optimizer.zero_grad(set_to_none=True)  # the last step's gradients count as this one's memory
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        self.step(batch)
        if on_cuda:
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - start, torch.cuda.max_memory_allocated(self.device) - before
        return time.perf_counter() - start, 0

    def saved_bytes(self, batch: Batch) -> int:
        """Return what is kept for the backward; with checkpointing, plus what the largest span recomputes."""
        if not self.way.recomputes:
            return self._saved_by(lambda: self.network.forward(batch.pixels()))
        outputs, within = {-1: batch.pixels()}, 0
        between: dict[int, int] = {}
        for span in self.network._spans:
            tensors: list[Tensor] = []
            run = partial(self.network._run_span, span, tuple(outputs), *outputs.values())
            within = max(within, self._saved_by(partial(_collect, run, tensors)))
            outputs = dict(zip(self.network._held_after(span), tensors, strict=True))
            between |= {index: output.nbytes for index, output in outputs.items() if index >= 0}
        return within + sum(between.values())

    def _saved_by(self, run: Callable[[], object]) -> int:
        """Return the bytes that autograd saves, in the precision of the step."""
        with self.step.precision.autocast():
            return saved_bytes(run, self.network)


def _collect(run: Callable[[], Iterable[Tensor]], into: list[Tensor]) -> None:
    into.extend(run())


def batch_of(image_count: int, side_px: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(image_count * BOXES, 2, generator=generator) * side_px * 0.7
    sides = 8 + torch.rand(image_count * BOXES, 2, generator=generator) * side_px * 0.25
    targets = Targets(
        boxes=torch.cat((corners, corners + sides), 1),
        labels=torch.randint(80, (image_count * BOXES,), generator=generator),
        image_index=torch.arange(image_count).repeat_interleave(BOXES),
        is_crowd=torch.zeros(image_count * BOXES, dtype=torch.bool),
    )
    images = torch.randint(256, (image_count, 3, side_px, side_px), dtype=torch.uint8, generator=generator)
    batch = Batch(
        images=images,
        targets=targets,
        image_ids=(0,) * image_count,
        paths=("",) * image_count,
        placements=(None,) * image_count,
    )
    return batch.to(device)


def ways_on(device: torch.device) -> list[str]:
    """Return the names of the ways that the device can gain from."""
    lacks_bf16, is_cpu = not has_bf16(device), device.type == "cpu"

    def is_useless(way: Way) -> bool:
        return (way.bf16 and lacks_bf16) or (is_cpu and (way.offloads or way.fp16))

    return [name for name, way in WAYS.items() if not is_useless(way)]


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware has bf16; emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_bf16())


def measure(net: str, side_px: int, ways: list[str], image_count: int, rounds: int, device: torch.device) -> list[Row]:
    batch = batch_of(image_count, side_px, device)
    contestants = {name: Contestant(net, side_px, WAYS[name], device) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0)
    for turn in range(rounds + 2):
        for name, contestant in contestants.items():
            took_s, peak = contestant.timed(batch)
            if turn > 1:  # the first two compile, allocate and choose algorithms
                seconds[name].append(took_s)
                peaks[name] = max(peaks[name], peak)
    if device.type != "cuda":
        peaks = {name: 0 if WAYS[name].compiled else c.saved_bytes(batch) for name, c in contestants.items()}
    rows = []
    for name in ways:
        step_s = statistics.median(seconds[name])
        rows.append(
            {
                "net": Path(net).stem,
                "side_px": side_px,
                "way": name,
                **asdict(WAYS[name]),
                "images": image_count,
                "step_s": round(step_s, 4),
                "images_per_s": round(image_count / step_s, 2),
                **against(seconds["eager"], seconds[name]),
                "memory_MB": round(peaks[name] / 2**20, 1) or None,
                "memory_ratio": round(peaks[name] / peaks["eager"], 3) or None,
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    return "\n".join(["time and memory relative to eager", HEAD, *map(line, rows)])


HEAD = f"{'net':<22}{'way':<32}{'images/s':>11}{'time':>7}{'quartiles':>14}{'memory MB':>11}{'memory':>8}"


def line(row: Row) -> str:
    """Return the line of the table, under HEAD."""
    low, high = row["time_ratio_quartiles"]
    memory = f"{row['memory_MB']:>11.0f}{row['memory_ratio']:>8.2f}" if row["memory_MB"] else f"{'-':>11}{'-':>8}"
    return (
        f"{row['net']:<22}{row['way']:<32}{row['images_per_s']:>11.2f}{row['time_ratio']:>7.2f}"
        f"{f'{low:.2f}-{high:.2f}':>14}{memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["yolov4-tiny", "yolov4"])
    parser.add_argument("--image-size", type=int, default=416, metavar="PX")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, help="of a mini-batch (default 1, on CUDA 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="these ways and eager")
    parser.add_argument("--out", type=Path, help="(default: in benchmarks/results, with the name of a GPU)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    ways = [name for name in ways_on(device) if not args.only or name in args.only or name == "eager"]
    if left_out := [name for name in WAYS if name not in ways_on(device)]:
        print(f"left out, because this device gains nothing from it: {'; '.join(left_out)}")
    image_count = args.images or (8 if device.type == "cuda" else 1)
    rows: list[Row] = []
    for net in args.nets:
        rows += measure(net, args.image_size, ways, image_count, args.rounds, device)
        print(table(rows[-len(ways) :]), flush=True)
    write(args.out or results_path("train_step", device), {"rows": rows}, circumstances(device))


if __name__ == "__main__":
    main()
