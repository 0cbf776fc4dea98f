"""A file is there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.atomic_file import atomic_write, write_text


def test_the_old_content_stays_until_the_new_is_complete(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"


def test_a_link_stays_one_and_its_target_is_new(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"old")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere" / "a")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "elsewhere" / "a").read_bytes() == b"new"


def test_text_is_utf_8_with_half_surrogates_escaped(tmp_path: Path):
    write_text(tmp_path / "new" / "a.txt", "猫 \ud83d\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "猫 \\ud83d\n".encode()
