"""Downloads of published files, from a server on this machine that behaves and misbehaves."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from urllib.parse import urlsplit

import pytest

from models.weights import download
from models.weights.download import PublishedFile, fetch
from utils.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
ATTEMPTS = 1 + len(download.PAUSES_S)


class Server(ThreadingHTTPServer):
    """Sends CONTENT. plan: how it answers the next requests; asked: path and range of those so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.plan: list[str] = []
        self.asked: list[tuple[str, str | None]] = []
        self.go_on = threading.Event()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer asks for the host's name, which may take seconds
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def file(self) -> PublishedFile:
        return PublishedFile(
            address=f"{self.url}/net.weights", sha512=hashlib.sha512(CONTENT).hexdigest(), size_bytes=len(CONTENT)
        )


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        kind, _, value = (self.server.plan.pop(0) if self.server.plan else "well").partition(" ")
        if kind.isdigit():
            self.send_error(int(kind))
            return
        if kind == "redirect":
            self.head(302, Location=value)
            return
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and kind != "from-the-start" else 0
        ranged = {"Content-Range": f"bytes {0 if kind == 'other-range' else begin}-"} if begin else {}
        rest = {"other-bytes": bytes(len(CONTENT)), "page": b"<html>log in</html>"}.get(kind, CONTENT)[begin:]
        length = {"declares": value, "endless": None}.get(kind, str(len(rest)))
        self.head(206 if ranged else 200, **ranged, **({} if length is None else {"Content-Length": length}))
        if kind in ("breaks-off", "stalls"):
            self.send(rest[: len(rest) // 2])
            if kind == "stalls":
                self.server.go_on.wait()
            return
        if kind == "held":
            self.server.go_on.wait()
        self.send(rest)
        while kind == "endless" and self.send(bytes(2**16)):
            pass

    def head(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: bytes) -> bool:
        try:
            self.wfile.write(content)
        except OSError:  # the client has seen enough
            return False
        return True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES_S", (0.0,) * (ATTEMPTS - 1))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


def part_of(file: PublishedFile) -> Path:
    return file.place.with_name(f"{file.name}.part")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_downloaded_once(server, tmp_path, capsys):
    path = fetch(server.file)
    assert path == tmp_path / "cache" / "yolov4-norms" / "weights" / "net.weights"
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().out == f"weights   downloading {server.url}/net.weights (0.3 MB)\n"
    assert fetch(server.file) == path
    assert len(server.asked) == 1 and files_in(path.parent) == ["net.weights"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "plan",
    [
        ["endless"],  # no byte more than the file has is read
        [f"declares {len(CONTENT)}"],
        ["breaks-off"],
        ["breaks-off", "breaks-off", "breaks-off"],
        ["breaks-off", "from-the-start"],
        ["breaks-off", "other-range"],
        ["breaks-off", "416"],
        ["breaks-off", "500", "503"],
        ["500"],
        ["429"],
        ["redirect /elsewhere"],
        ["redirect /elsewhere", "breaks-off", "redirect /elsewhere"],
    ],
)
def test_a_server_that_can_be_helped(plan, server):
    server.plan = list(plan)
    assert fetch(server.file).read_bytes() == CONTENT
    assert server.plan == [] and files_in(server.file.place.parent) == ["net.weights"]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (["404"], "cannot be downloaded (HTTP 404)"),
        (["403"], "cannot be downloaded (HTTP 403)"),
        (["500"] * ATTEMPTS, "cannot be downloaded (HTTP 500)"),
        (["other-bytes"], "is not the published net.weights: it has the SHA-512 "),
        (["page"], "it has 19 bytes in place of 300,000"),
        (["declares 1000"], "it has 1,000 bytes in place of 300,000"),
        (["declares 9000000000000"], "it has 9,000,000,000,000 bytes in place of 300,000"),
        (["breaks-off", "declares 7"], "it has 150,007 bytes in place of 300,000"),
        (["redirect ftp://example.org/net.weights"], "redirects to ftp://example.org/net.weights, which is not https"),
        (["redirect http://example.org/x"], "redirects to http://example.org/x, which is not https"),
        (["redirect file:///etc/passwd"], "cannot be downloaded (HTTP 302)"),
        (["redirect /net.weights"] * 20, "cannot be downloaded (HTTP 302)"),
    ],
)
def test_a_server_that_cannot(plan, reason, server):
    server.plan, file = list(plan), server.file
    with pytest.raises(UserError) as raised:
        fetch(file)
    assert reason in str(raised.value)
    assert f"download {file.address} in another way and put it at {file.place}" in str(raised.value)
    assert files_in(file.place.parent) == []


