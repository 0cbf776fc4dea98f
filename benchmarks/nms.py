"""Time of non-maximum suppression: our three kinds and a plain Python loop, relative to torchvision's batched_nms.

    python -m benchmarks.nms [--device cpu] [--candidates 100 1000 30000] [--rounds 9]

The candidates are a crowded image's, 608 px, of 80 classes or of one: noisy copies of 20 objects and some boxes of
the wrong class, as from a network at a low confidence. All take turns in every round, because the speed of a machine
changes; a ratio is the median over rounds of t(kind) / t(batched_nms) in the same round. The loop takes part up to
1,000 candidates. `default` suppresses by IoU as batched_nms does; the two others use distances as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from benchmarks.measured import Row, against, circumstances, results_path, write
from cfg.yolo import NMS_KINDS
from models.yolo.nms import NmsRule, classwise_nms
from utils.environment import pick_device

IOU = 0.45
MAX_LOOP = 1000  # candidates
OBJECTS, SIDE_PX = 20, 608
AT_LEAST_S = 0.02  # quicker calls are repeated within a turn


def crowd(candidates: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (M, 4) xyxy, scores (M,) and labels (M,), always the same."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand(OBJECTS, 4, generator=generator) * SIDE_PX * torch.tensor([1, 1, 0.4, 0.4])
    sizes = objects[:, 2:] + 20
    of_object = torch.randint(classes, (OBJECTS,), generator=generator)
    chosen = torch.randint(OBJECTS, (candidates,), generator=generator)
    centre = objects[chosen, :2] + torch.randn(candidates, 2, generator=generator) * sizes[chosen] * 0.15
    half = sizes[chosen] * torch.exp(torch.randn(candidates, 2, generator=generator) * 0.2) / 2
    wrong = torch.rand(candidates, generator=generator) < 0.3
    labels = torch.where(wrong, torch.randint(classes, (candidates,), generator=generator), of_object[chosen])
    scores = torch.rand(candidates, generator=generator)
    return torch.cat((centre - half, centre + half), dim=1).to(device), scores.to(device), labels.to(device)


def loop(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[int]:
    """Return the kept indices, found box by box in plain Python."""
    corners, classes = boxes.tolist(), labels.tolist()
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(classes[other] != classes[index] or iou(corners[other], corners[index]) <= IOU for other in kept):
            kept.append(index)
    return kept


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def contestants(boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor | list[int]]]:
    runs: dict[str, Callable[[], Tensor | list[int]]] = {
        "batched_nms": partial(batched_nms, boxes, scores, labels, IOU)
    }
    for kind in NMS_KINDS:
        runs[kind] = partial(classwise_nms, boxes, scores, labels, NmsRule(kind=kind, iou=IOU))
    if len(boxes) <= MAX_LOOP:
        runs["Python loop"] = partial(loop, boxes, scores, labels)
    return runs


def measure(candidates: int, classes: int, rounds: int, device: torch.device) -> list[Row]:
    """Return one row per contestant."""
    runs = contestants(*crowd(candidates, classes, device))
    kept = {name: sorted(map(int, run())) for name, run in runs.items()}  # warms up, too
    assert kept["default"] == kept["batched_nms"] == kept.get("Python loop", kept["default"])
    repeats = {name: max(1, round(AT_LEAST_S / seconds_of(run, 1, device))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, repeats[name], device))
    rows = []
    for name, times in seconds.items():
        rows.append(
            {
                "nms": name,
                "candidates": candidates,
                "classes": classes,
                "kept": len(kept[name]),
                "ms": round(1000 * statistics.median(times), 3),
                **against(seconds["batched_nms"], times),
            }
        )
    return rows


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call; on a CPU as process time, which other processes do not change."""
    start = _now_s(device)
    for _ in range(repeats):
        run()
    return (_now_s(device) - start) / repeats


def _now_s(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def table(rows: list[Row]) -> str:
    cases = list(dict.fromkeys((row["classes"], row["candidates"]) for row in rows))
    at = {(row["nms"], row["classes"], row["candidates"]): row for row in rows}
    head = [f"{candidates:,} of {classes}" for classes, candidates in cases]
    lines = ["time / batched_nms's, by candidates and classes"]
    lines.append(f"{'nms':<14}" + "".join(f"{text:>14}" for text in head))
    for name in dict.fromkeys(row["nms"] for row in rows):
        found = [at.get((name, *case)) for case in cases]
        cells = [f"{row['time_ratio']:>14.2f}" if row else f"{'-':>14}" for row in found]
        lines.append(f"{name:<14}" + "".join(cells))
    base = [at["batched_nms", classes, candidates] for classes, candidates in cases]
    milliseconds = "".join(f"{row['ms']:>14.2f}" for row in base)
    lines.append(f"{'in ms, 1.00 is':<14}{milliseconds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1000, 30_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[80, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--out", type=Path, help="(default: in benchmarks/results, with the name of a GPU)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    rows: list[Row] = []
    for classes in args.classes:
        for candidates in args.candidates:
            rows += measure(candidates, classes, args.rounds, device)
    print(table(rows))
    write(args.out or results_path("nms", device), {"rows": rows}, circumstances(device))


if __name__ == "__main__":
    main()
