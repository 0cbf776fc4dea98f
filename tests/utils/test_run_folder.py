"""The folder of a run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.run_folder import free_folder, newest_run, writable_folder


def test_the_default_folder_gets_a_number_when_taken(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = free_folder(None, default="digits-pico-bn")
        assert folder.is_dir()
        names.append(str(folder))
    assert names == [str(Path("runs") / f"digits-pico-bn{suffix}") for suffix in ("", "-2", "-3")]


def test_the_run_to_resume_is_the_newest_that_has_not_finished(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, (name, *others) in enumerate([("finished", "metrics.json"), ("stopped",), ("older",)]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("last.pt", *others):
            (tmp_path / "runs" / name / file).touch()
        os.utime(tmp_path / "runs" / name / "last.pt", (1000 - age, 1000 - age))
    assert newest_run() == Path("runs/stopped")
    for name in ("stopped", "older"):
        (tmp_path / "runs" / name / "metrics.json").touch()
    assert newest_run() == Path("runs/finished")


def test_runs_that_begin_at_the_same_moment_have_a_folder_each(tmp_path: Path, monkeypatch):
    """When they look, neither has made its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    folders = [free_folder(None, default="digits-pico-bn") for _ in range(3)]
    assert len(set(folders)) == len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize("place", ["runs", "elsewhere"])
def test_where_nothing_can_be_made_it_is_said(tmp_path: Path, monkeypatch, place: str):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    Path("elsewhere").symlink_to("gone")
    with pytest.raises(UserError, match=f"^{place}: cannot be created, File exists$"):
        free_folder(None, default="x") if place == "runs" else writable_folder(Path(place))


def test_a_folder_that_cannot_be_written_to_is_the_users_error(tmp_path: Path, monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written to, Permission denied$"):
        writable_folder(tmp_path)


def test_a_typed_folder_is_taken_as_it_is_when_free(tmp_path: Path):
    assert free_folder(str(tmp_path / "new"), default="x") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert free_folder(str(tmp_path / "empty"), default="x") == tmp_path / "empty"


def test_a_typed_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"^{taken}: already exists"):
            free_folder(str(taken), default="x")
