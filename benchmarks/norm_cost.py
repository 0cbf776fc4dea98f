"""What each norm costs: time of a training step and memory, relative to stock nn.BatchNorm2d.

    python benchmarks/norm_cost.py [--device cpu] [--sizes 160 224] [--minibatches 1 2 4] [--rounds 7] [--only cmbn ...]

The network is yolov4-tiny up to its first head (17 normalized convolutions, 4.9 M weights); a step is a batch of
four mini-batches, forward and backward each, and SGD. All norms take turns in every round, so that a machine's
moods hit them alike; a ratio is the median over rounds of t(norm) / t(bn) of the same round.

Memory: on CUDA the peak of a step beyond what lay there before. On a CPU, where no such counter exists, what
autograd saves for the backward of one mini-batch. "history": what the norm keeps beside BN's own state.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.measured import against, circumstances, results_path, write  # noqa: E402
from benchmarks.tensor_bytes import saved_bytes, state_bytes  # noqa: E402
from cfg.plan import Plan, load_plan, parse_plan  # noqa: E402
from models.network import Network  # noqa: E402
from models.norms.table import NormOptions, norm_factory  # noqa: E402
from utils.clock import BatchClock  # noqa: E402
from utils.environment import pick_device  # noqa: E402

PARTS = 4  # mini-batches in a batch
KINDS = {
    "bn": {"norm": "bn"},
    "bn pooled": {"norm": "bn", "norm_running": "pooled"},
    "cmbn share": {"norm": "cmbn", "norm_gradient": "share"},
    "cmbn weights": {"norm": "cmbn", "norm_gradient": "weights"},
    "cmbn weights, carried": {"norm": "cmbn", "norm_gradient": "weights", "norm_carry": True},
    "cmbn weights, all positions": {"norm": "cmbn", "norm_gradient": "weights", "norm_positions": 0},
    "cmbn renorm": {"norm": "cmbn", "norm_gradient": "renorm"},
    "cmbn darknet": {"norm": "cmbn", "norm_gradient": "darknet"},
    "cbn std": {"norm": "cbn", "norm_gradient": "share"},
    "cbn std, weights": {"norm": "cbn", "norm_gradient": "weights"},
    "cbn taylor, all positions": {
        "norm": "cbn",
        "norm_gradient": "share",
        "norm_estimator": "taylor",
        "norm_positions": 0,
    },
    "cbn none": {"norm": "cbn", "norm_estimator": "none"},
    "cbn-lite": {"norm": "cbn-lite"},
    "mabn": {"norm": "mabn"},
    "brn": {"norm": "brn"},
    "gn": {"norm": "gn"},
    "ln": {"norm": "ln"},
    "in": {"norm": "in"},
    "frozen": {"norm": "frozen"},
    "none": {"norm": "none"},
    "bn, centred weights": {"norm": "bn", "weight_centralization": True},
}


class Contestant:
    """One network with its norm, optimizer and clock."""

    def __init__(self, kind: str, activation: str, device: torch.device) -> None:
        torch.manual_seed(0)
        settings = dict(KINDS[kind])
        if settings["norm"] in ("cbn", "cbn-lite", "brn") or settings.get("norm_carry"):
            settings["norm_burn_in_steps"] = 0
        self.kind = kind
        self.network = Network(headless_tiny(activation), norm_factory(NormOptions(**settings))).to(device).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)
        self.clock = BatchClock(self.network)
        self.held_bytes = 0  # at most, between two mini-batches

    def step(self, images: torch.Tensor, *, weighed: bool = False) -> None:
        """weighed: see what the norms hold, which takes a while."""
        for part in self.clock.minibatches(images.chunk(PARTS)):
            self.network.last_output(part).square().mean().backward()
            if weighed:
                self.held_bytes = max(self.held_bytes, state_bytes(self.network))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.stepped()

    def history_bytes(self) -> int:
        stock = 0 if self.kind in ("gn", "ln", "in", "none") else 2 * 4
        channels = sum(m.out_channels for m in self.network.modules() if isinstance(m, nn.Conv2d))
        return max(0, self.held_bytes - stock * channels)

    def saved_bytes(self, images: torch.Tensor) -> int:
        """Of the tensors that autograd keeps for the backward of one mini-batch, weights left out."""
        return saved_bytes(partial(self.network.last_output, images), self.network)


def headless_tiny(activation: str) -> Plan:
    """yolov4-tiny's plan up to the layer before its first head's output."""
    plan = load_plan("yolov4-tiny")
    lines = plan.source_text.replace("activation=leaky", f"activation={activation}").splitlines()
    last = plan.nodes[plan.heads[0] - 1].line
    return parse_plan("\n".join(lines[: last - 1]), path="yolov4-tiny without heads.cfg")


def measure(
    kinds: list[str], activation: str, side_px: int, image_count: int, rounds: int, device: torch.device
) -> list[dict]:
    """images: of a mini-batch. One row a norm."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(PARTS * image_count, 3, side_px, side_px, generator=generator).to(device)
    contestants = [Contestant(kind, activation, device) for kind in kinds]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 1):
        for contestant in contestants:
            _wait_for(device)
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            begun = time.perf_counter()
            contestant.step(images, weighed=turn == 0)
            _wait_for(device)
            if turn:  # the first round warms up
                seconds[contestant.kind].append(time.perf_counter() - begun)
                if device.type == "cuda":
                    peaks[contestant.kind] = torch.cuda.max_memory_allocated(device) - before
    if device.type != "cuda":
        peaks = {c.kind: c.saved_bytes(images[:image_count]) for c in contestants}
    weights = sum(p.numel() for p in contestants[0].network.parameters() if p.ndim == 4)
    rows = []
    for contestant in contestants:
        kind = contestant.kind
        rows.append(
            {
                "norm": kind,
                "activation": activation,
                "size_px": side_px,
                "mini_batch": image_count,
                "step_s": round(statistics.median(seconds[kind]), 4),
                **against(seconds["bn"], seconds[kind]),
                "memory_MB": round(peaks[kind] / 2**20, 1),
                "memory_ratio": round(peaks[kind] / peaks["bn"], 3),
                "history_MB": round(contestant.history_bytes() / 2**20, 2),
                "history_in_weights": round(contestant.history_bytes() / 4 / weights, 2),
            }
        )
    return rows


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: list[dict]) -> str:
    """Time ratios by size and mini-batch, then memory at the largest."""
    cases = sorted({(row["size_px"], row["mini_batch"]) for row in rows})
    at = {(row["norm"], row["size_px"], row["mini_batch"]): row for row in rows}
    kinds = list(dict.fromkeys(row["norm"] for row in rows))
    head = [f"{size} px, {image_count}" for size, image_count in cases]
    lines = ["time of a training step / stock BN's, by size and mini-batch; memory and history at the last"]
    lines.append(f"{'norm':<28}" + "".join(f"{text:>12}" for text in head) + f"{'memory':>9}{'history':>10}")
    for kind in kinds:
        cells = [at[kind, size, image_count] for size, image_count in cases]
        ratios = "".join(f"{cell['time_ratio']:>12.2f}" for cell in cells)
        lines.append(f"{kind:<28}{ratios}{cells[-1]['memory_ratio']:>9.2f}{cells[-1]['history_MB']:>7.1f} MB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224], help="input side in px")
    parser.add_argument("--minibatches", type=int, nargs="+", default=[1, 2, 4], help="images per forward")
    parser.add_argument("--activation", default="leaky", help="of every convolution (default leaky; yolov4 has mish)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these norms and bn")
    parser.add_argument("--out", type=Path, help="(default: in benchmarks/results, with the name of a GPU)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = pick_device(asked.device)
    kinds = list(KINDS) if not asked.only else ["bn", *(kind for kind in asked.only if kind != "bn")]
    rows: list[dict] = []
    for side_px in asked.sizes:
        for image_count in asked.minibatches:
            rows += measure(kinds, asked.activation, side_px, image_count, asked.rounds, device)
            took_s = rows[-len(kinds)]["step_s"]
            print(f"{side_px} px, mini-batch {image_count}: bn takes {took_s} s a step", flush=True)
    print("\n" + table(rows))
    write(asked.out or results_path("norm_cost", device), {"rows": rows}, circumstances(device))


if __name__ == "__main__":
    main()
