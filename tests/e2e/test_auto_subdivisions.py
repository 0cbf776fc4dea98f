"""--subdivisions auto: the fewest that fit, on a GPU that is played by a CPU with little room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import auto_subdivisions
from engine.auto_subdivisions import noise_batch, resolve_subdivisions, subdivisions_that_fit
from engine.job import Job, parse_job
from models.network import Network
from options import TrainOptions
from utils.errors import UserError
from utils.flags import parse_flags

CPU = torch.device("cpu")


def job_of(scenes: Path, cfg: str, *flags: str) -> Job:
    return parse_job(["--data", str(scenes), "--cfg", cfg, "--subdivisions", "auto", *flags])


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Two images of 96 x 96 fit and no more; returns the shapes that were tried."""
    tried: list[tuple[int, ...]] = []
    forward = Network.forward

    def limited(network: Network, images: Tensor) -> Any:
        tried.append(tuple(images.shape))
        if len(images) * images.shape[2] * images.shape[3] > 2 * 96 * 96:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, images)

    monkeypatch.setattr(Network, "forward", limited)
    return tried


def test_the_fewest_that_fit_are_found_at_the_largest_size(scenes, toy_cfg, small_memory) -> None:
    assert subdivisions_that_fit(job_of(scenes, toy_cfg, "--batch-size", "16"), CPU) == 4  # 4 of 64 x 64
    assert subdivisions_that_fit(job_of(scenes, toy_cfg, "--batch-size", "16", "--multi-scale", "1.5"), CPU) == 8
    assert {shape[2:] for shape in small_memory} == {(64, 64), (96, 96)}


def test_they_divide_the_batch(scenes, toy_cfg, small_memory) -> None:
    assert subdivisions_that_fit(job_of(scenes, toy_cfg, "--batch-size", "6", "--image-size", "96"), CPU) == 3
    assert subdivisions_that_fit(job_of(scenes, toy_cfg, "--batch-size", "14"), CPU) == 7  # 4 would, were it a divisor


def test_an_image_that_does_not_fit_is_the_users_error(scenes, toy_cfg, small_memory) -> None:
    with pytest.raises(UserError, match="out of memory with one image"):
        subdivisions_that_fit(job_of(scenes, toy_cfg, "--image-size", "160"), CPU)


def test_the_dry_run_is_for_the_norm_that_small_mini_batches_get(scenes, toy_cfg, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        auto_subdivisions, "make_network", lambda job, device: asked.append(job.options.norm.norm) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        subdivisions_that_fit(job_of(scenes, toy_cfg, "--norm", "auto"), CPU)
    assert asked == ["cmbn"]


def test_on_a_cpu_a_batch_is_not_cut(scenes, toy_cfg, capsys) -> None:
    job = resolve_subdivisions(job_of(scenes, toy_cfg, "--device", "cpu"))
    assert job.options.optim.subdivisions == 1 and job.mini_batch == 4
    assert "--subdivisions auto is for GPUs" in capsys.readouterr().out


def test_a_number_that_was_typed_stays(scenes, toy_cfg) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--subdivisions", "4"])
    assert resolve_subdivisions(job) is job


def test_the_dry_runs_images_are_full_of_boxes(scenes, toy_cfg) -> None:
    batch = noise_batch(job_of(scenes, toy_cfg))
    assert batch.images.shape == (4, 3, 64, 64)
    assert len(batch.targets) == 4 * 32 and (batch.targets.boxes[:, 2:] > batch.targets.boxes[:, :2]).all()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_what_is_neither_a_number_nor_auto_is_refused(text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_flags(TrainOptions, ["--subdivisions", text])
    assert "must be a number of at least 1, or auto" in capsys.readouterr().err
