"""Addresses as sources: what they are, and that passwords stay inside."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.inference_sources import find_sources
from data.web_address import WebAddress
from tests.data.test_inference_sources import write_video
from tests.data.web_server import PASSWORD, encoded, serve
from utils.errors import UserError

IMAGE = np.full((6, 8, 3), (200, 20, 10), np.uint8)


@pytest.mark.parametrize(
    ("url", "name", "stem"),
    [
        (
            "rtsp://me:secret@10.0.0.7:554/live/ch1?key=secret#secret",
            "rtsp://10.0.0.7:554/live/ch1",
            "10.0.0.7-554-live-ch1",
        ),
        ("http://me@host/a/clip.mp4", "http://host/a/clip.mp4", "host-a-clip"),
        ("https://HOST/", "https://host/", "host"),
        ("udp://@239.0.0.1:1234", "udp://239.0.0.1:1234", "239.0.0.1-1234"),
        ("udp://:5000", "udp://:5000", "5000"),
        ("rtsp://[::1]:8554/x", "rtsp://[::1]:8554/x", "1-8554-x"),
        ("http://h/%2e%2e/%2fetc", "http://h/%2e%2e/%2fetc", "h-..-etc"),
        ("http://h/a b/../c:d.jpg", "http://h/a b/../c:d.jpg", "h-a-b-..-c-d"),
    ],
)
def test_an_address_is_shown_without_user_and_query(url, name, stem):
    address = WebAddress.of(url)
    assert (address.url, address.name, address.stem) == (url, name, stem)
    assert "secret" not in repr(address)


@given(user=st.text(st.characters(exclude_characters="@/?#[]\\:"), min_size=1), path=st.text())
def test_the_stem_is_a_file_name(user, path):
    try:
        address = WebAddress.of(f"rtsp://{user}:PASSWORD@host/{path}")
    except UserError as error:
        assert "PASSWORD" not in str(error)
        return
    assert Path(address.stem).name == address.stem and len(address.stem) <= 100
    assert "PASSWORD@" not in address.name + address.stem + repr(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x.jpg", r"ftp://: cannot be read as a source; expected a file or http://"),
        ("file:///etc/passwd", r"file://: cannot be read"),
        ("rtsp://me:secret@host:99999999/", r"rtsp://\.\.\.: no valid address"),
        ("http://[1/", r"http://\.\.\.: no valid address"),
    ],
)
def test_no_address_is_the_users_error(url, message):
    with pytest.raises(UserError, match=message) as caught:
        find_sources([url])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["/x.png", "/picture?id=3", "/moved"])
def test_an_image_is_fetched(path):
    with serve() as server:
        server.files = dict.fromkeys(("/x.png", "/picture"), ("image/png", encoded(IMAGE, ".png")))
        (source,) = find_sources([f"http://{server.host}{path}"])
        assert (source.is_video, source.frames, source.path) == (False, 1, None)
        (frame,) = source.read()
    np.testing.assert_array_equal(frame.image, IMAGE)


def test_a_password_is_sent_to_its_server_and_not_shown():
    with serve() as server:
        server.files = {"/private/x.png": ("image/png", encoded(IMAGE, ".png"))}
        notes: list[str] = []
        for password, is_right in ((quote(PASSWORD, safe=""), True), ("wrong", False)):
            (source,) = find_sources([f"http://user:{password}@{server.host}/private/x.png"])
            (frame,) = source.read(say=notes.append)
            assert (frame.image is not None) == is_right
    assert notes == [f"http://{server.host}/private/x.png: cannot be fetched (401 Unauthorized)"]


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(IMAGE, ".png")[:40]])
def test_a_broken_image_is_a_frame_without_one(content):
    with serve() as server:
        server.files = {"/x.png": ("image/png", content)}
        (source,) = find_sources([f"http://{server.host}/x.png"])
        (frame,) = source.read(say=lambda _: None)
    assert frame.image is None and frame.source is source


def test_a_video_is_all_its_frames(tmp_path: Path):
    content = write_video(tmp_path / "x.mp4").read_bytes()
    with serve() as server:
        server.files = {"/x.mp4": ("video/mp4", content), "/film": ("video/mp4", content)}
        for path in server.files:
            (source,) = find_sources([f"http://{server.host}{path}"])
            assert (source.is_video, source.frames, source.fps, source.live) == (True, 5, 12, None)
            assert [frame.number for frame in source.read()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone", r"/gone: cannot be fetched \(404 Not Found\)"),
        ("/gone.mp4", r"/gone\.mp4: cannot be fetched \(404 Not Found\)"),
        ("/page", "/page: cannot be opened as a video"),
        ("/camera", "503"),
    ],
)
def test_what_is_not_there_is_the_users_error(path, message):
    with serve() as server:
        server.files = {"/page": ("text/html", b"<html>")}
        with pytest.raises(UserError, match=message) as caught:
            find_sources([f"http://user:secret@{server.host}{path}?token=secret"])
    assert "secret" not in str(caught.value)


def test_an_absent_server_is_the_users_error():
    with serve() as server:
        host = server.host
    with pytest.raises(UserError, match="no answer"):
        find_sources([f"http://{host}/picture"])
    with pytest.raises(UserError, match="cannot be opened as a video"):
        find_sources([f"rtsp://{host}/x"])


def test_opencv_is_told_to_keep_addresses_to_itself(capfd):
    """FFmpeg logs an address that it cannot open."""
    with serve() as server:
        host = server.host
    with pytest.raises(UserError):
        find_sources([f"rtsp://me:secret@{host}/x?secret"])
    assert cv2.VideoCapture(f"http://me:secret@{host}/secret.mp4", cv2.CAP_FFMPEG).isOpened() is False
    assert "secret" not in "".join(capfd.readouterr())
