"""A web server on 127.0.0.1 with images, a video and a camera that can break off."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

PASSWORD = "pass:w@rd"


class Server(ThreadingHTTPServer):
    """files: path -> (content type, content). camera_frames: of each connection to /camera, in turn; then refused.

    asked: paths asked for, with the Authorization header or None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[str, bytes]] = {}
        self.camera_frames: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.host = f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client left
            self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.path, self.headers["Authorization"]))
        expected = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        if path.startswith("/private") and self.headers["Authorization"] != expected:
            self.send_error(401)
        elif path == "/camera":
            self._camera()
        elif path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/x.png")
            self.end_headers()
        elif path in self.server.files:
            self._file(*self.server.files[path])
        else:
            self.send_error(404)

    def _file(self, kind: str, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        first, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def _camera(self) -> None:
        """Send frames whose red is ten times their number in this connection."""
        if not self.server.camera_frames:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(self.server.camera_frames[0]):
            jpeg = encoded(np.full((48, 64, 3), (10 * number % 250, 0, 0), np.uint8), ".jpg")
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n")
            self.wfile.write(f"Content-Length: {len(jpeg)}\r\n\r\n".encode() + jpeg + b"\r\n")
            time.sleep(0.01)
        del self.server.camera_frames[0]  # not if the client has left before

    def log_message(self, *_: object) -> None:
        pass


def encoded(rgb: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
