"""Cost of each norm: time of a training step and memory, relative to stock nn.BatchNorm2d.

    python -m benchmarks.norm_cost [--device cpu] [--sizes 160 224] [--minibatches 1 2 4] [--rounds 7] [--only cmbn ...]
    python -m benchmarks.norm_cost --net yolov4 --sizes 416 --forwards 2 --rounds 2 --only cmbn:carry --out FILE

The network is yolov4-tiny up to its first head (17 normalized convolutions, 4.9 M weights), or a whole one with --net;
a step is a batch of --forwards mini-batches, forward and backward each, and SGD. There is no burn-in. All norms take
turns in every round, because the speed of a machine changes; a ratio is the median over rounds of t(norm) / t(bn) in
the same round. --only takes what is typed after train.py's --norm: --only cmbn 'cbn:window=8'.

Memory: on CUDA the peak of a step above what was allocated before. On a CPU, which has no such counter, what autograd
saves for the backward of one mini-batch. "history": what the norm keeps beyond BN's own state.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.measured import Row, against, circumstances, results_path, wait_for, write
from cfg.convolution import ConvSpec
from cfg.plan import Plan, load_plan, parse_plan
from models.network import Network
from models.norms import cmbn
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.table import NORMS
from study.memory import saved_bytes, state_bytes
from study.recipes import settings_of, with_burn_in
from utils.clock import BatchClock
from utils.environment import pick_device
from utils.errors import exit_on_error

FORWARDS = 4  # mini-batches in a batch
# Each norm with its defaults, and with the options that change its cost.
RECIPES = (
    *(name for name in NORMS if name != "syncbn"),
    "bn:running=pooled",
    "bn --weight-centralization",
    "bn:ws",
    "gn:ws",
    "cmbn:ws",
    "ghost:size=2",
    *(f"cmbn:gradient={gradient}" for gradient in cmbn.GRADIENTS[1:]),
    "cmbn:carry",
    "cmbn:positions=0",
    "cbn:gradient=share",
    "cbn:gradient=share,estimator=none",
    "cbn:gradient=share,estimator=taylor,positions=0",
)


class Contestant:
    """One network with its norm, optimizer and clock."""

    def __init__(self, recipe: str, plan: Plan, forwards: int, device: torch.device) -> None:
        torch.manual_seed(0)
        options = NormOptions(**settings_of(recipe))
        options = replace(options, norm=str(with_burn_in(options.spec, 0)))
        self.recipe, self.has_running_statistics = recipe, options.spec.has_running_statistics
        self.forwards = forwards
        self.network = Network(plan, norm_factory(options)).to(device).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)
        self.clock = BatchClock(self.network)
        self.held_bytes = 0  # the most between two mini-batches

    def step(self, images: torch.Tensor, *, weighed: bool = False) -> None:
        """Take one training step. weighed: count what the norms hold, which takes a while."""
        for part in self.clock.minibatches(images.chunk(self.forwards)):
            torch.autograd.backward([output.square().mean() for output in self.outputs(part)])
            if weighed:
                self.held_bytes = max(self.held_bytes, state_bytes(self.network))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.stepped()

    def outputs(self, images: torch.Tensor) -> list[torch.Tensor]:
        if self.network.plan.heads:
            return [head.logits for head in self.network(images)]
        return [self.network.last_output(images)]

    def history_bytes(self) -> int:
        stock = 2 * 4 if self.has_running_statistics else 0
        channels = sum(m.out_channels for m in self.network.modules() if isinstance(m, nn.Conv2d))
        return max(0, self.held_bytes - stock * channels)

    def saved_bytes(self, images: torch.Tensor) -> int:
        """Return the bytes that autograd saves for the backward of one mini-batch, without weights."""
        return saved_bytes(partial(self.outputs, images), self.network)


def headless_tiny(activation: str) -> Plan:
    """Return yolov4-tiny's plan up to the layer before its first head's output."""
    plan = load_plan("yolov4-tiny")
    lines = plan.source_text.replace("activation=leaky", f"activation={activation}").splitlines()
    last = plan.nodes[plan.heads[0] - 1].line
    return parse_plan("\n".join(lines[: last - 1]), path="yolov4-tiny without heads.cfg")


def measure(
    recipes: Sequence[str], plan: Plan, side_px: int, image_count: int, forwards: int, rounds: int, device: torch.device
) -> list[Row]:
    """Return one row per norm. image_count: of a mini-batch. forwards: of a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(forwards * image_count, 3, side_px, side_px, generator=generator).to(device)
    contestants = [Contestant(recipe, plan, forwards, device) for recipe in recipes]
    seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 1):
        for contestant in contestants:
            wait_for(device)
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            contestant.step(images, weighed=turn == 0)
            wait_for(device)
            if turn:  # the first round warms up
                seconds[contestant.recipe].append(time.perf_counter() - start)
                if device.type == "cuda":
                    peaks[contestant.recipe] = torch.cuda.max_memory_allocated(device) - before
    if device.type != "cuda":
        peaks = {c.recipe: c.saved_bytes(images[:image_count]) for c in contestants}
    weights = sum(p.numel() for p in contestants[0].network.parameters() if p.ndim == 4)
    rows = []
    for contestant in contestants:
        recipe = contestant.recipe
        rows.append(
            {
                "norm": recipe,
                "net": plan.name,
                "activation": next(node.spec.activation for node in plan.nodes if isinstance(node.spec, ConvSpec)),
                "size_px": side_px,
                "mini_batch": image_count,
                "step_s": round(statistics.median(seconds[recipe]), 4),
                **against(seconds["bn"], seconds[recipe]),
                "memory_MB": round(peaks[recipe] / 2**20, 1),
                "memory_ratio": round(peaks[recipe] / peaks["bn"], 3),
                "history_MB": round(contestant.history_bytes() / 2**20, 2),
                "history_in_weights": round(contestant.history_bytes() / 4 / weights, 2),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return time ratios by size and mini-batch, then memory at the largest."""
    cases = sorted({(row["size_px"], row["mini_batch"]) for row in rows})
    at = {(row["norm"], row["size_px"], row["mini_batch"]): row for row in rows}
    recipes = list(dict.fromkeys(row["norm"] for row in rows))
    width = 2 + max(map(len, recipes))
    head = [f"{size} px, {image_count}" for size, image_count in cases]
    lines = ["time of a training step / stock BN's, by size and mini-batch; memory and history at the last"]
    lines.append(f"{'norm':<{width}}" + "".join(f"{text:>12}" for text in head) + f"{'memory':>9}{'history':>10}")
    for recipe in recipes:
        cells = [at[recipe, size, image_count] for size, image_count in cases]
        ratios = "".join(f"{cell['time_ratio']:>12.2f}" for cell in cells)
        lines.append(f"{recipe:<{width}}{ratios}{cells[-1]['memory_ratio']:>9.2f}{cells[-1]['history_MB']:>7.1f} MB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224], help="input side in px")
    parser.add_argument("--minibatches", type=int, nargs="+", default=[1, 2, 4], help="images per forward")
    parser.add_argument("--net", help="a whole network, such as yolov4, in place of yolov4-tiny up to its first head")
    parser.add_argument("--forwards", type=int, default=FORWARDS, help="mini-batches of a batch (default 4)")
    parser.add_argument("--activation", default="leaky", help="without --net: of every convolution (default leaky)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--only", nargs="+", metavar="NORM", help="these norms and bn")
    parser.add_argument("--out", type=Path, help="(default: in benchmarks/results, with the name of a GPU)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    recipes = tuple(dict.fromkeys(["bn", *(args.only or RECIPES)]))
    rows: list[Row] = []
    for side_px in args.sizes:
        plan = load_plan(args.net, input_hw=(side_px, side_px)) if args.net else headless_tiny(args.activation)
        for image_count in args.minibatches:
            rows += measure(recipes, plan, side_px, image_count, args.forwards, args.rounds, device)
            took_s = rows[-len(recipes)]["step_s"]
            print(f"{side_px} px, mini-batch {image_count}: bn takes {took_s} s a step", flush=True)
    print("\n" + table(rows))
    write(args.out or results_path("norm_cost", device), {"rows": rows}, circumstances(device))


if __name__ == "__main__":
    exit_on_error(main)
