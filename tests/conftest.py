"""What every test may ask for, and the quiet circumstances all of them run in."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from utils.seed import seed_everything

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)  # small tensors: more threads cost more than they give
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and children would ignore it, too


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same seed, whichever ran before it."""
    seed_everything(0)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--amp auto` chooses float32 on every machine, so that tests find the same bits on all of them.

    Children have it by `tests/e2e/children.py`; a subprocess computes in what the machine is fast with.
    """
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "")


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def shared() -> Path:
    """The folder `shared` beside the checkout: images and reference files too large for the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs reference files in {folder}")
    return folder
