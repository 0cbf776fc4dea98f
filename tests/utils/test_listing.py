import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.listing import read_bounded, read_lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_in_every_encoding_with_a_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes(" é \r\n\n b\n".encode(encoding))
    assert read_lines(tmp_path / "a") == ["é", "b"]


def test_only_regular_files_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert read_bounded(tmp_path / "a", 3) == b"123"
    with pytest.raises(UserError, match=r"a: has 3 bytes, at most 2 are read"):
        read_bounded(tmp_path / "a", 2)
    with pytest.raises(UserError, match=r"b: no such file"):
        read_bounded(tmp_path / "b", 2)
    with pytest.raises(UserError, match="is no regular file"):
        read_bounded(tmp_path, 2)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(UserError, match="is no regular file"):
            read_bounded(tmp_path / "fifo", 2)


def test_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"a: cannot be read as text .*; save it as UTF-8\."):
        read_lines(tmp_path / "a")
