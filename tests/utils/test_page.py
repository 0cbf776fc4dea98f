"""A page prints names that are no text, ends with one sentence, and checks the libraries before it begins."""

from __future__ import annotations

import io
import re
import sys

import cv2
import pytest

from utils.errors import UserError
from utils.page import run_page


def test_a_file_name_that_is_no_text_can_be_printed(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def page(argv: object) -> None:
        print("photo-\udcff.jpg")
        raise UserError("photo-\udcfe.jpg: no such image")

    with pytest.raises(SystemExit) as caught:
        run_page(page)
    assert caught.value.code == 2
    for stream, output in zip(streams, (b"photo-\\udcff.jpg\n", b"error: photo-\\udcfe.jpg: no such"), strict=True):
        stream.flush()
        assert output in stream.buffer.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 GiB for an array with shape (1, 2)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        cv2.error("(-4:Insufficient memory) Failed to allocate 30000000000 bytes in function 'OutOfMemoryError'"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def page(argv: object) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_page(page)
    assert caught.value.code == 2
    assert re.fullmatch(r"error: memory ran out \(.+\); a smaller input .+\n", capsys.readouterr().err)


def test_a_page_runs_on_streams_that_cannot_be_told(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    run_page(lambda argv: print("done"))
    assert sys.stdout.getvalue() == "done\n"


def test_the_libraries_are_checked_before_the_page_begins(monkeypatch):
    called = []
    for name in ("check_torchvision", "check_opencv"):
        monkeypatch.setattr(f"utils.page.{name}", lambda name=name: called.append(name))
    run_page(lambda argv: called.append("page"))
    assert called == ["check_torchvision", "check_opencv", "page"]
