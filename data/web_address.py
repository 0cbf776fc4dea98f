"""Addresses of images, videos and streams: http(s)://, rtsp://, udp:// and kin. Passwords stay inside."""

from __future__ import annotations

import base64
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from posixpath import splitext
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np

from utils.errors import UserError
from utils.image_file import read_image

_LIVE = ("rtsp", "rtsps", "rtmp", "udp", "rtp", "srt", "tcp")
_ENDLESS = {".m3u8", ".mjpeg", ".mjpg", ".ts"}  # not asked about first: some servers take one connection only
_TIMEOUT_S = 10
_MOST_BYTES = 1 << 28
_MOST_STEM = 100  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class WebAddress:
    """An address in three forms: to open, to show, and for names of files. Only `url` has the user and the query."""

    url: str = field(repr=False)
    name: str
    stem: str

    @classmethod
    def of(cls, url: str) -> WebAddress:
        """Raises UserError for what is no address of a kind that can be read."""
        try:
            parts = urlsplit(url)
            port = "" if parts.port is None else f":{parts.port}"
        except ValueError as error:
            raise UserError(
                f"{url.partition('://')[0]}://...: no valid address: write SCHEME://HOST:PORT/PATH"
            ) from error
        if parts.scheme not in ("http", "https", *_LIVE):
            expected = ", ".join(f"{scheme}://" for scheme in ("http", "https", *_LIVE))
            raise UserError(f"{parts.scheme}://: cannot be read as a source; expected a file or {expected}")
        host = parts.hostname or ""
        shown = f"[{host}]" if ":" in host else host
        stem = re.sub(r"[^\w.-]+", "-", f"{host}{port}{splitext(unquote(parts.path))[0]}").strip("-.")
        return cls(url=url, name=f"{parts.scheme}://{shown}{port}{parts.path}", stem=stem[:_MOST_STEM] or parts.scheme)

    @property
    def is_http(self) -> bool:
        return self.name.startswith("http")

    def kind(self, *, images: Collection[str], videos: Collection[str]) -> str:
        """Return "image", "recorded" or "live": by the ending of its path, or by what the server says.

        Raises UserError if the server cannot be reached.
        """
        suffix = splitext(urlsplit(self.url).path)[1].lower()
        if not self.is_http or suffix in _ENDLESS:
            return "live"
        if suffix in images:
            return "image"
        with self._get() as answer:
            content, length = answer.headers.get_content_type(), answer.headers["Content-Length"]
        if content.startswith("image/"):
            return "image"
        return "recorded" if length or suffix in videos else "live"

    def read_image(self, say: Callable[[str], None]) -> np.ndarray | None:
        """Fetch an image as `image_file.read_image` reads it. Returns None, and says why, if that fails."""
        try:
            with self._get() as answer:
                content = answer.read(_MOST_BYTES + 1)
        except UserError as error:
            say(str(error))
            return None
        except (OSError, HTTPException):
            say(f"{self.name}: the connection broke off")
            return None
        if len(content) > _MOST_BYTES:
            say(f"{self.name}: has more than {_MOST_BYTES:,} bytes")
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image"
            file.write_bytes(content)
            return read_image(str(file))

    def _get(self) -> HTTPResponse:
        """Ask an http(s) server for it. Raises UserError."""
        parts = urlsplit(self.url)
        request = urllib.request.Request(_without_user(parts), headers={"User-Agent": "detect.py"})
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            # Not to where the server redirects.
            request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair).decode())
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except (OSError, HTTPException, ValueError) as error:
            reason = f"{error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else "no answer"
            raise UserError(f"{self.name}: cannot be fetched ({reason})") from error


def _without_user(parts: SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
