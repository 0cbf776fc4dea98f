"""`python -m demo` in a browser that nobody sees."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from tests.e2e.browser import CHROMIUM, tab
from tests.models.checkpoint_file import write_checkpoint

pytest.importorskip("gradio", reason="pip install -e .[demo]")
pytestmark = pytest.mark.slow
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
COUNTS = "[...document.querySelectorAll('textarea')].map(each => each.value)"
DRAWN = "[...document.querySelectorAll('img')].filter(each => each.naturalWidth == 80).length"  # and the one dropped
MOVE = """{{const slider = document.querySelector('input[type=range][aria-label*={name}]');
slider.value = {value}; slider.dispatchEvent(new Event('input', {{bubbles: true}})); true}}"""


@pytest.fixture
def address(root: Path, tmp_path: Path) -> Iterator[str]:
    """Where the page is served, for two networks. Temporary files are in tmp_path / uploads, and gone at the end."""
    for name, class_names in (("a.pt", ("person", "dog", "cat")), ("b.pt", ("cat", "bird"))):
        write_checkpoint(tmp_path / name, class_names=class_names)
    (tmp_path / "uploads").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    files = ["--weights", tmp_path / "a.pt", "--compare", tmp_path / "b.pt"]
    served = subprocess.Popen(
        [sys.executable, "-m", "demo", *files, "--device", "cpu", "--confidence", "0.003", "--port", port],
        cwd=root,
        env={**os.environ, "TMPDIR": str(tmp_path / "uploads")},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert served.stdout is not None
        assert served.stdout.readline().split()[0] == f"http://127.0.0.1:{port}"
        yield f"http://127.0.0.1:{port}"
        served.send_signal(signal.SIGTERM)
        assert served.wait(timeout=60) == 0
    finally:
        served.kill()
    assert [each for each in (tmp_path / "uploads").rglob("*") if each.is_file()] == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_an_image_is_dropped_and_thresholds_are_moved(address: str, image: Path, tmp_path: Path) -> None:
    with tab() as page:
        page.open(address, **DESKTOP)
        page.wait_for("document.querySelector('input[type=file]') !== null")
        page.upload("input[type=file]", image)
        page.wait_for(f"{COUNTS}.every(Boolean) && {DRAWN} == 3")
        first, second = page.evaluate(COUNTS)
        assert "cat" in first + second and "bird" not in first

        page.evaluate(MOVE.format(name="Confidence", value=1))
        page.wait_for(f"{COUNTS}.every(each => each == 'nothing')")
        page.evaluate(MOVE.format(name="Confidence", value=0.003))
        page.wait_for(f"{COUNTS}.join() == '{first},{second}'")
        page.evaluate(MOVE.format(name="Overlap", value=1))
        page.wait_for(f"{COUNTS}.join() != '{first},{second}' && !{COUNTS}.includes('nothing')")

        page.evaluate("document.querySelector('input[aria-label^=Classes]').focus()")
        page.wait_for("document.querySelectorAll('[role=option]').length == 4")
        page.evaluate(
            "[...document.querySelectorAll('[role=option]')].find(each => each.textContent.includes('bird'))"
            ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
        )
        page.wait_for(f"{COUNTS}[0] == 'nothing' && {COUNTS}[1].endsWith(' bird')")

        for size in (PHONE, DESKTOP):
            page.open(address, **size)
            page.wait_for("document.querySelector('input[type=file]') !== null")
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.failures == []
        foreign = [each for each in page.addresses if not each.startswith((address, "data:", "blob:", "about:"))]
        assert len(page.addresses) > 10 and foreign == []


def test_it_is_for_this_machine_and_serves_no_files_of_it(address: str, root: Path) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(address.rpartition(":")[2])), timeout=5)
    for path in ("/etc/passwd", str(root / "pyproject.toml")):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{address}/gradio_api/file={path}", timeout=30)
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n%b\r\n--x--\r\n"
    for size, is_taken in ((1000, True), (34_000_000, False)):
        request = Request(f"{address}/gradio_api/upload", data=boundary % bytes(size))
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        if is_taken:
            assert urlopen(request, timeout=60).status == 200
        else:
            with pytest.raises(OSError) as refused:
                urlopen(request, timeout=60)
            assert getattr(refused.value, "code", 413) == 413
