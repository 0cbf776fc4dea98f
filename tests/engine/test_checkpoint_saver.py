"""When checkpoints are written, and a disk that is full."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.checkpoint_saver import CheckpointSaver
from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import Checkpoint
from utils.errors import UserError


@pytest.fixture
def saver(tmp_path: Path) -> CheckpointSaver:
    return CheckpointSaver(tmp_path)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))


def test_a_checkpoint_that_cannot_be_written_is_a_line(saver, monkeypatch, capsys):
    assert saver.save("last.pt", toy_checkpoint(step=1))
    fill_disk(monkeypatch)
    assert not saver.save("last.pt", toy_checkpoint(step=2))
    assert f"error: {saver.folder / 'last.pt'} was not written (No space left on device)" in capsys.readouterr().err
    assert Checkpoint.from_file(saver.folder / "last.pt").step == 1


def test_a_run_that_can_save_nothing_ends_after_five_tries(saver, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fill_disk(patch)
        for _ in range(4):
            assert not saver.save("last.pt", toy_checkpoint())
        assert capsys.readouterr().err.count("nothing that is trained here can be saved") == 1
        with pytest.raises(UserError, match=f"^{saver.folder}: nothing that is trained here can be saved, in 5 tries"):
            saver.save("best.pt", toy_checkpoint())


def test_a_run_that_was_saved_once_goes_on_without(saver, monkeypatch):
    assert saver.save("last.pt", toy_checkpoint())
    fill_disk(monkeypatch)
    assert not any(saver.save("last.pt", toy_checkpoint()) for _ in range(9))


def test_time_makes_a_save_due_and_so_does_the_end_of_an_epoch_that_took_longer_than_saving(
    tmp_path: Path, monkeypatch
):
    always, seldom = (CheckpointSaver(tmp_path, every_s=s) for s in (0, 3600))
    assert always.is_due() and not seldom.is_due()
    assert seldom.is_due(at_epoch_end=True)
    monkeypatch.setattr(Checkpoint, "to_file", lambda *_: time.sleep(0.2))
    seldom.save("last.pt", toy_checkpoint())
    assert not seldom.is_due(at_epoch_end=True)
