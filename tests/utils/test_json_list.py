"""A json file that is valid after each row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.json_list import JsonList

ROWS = st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.integers())), max_size=5)


@given(rows=ROWS)
def test_it_holds_the_rows_so_far_at_any_time(tmp_path_factory: pytest.TempPathFactory, rows):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    growing = JsonList(path)
    for count in range(len(rows) + 1):
        assert json.loads(path.read_text(encoding="utf-8")) == rows[:count]
        if count < len(rows):
            growing.append(rows[count])
    growing.close()
    assert json.loads(path.read_text(encoding="utf-8")) == rows


def test_each_row_is_a_line(tmp_path: Path):
    growing = JsonList(tmp_path / "rows.json")
    growing.append({"a": 1})
    growing.append({"a": 2})
    assert (tmp_path / "rows.json").read_text().splitlines() == ["[", '{"a": 1},', '{"a": 2}', "]"]


class FullDisk:
    """A file on a disk with room for `room` bytes at its end."""

    def __init__(self, file, room: int) -> None:
        self._file, self._room = file, room

    def write(self, content: bytes) -> int:
        end = self._file.seek(0, 1)
        if end + len(content) > self._room:
            content = content[: max(0, self._room - end)]
            if not content:
                raise OSError(28, "No space left on device")
        return self._file.write(content)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", range(13, 26))
def test_a_full_disk_leaves_the_rows_before(tmp_path: Path, room: int):
    growing = JsonList(tmp_path / "rows.json")
    growing.append({"a": 1})
    growing._file = FullDisk(growing._file, room)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            growing.append({"a": 2, "b": "long"})
        assert json.loads((tmp_path / "rows.json").read_text()) == [{"a": 1}]
