"""--subdivisions auto: the fewest that fit, on a CPU that pretends to have little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import auto_subdivisions
from engine.auto_subdivisions import noise_batch, subdivisions_that_fit
from engine.job import parse_job
from models.network import Network
from models.norms.options import NormOptions
from options import TrainOptions
from utils.errors import UserError
from utils.flags import parse_flags

CPU = torch.device("cpu")


def that_fit(scenes: Path, cfg: str, *flags: str) -> int:
    job = parse_job(["--data", str(scenes), "--cfg", cfg, "--subdivisions", "1", *flags])
    return subdivisions_that_fit(job.options, job.plan, CPU)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Two images of 96 x 96 fit and no more; returns the shapes that were forwarded."""
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
    assert that_fit(scenes, toy_cfg, "--batch-size", "16") == 4  # 4 of 64 x 64
    assert that_fit(scenes, toy_cfg, "--batch-size", "16", "--multi-scale", "1.5") == 8
    assert {shape[2:] for shape in small_memory} == {(64, 64), (96, 96)}


def test_they_divide_the_batch(scenes, toy_cfg, small_memory) -> None:
    assert that_fit(scenes, toy_cfg, "--batch-size", "6", "--image-size", "96") == 3
    assert that_fit(scenes, toy_cfg, "--batch-size", "14") == 7  # 4 would fit, but is not a divisor


def test_an_image_that_does_not_fit_is_the_users_error(scenes, toy_cfg, small_memory) -> None:
    with pytest.raises(UserError, match="out of memory with one image"):
        that_fit(scenes, toy_cfg, "--image-size", "160")


def test_the_dry_run_uses_the_norm_that_small_mini_batches_get(scenes, toy_cfg, monkeypatch) -> None:
    norms = []

    def make_network(options: TrainOptions, plan: object, device: object) -> None:
        norms.append(options.norm.norm)
        raise ZeroDivisionError

    monkeypatch.setattr(auto_subdivisions, "make_network", make_network)
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--norm", "bn"])
    auto = replace(job.options, norm=NormOptions(norm="auto"))
    with pytest.raises(ZeroDivisionError):
        subdivisions_that_fit(auto, job.plan, CPU)
    assert norms == ["cmbn:carry"]


def test_on_a_cpu_a_batch_is_not_cut(scenes, toy_cfg, capsys) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--subdivisions", "auto", "--device", "cpu"])
    assert job.options.optim.subdivisions == 1 and job.mini_batch == 4
    assert "--subdivisions auto is for GPUs" in capsys.readouterr().out


def test_a_typed_number_is_kept(scenes, toy_cfg) -> None:
    job = parse_job(["--data", str(scenes), "--cfg", toy_cfg, "--subdivisions", "4"])
    assert job.options.optim.subdivisions == 4


def test_the_dry_runs_images_are_full_of_boxes() -> None:
    batch = noise_batch(4, (64, 64))
    assert batch.images.shape == (4, 3, 64, 64)
    assert len(batch.targets) == 4 * 32 and (batch.targets.boxes[:, 2:] > batch.targets.boxes[:, :2]).all()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_what_is_neither_a_number_nor_auto_is_refused(text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_flags(TrainOptions, ["--subdivisions", text])
    assert "must be a number of at least 1, or auto" in capsys.readouterr().err
