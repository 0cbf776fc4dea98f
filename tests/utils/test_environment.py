"""The sentences a user reads when the machine lacks something. What is absent is simulated."""

from __future__ import annotations

import importlib
import os
import random
import warnings

import numpy as np
import pytest
import torch

from utils import environment
from utils.environment import check_opencv, check_torchvision, describe, pick_device
from utils.errors import UserError
from utils.seed import seed_everything


def simulate_devices(monkeypatch: pytest.MonkeyPatch, *, cuda: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def simulate_import_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "expected"),
    [
        ("auto", 2, False, "cuda"),
        ("auto", 0, True, "mps"),
        ("auto", 0, False, "cpu"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda"),
        ("cuda:1", 2, False, "cuda:1"),
        ("0", 2, False, "cuda:0"),
        ("1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_a_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: int, mps: bool, expected: str
) -> None:
    simulate_devices(monkeypatch, cuda=cuda, mps=mps)
    assert pick_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("cuda", 0, "absent.*choose cpu"),
        ("cuda:2", 2, "the last one is cuda:1"),
        ("2", 2, "'cuda:2' is absent: the last one is cuda:1"),
        ("0", 0, "absent.*choose cpu"),
        ("0,1", 2, "none of auto, cpu"),
        ("mps", 0, "absent"),
        ("gpu", 1, "none of auto, cpu"),
        ("cuda:", 1, "none of"),
        ("cuda:-1", 1, "none of"),
        ("cpu:1", 1, "none of"),
        ("", 1, "none of"),
    ],
)
def test_a_device_that_is_not(monkeypatch: pytest.MonkeyPatch, name: str, cuda: int, message: str) -> None:
    simulate_devices(monkeypatch, cuda=cuda)
    with pytest.raises(UserError, match=message):
        pick_device(name)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        ImportError("libcudart.so.13: cannot open shared object file"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
        RuntimeError(""),
    ],
)
def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    simulate_import_error(monkeypatch, error)
    with pytest.raises(UserError, match="pip install --force-reinstall torch torchvision") as caught:
        check_torchvision()
    assert str(error) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchvision_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_import_error(monkeypatch, ModuleNotFoundError("No module named", name="torchvision"))
    with pytest.raises(UserError, match="not installed"):
        check_torchvision()


def test_a_dependency_of_torchvision_absent_is_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_import_error(monkeypatch, ModuleNotFoundError("No module named", name="PIL"))
    with pytest.raises(ModuleNotFoundError):
        check_torchvision()


def test_the_installed_torchvision_passes() -> None:
    assert check_torchvision() is None


@pytest.mark.parametrize("installed", [{"opencv-python-headless"}, {"opencv-contrib-python"}, set()])
def test_one_opencv_is_silent(monkeypatch: pytest.MonkeyPatch, installed: set[str]) -> None:
    monkeypatch.setattr(environment, "_version_of", lambda name: "5.0" if name in installed else "absent")
    with warnings.catch_warnings(record=True) as caught:
        check_opencv()
    assert caught == []


def test_two_opencvs_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ("opencv-python", "opencv-python-headless")
    monkeypatch.setattr(environment, "_version_of", lambda name: "5.0" if name in two else "absent")
    with pytest.warns(UserWarning, match="pip uninstall opencv-python opencv-python-headless"):
        check_opencv()


def test_describe_is_text_without_gaps() -> None:
    description = describe(torch.device("cpu"))
    assert description["device"] == "cpu" and description["torch"] == torch.__version__
    assert {"python", "platform", "torchvision", "cpu", "cpu threads"} < set(description)
    assert all(isinstance(text, str) and text for text in description.values())


def test_seed_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert draw() != first


@pytest.mark.parametrize(
    ("device", "workers", "typed", "threads"),
    [("cpu", 2, None, 3), ("cpu", 0, None, 7), ("cuda", 2, None, 7), ("cpu", 2, "4", 7)],
)
def test_a_core_is_left_to_loaders(monkeypatch, device: str, workers: int, typed: str | None, threads: int) -> None:
    """Of 4 cores, where 7 threads were set before."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if typed:
        monkeypatch.setenv("OMP_NUM_THREADS", typed)
    counts = [7]
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    environment.leave_a_core_to_loaders(torch.device(device), workers)
    assert counts[-1] == threads
