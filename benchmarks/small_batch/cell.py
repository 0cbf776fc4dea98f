"""One cell: a training through train.py's own functions, then the test split, then what it cost."""

from __future__ import annotations

import csv
import datetime
import hashlib
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks import measured
from benchmarks.small_batch.grid import BATCH, Cell
from benchmarks.small_batch.recipes import record_of, settings_of
from benchmarks.small_batch.sources import Source, prepare
from benchmarks.tensor_bytes import saved_storages, state_storages
from cfg.plan import Plan
from data.annotation_formats import open_image_set
from data.image_set import ImageSet
from engine.job import Job, job_of
from engine.loss_watch import TrainingLost
from evaluation.evaluator import Evaluator
from evaluation.recalibration import sample_images
from models.detector import Detector
from models.network import Network
from models.norms.effective_batch import effective_images
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.report import measure_norms
from models.norms.running_stats import has_running_statistics
from models.yolo.postprocess import DetectionOptions
from options import TrainOptions
from utils.checkpoint import Checkpoint
from utils.clock import BatchClock
from utils.environment import describe, pick_device
from utils.errors import UserError

EVALS = 4
_REPORT_IMAGES = 128
ROOT = Path(__file__).resolve().parent.parent.parent


def run_cell(
    cell: Cell, folder: Path, *, folders: Mapping[str, str], device: str, workers: int, commit: str
) -> dict[str, Any]:
    """Train and evaluate a cell, and return its row.

    The test split is opened once the best weights are written, and never in tuning. folder: of the run, created here.
    folders: of the data that is not made here. commit: of the code as loaded; files may have changed since.
    """
    start, start_cpu = time.monotonic(), time.process_time()
    source = prepare(cell, folders)
    job = job_of_cell(cell, source, device=device, workers=workers)
    options, val_set = job.options, job.val_set
    row: dict[str, Any] = {
        **asdict(cell),
        "shift": source.shift,
        "settings": record_of(options.norm),
        "diverged": False,
    }
    scores = {"val_AP": 0.0, "val_AP50": 0.0, "test_AP": None, "test_AP50": None}
    is_tested = cell.role == "main" and source.test is not None
    try:
        train.train(job, folder)
        table = train.finish(job, folder).measure()
        scores |= {"val_AP": table.AP, "val_AP50": table.AP50}
        best = Checkpoint.from_file(folder / "best.pt")
        detector = Detector.from_checkpoint(
            best, DetectionOptions(), path=str(folder / "best.pt"), device=pick_device(device)
        )
        if is_tested:
            test_set = open_image_set(source.path, str(source.test))
            check_apart(job.train_set, val_set, test_set)
            table = Evaluator(detector, test_set, batch_size=BATCH, workers=workers).measure()
            scores |= {"test_AP": table.AP, "test_AP50": table.AP50}
        row |= trained(folder) | gaps(detector, val_set, cell, options.norm, workers=workers)
    except TrainingLost:
        row["diverged"] = True  # a result: it scores 0
        scores |= {"test_AP": 0.0, "test_AP50": 0.0} if is_tested else {}
    row |= {name: value if value is None else round(value, 5) for name, value in scores.items()}
    row |= memory(cell, options, job.plan)
    row |= {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time() - start_cpu, 1)}
    row |= {"commit": commit, "date": datetime.date.today().isoformat()}
    return {**row, "machine": describe(pick_device(device))}


def job_of_cell(cell: Cell, source: Source, *, device: str, workers: int) -> Job:
    """Return the job as train.py makes it from typed flags."""
    given = {
        "data": source.path,
        "cfg": source.cfg,
        "image_size": source.input_hw,
        "multi_scale": 1.0,
        "seed": cell.seed,
        "device": device,
        "amp": "off",  # the same arithmetic on CPU and GPU
        "workers": workers,
        "evals": EVALS,
        "max_steps": cell.steps,
        "optimizer": "sgd",
        "batch_size": BATCH,
        "subdivisions": BATCH // cell.mini_batch,
        "learning_rate": cell.rate,
        "final_learning_rate": cell.rate / 100,
        "lr_policy": "cosine",
        "burn_in_steps": cell.steps // 10,
        "mosaic": 0.5 if cell.mosaic else 0.0,
        **settings_of(cell.recipe),
    }
    return job_of(given)