def test_what_has_arrived_is_kept_for_the_next_command(server):
    server.plan = ["breaks-off"] * ATTEMPTS
    with pytest.raises(UserError, match=r"it ended after 281,250 of 300,000 bytes\): the same command goes on"):
        fetch(server.file)
    assert part_of(server.file).read_bytes() == CONTENT[:281_250] and not server.file.place.exists()
    assert fetch(server.file).read_bytes() == CONTENT
    assert server.asked[-1] == ("/net.weights", "bytes=281250-")


@pytest.mark.parametrize("held", [b"x" * 1000, bytes(len(CONTENT)), CONTENT + b"x", CONTENT[:-1], CONTENT, b""])
def test_whatever_an_earlier_command_has_left_behind(held, server):
    part_of(server.file).parent.mkdir(parents=True)
    part_of(server.file).write_bytes(held)
    assert fetch(server.file).read_bytes() == CONTENT
    assert len(server.asked) == (0 if held == CONTENT else 2 if held[:1] == b"x" else 1)


def test_a_server_that_stalls(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.05)
    server.plan = ["stalls"] * ATTEMPTS
    with pytest.raises(UserError, match=r"\(timed out\): the same command goes on from where it was"):
        fetch(server.file)
    assert part_of(server.file).stat().st_size > len(CONTENT) // 2


def test_offline(server):
    server.server_close()
    with pytest.raises(
        UserError, match=r"net.weights: cannot be downloaded \(.*(refused|reset).*\): download http"
    ) as raised:
        fetch(server.file)
    assert str(server.file.place) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_file_in_the_cache_is_downloaded_again(damaged, server, capsys):
    server.file.place.parent.mkdir(parents=True)
    server.file.place.write_bytes(damaged)
    assert fetch(server.file).read_bytes() == CONTENT
    assert f"warning: {server.file.place}: is not the published file" in capsys.readouterr().out


def test_two_at_once_download_once(server, capsys):
    server.plan = ["held"]
    found = []
    both = [threading.Thread(target=lambda: found.append(fetch(server.file))) for _ in range(2)]
    for thread in both:
        thread.start()
    while "waiting for it" not in capsys.readouterr().out:
        assert all(thread.is_alive() for thread in both)
    server.go_on.set()
    for thread in both:
        thread.join()
    assert found == [server.file.place] * 2 and server.file.place.read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_killed_download_is_gone_on_with_by_another_process(server, root):
    server.plan = ["stalls"]
    file = server.file
    code = f"from models.weights.download import *; fetch({file!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    while not part_of(file).is_file() or part_of(file).stat().st_size < len(CONTENT) // 2:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert fetch(file).read_bytes() == CONTENT
    assert server.asked == [("/net.weights", None), ("/net.weights", f"bytes={len(CONTENT) // 2}-")]


def test_a_full_disk(server, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(UserError, match=r"net.weights: cannot be written, No space left on device: XDG_CACHE_HOME"):
        fetch(server.file)
    assert files_in(server.file.place.parent) == [] and len(server.asked) == 1


def test_a_cache_that_is_no_folder(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written, Not a directory: XDG_CACHE_HOME may name another folder"):
        fetch(server.file)
    assert server.asked == []


def test_a_cache_that_cannot_be_written_serves_what_it_has(server, monkeypatch):
    fetch(server.file)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a read-only cache"))
    assert fetch(server.file).read_bytes() == CONTENT


def test_a_user_without_a_home(server, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=r"net\.weights: cannot be written, no home folder: set XDG_CACHE_HOME"):
        fetch(server.file)


@pytest.mark.parametrize("address", ["https://example.org/a.weights", "http://127.0.0.1/a.weights"])
def test_https_is_never_left(address):
    def is_followed(target: str) -> bool:
        request = download.Request(address)
        try:
            return download._Redirects().redirect_request(request, None, 302, "", {}, target) is not None
        except OSError:
            return False

    assert is_followed("https://objects.example.net/b")
    assert is_followed("http://localhost/b") == (urlsplit(address).scheme == "http")
    assert not is_followed("http://example.org/b")
