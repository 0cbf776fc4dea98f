"""norm_report.txt and norm_report.png: per layer, how far statistics of mini-batches are from the population's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.plots import plot_layer_gaps
from models.detector import Detector
from models.norms.effective_batch import describe_norm, effective_images
from models.norms.options import stored_norm
from models.norms.parts import norm_parts
from models.norms.report import measure_norms
from utils.atomic_file import warn_on_disk_error, write_text
from utils.checkpoint import Checkpoint


def write_norm_report(folder: Path, checkpoint: Checkpoint, detector: Detector, images: Sequence[Tensor]) -> str:
    """Measure on `images` (see `measure_norms`) and write both files. Returns the text."""
    batch, subdivisions = (int(checkpoint.settings.get(name, 1)) for name in ("batch_size", "subdivisions"))
    mini_batch = checkpoint.mini_batch or batch // subdivisions
    parts = norm_parts(stored_norm(checkpoint.norm, detector.network.plan), detector.network.plan)
    report = measure_norms(detector.network, images)
    cut = {"mini_batch": mini_batch, "subdivisions": subdivisions}
    pooled = filter(None, (effective_images(part.options, **cut) for part in parts))
    trained = "\n".join(f"{part.words}: " * (len(parts) > 1) + describe_norm(part.options, **cut) for part in parts)
    verdict = report.verdict(mini_batch=mini_batch, effective=min(pooled, default=None))
    text = f"{report.table()}\n\ntrained with {trained}\n{verdict}\n"
    with warn_on_disk_error(folder / "norm_report.txt"):
        write_text(folder / "norm_report.txt", text)
    sigma = np.array([[*layer.sigma.values(), layer.stale_sigma] for layer in report.layers])
    mean = np.array([[*layer.mean.values(), layer.stale_mean] for layer in report.layers])
    panels = {"deviations differ from the population's by": sigma, "means differ by, in deviations": mean}
    names = [f"{layer.layer}  {layer.name}  {layer.channels}" for layer in report.layers]
    with warn_on_disk_error(folder / "norm_report.png"):
        plot_layer_gaps(panels, names, [*map(str, report.sizes), "all"], folder / "norm_report.png")
    return text