def check_apart(train_set: ImageSet, val_set: ImageSet, test_set: ImageSet) -> None:
    """Raise UserError if the test split shares an image with a split used in training or selection."""
    for seen in (train_set, val_set):
        if common := len({*test_set.paths.tolist()} & {*seen.paths.tolist()}):
            raise UserError(f"{test_set.name}: '{test_set.split}' shares {common} images with '{seen.split}'")


def trained(folder: Path) -> dict[str, Any]:
    """Return speed, loss, curve and first batch, read from the run's files.

    step_s: seconds of an optimizer step with its loading, in the fastest epoch after the first and before any freeze,
    because other processes can only slow an epoch down. curve: [training images, AP on val] at each evaluation.
    first_batch: a hash of its image, equal in runs on the same images.
    """
    with open(folder / "results.csv", newline="") as file:
        epochs = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    paces = [
        row["seconds"] / (row["step"] - before["step"])
        for before, row in pairwise([{"step": 0.0}, *epochs])
        if row["step"] <= 0.7 * epochs[-1]["step"]
    ]
    step_s = min(paces[1:] or paces or [epochs[0]["seconds"] / epochs[0]["step"]])
    return {
        "step_s": round(step_s, 5),
        "images_per_s": round(BATCH / step_s, 2),
        "train_loss": round(epochs[-1]["loss"], 4),
        "curve": [[int(row["step"]) * BATCH, row["AP"]] for row in epochs if "AP" in row],
        "first_batch": hashlib.sha256((folder / "first_batch.png").read_bytes()).hexdigest()[:12],
    }


def gaps(detector: Detector, val_set: ImageSet, cell: Cell, norm: NormOptions, *, workers: int) -> dict[str, Any]:
    """Return per layer how far the statistics of mini-batches of val images are from the running ones.

    statistics_of: images behind the statistics that the norm trained with in the end, None if not of mini-batches.
    gap: root mean square of sigma_b / sigma - 1 by layer, for mini-batches b of 1, 2, 4, 8 and 16 images.
    """
    cut = {"mini_batch": cell.mini_batch, "subdivisions": BATCH // cell.mini_batch}
    image_count = effective_images(norm, **cut)
    is_frozen = norm.norm_freeze_after is not None and norm.norm_freeze_after < 1
    found: dict[str, Any] = {"statistics_of": None if is_frozen else image_count, "gap": None}
    if any(map(has_running_statistics, detector.network.modules())):
        images = sample_images(val_set, detector, image_count=_REPORT_IMAGES, batch_size=BATCH, workers=workers)
        report = measure_norms(detector.network, images)
        found["gap"] = {str(size): [round(gap.sigma[size], 4) for gap in report.layers] for size in report.sizes}
    return found


def memory(cell: Cell, options: TrainOptions, plan: Plan) -> dict[str, Any]:
    """Return the memory of one batch in MB, at the end of training, after any burn-in.

    On CUDA the peak of allocations above what was allocated before. On a CPU, which has no such counter, what autograd
    saves for the backward of a mini-batch, and what the norms hold then beyond batch norm's own state.
    """
    device, parts = pick_device(options.device), BATCH // cell.mini_batch
    images = torch.rand(cell.mini_batch, 3, *plan.net.input_hw, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    network = Network(plan, norm_factory(options.norm)).to(device).train()
    most = 0
    for pixels in BatchClock(network, step=cell.steps - 1).minibatches([images] * parts):
        if device.type == "cuda":
            torch.autograd.backward([head.logits.square().mean() for head in network(pixels)])
        else:
            saved = saved_storages(partial(network, pixels), network)
            most = max(most, sum((saved | state_storages(network)).values()))
    if device.type == "cuda":
        most, what = torch.cuda.max_memory_allocated(device) - before, "peak allocated by a batch"
    else:
        buffers = (norm.get_buffer("running_mean") for norm in network.modules() if has_running_statistics(norm))
        most -= 2 * 4 * sum(buffer.numel() for buffer in buffers)  # running mean and variance
        what = "saved for a mini-batch's backward, and held by the norms"
    return {"memory_MB": round(most / 2**20, 2), "memory_of": what}


def code_version() -> str:
    """Return the commit, with "+changes" if code differs from it."""
    command = ["git", "status", "--porcelain", "--", "*.py", "*.cfg"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return measured.commit() + ("+changes" if changed else "")
