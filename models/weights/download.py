"""Download of a published file into the user's cache: checked, resumable, by one process at a time."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from utils.cache_folder import cache_folder
from utils.console import say, warn
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows: two downloads at once then spoil each other, which the check notices
    fcntl = None  # type: ignore[assignment]

TIMEOUT_S = 30.0  # without a byte
PAUSES_S = (1.0, 3.0, 10.0)  # before another attempt
_BLOCK_BYTES = 2**18
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A file on the web that never changes. sha512: in hexadecimal digits."""

    address: str
    sha512: str
    size_bytes: int

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def place(self) -> Path:
        """Where it is in the user's cache, once it was downloaded. Raises OSError for a user without a home."""
        return cache_folder() / "weights" / self.name

    def is_at(self, path: Path) -> bool:
        """Return whether `path` is exactly this file."""
        return path.is_file() and path.stat().st_size == self.size_bytes and _sha512(path) == self.sha512


class _BrokenOffError(Exception):
    """What may go better in another attempt."""


class _OtherFileError(Exception):
    """The server has something else under this address."""


def fetch(file: PublishedFile) -> Path:
    """Return the path of the file in the cache; what is missing or damaged there is downloaded.

    Processes that ask for the same file wait for the first, which need not be rank 0: each machine of a job may have a
    cache of its own. Raises UserError, with the address and where to put the file, if it cannot be had.
    """
    where = file.name
    try:
        path = file.place
        where = str(path)
        if file.is_at(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not file.is_at(path):
                _download(file, path)
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written, {error.strerror or error}: XDG_CACHE_HOME may name another folder than "
            f"~/.cache, or download {file.address} elsewhere and name that file with --weights"
        ) from error
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process downloads this file."""
    if fcntl is None:
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("weights", f"another process is downloading {path.name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def _download(file: PublishedFile, path: Path) -> None:
    """Download to `path`, which appears once it is whole and right. Raises UserError, and OSError of the disk.

    What has arrived of it stays beside it after an interruption, for the next attempt or the next command.
    """
    if path.exists():
        warn(f"{path}: is not the published file: it is downloaded again")
    say("weights", f"downloading {file.address} ({file.size_bytes / 1e6:.1f} MB)")
    part = path.with_name(path.name + ".part")
    by_hand = f"download {file.address} in another way and put it at {path}"
    for pause_s in (*PAUSES_S, None):
        try:
            _receive(file, part)
            os.replace(part, path)
            return
        except URLError as error:  # no connection, or an answer that another attempt would get, too
            if isinstance(error, HTTPError) and error.code == 416 and part.exists():
                part.unlink()  # the server's file ends before
                continue
            reason = f"HTTP {error.code}" if isinstance(error, HTTPError) else error.reason
            raise UserError(f"{file.name}: cannot be downloaded ({reason}): {by_hand}") from error
        except _OtherFileError as error:
            part.unlink()
            raise UserError(f"{file.address}: is not the published {file.name}: it {error}; {by_hand}") from error
        except _BrokenOffError as error:
            if pause_s is None:
                raise UserError(
                    f"{file.name}: cannot be downloaded ({error}): the same command goes on from where it was, or "
                    f"{by_hand}"
                ) from error
            time.sleep(pause_s)
        except OSError:
            with suppress(OSError):
                part.unlink()  # a full disk has no room for it
            raise


def _receive(file: PublishedFile, part: Path) -> None:
    """Add to `part` what it lacks, and check it. What a server says about lengths is believed to refuse a file only."""
    held_bytes = part.stat().st_size if part.exists() else 0
    is_resumed = True
    if held_bytes < file.size_bytes:
        with _opened(file, held_bytes) as response, open(part, "ab") as out:
            is_resumed = response.status == 206
            begin = held_bytes if is_resumed else 0
            if not is_resumed:
                out.truncate(0)  # the server knows no ranges
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                out.truncate(0)
                raise _BrokenOffError("it sent another range than asked for")
            if response.length is not None and begin + response.length != file.size_bytes:
                raise _OtherFileError(f"has {begin + response.length:,} bytes in place of {file.size_bytes:,}")
            _copy(response, out, begin, file)
    if (digest := _sha512(part)) != file.sha512:
        if is_resumed:
            part.unlink()
            raise _BrokenOffError("what had arrived earlier was damaged")
        raise _OtherFileError(f"has the SHA-512 {digest[:16]}... in place of {file.sha512[:16]}...")


def _copy(response: HTTPResponse, out: IO[bytes], begin: int, file: PublishedFile) -> None:
    """Copy the rest of the file, from byte `begin` on, to the disk, and no byte more."""
    is_shown = sys.stderr is not None and sys.stderr.isatty()
    unit = {"unit": "B", "unit_scale": True}
    with tqdm(desc=file.name, total=file.size_bytes, initial=begin, **unit, disable=not is_shown, leave=False) as bar:
        while begin < file.size_bytes:
            with _as_broken_off():
                block = response.read1(min(_BLOCK_BYTES, file.size_bytes - begin))
            if not block:
                raise _BrokenOffError(f"it ended after {begin:,} of {file.size_bytes:,} bytes")
            out.write(block)
            begin += len(block)
            bar.update(len(block))
    out.flush()
    os.fsync(out.fileno())


def _opened(file: PublishedFile, begin: int) -> HTTPResponse:
    """Ask for the file from byte `begin` on. Raises URLError for what is final."""
    headers = {"User-Agent": "yolov4-norms", **({"Range": f"bytes={begin}-"} if begin else {})}
    with _as_broken_off():
        try:
            return build_opener(_Redirects).open(Request(file.address, headers=headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            error.close()
            if error.code >= 500 or error.code in (408, 429):
                raise _BrokenOffError(f"HTTP {error.code}") from error
            raise


@contextmanager
def _as_broken_off() -> Iterator[None]:
    """Raise the errors of a connection, but not URLError, as _BrokenOffError."""
    try:
        yield
    except URLError:
        raise
    except (OSError, HTTPException) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


class _Redirects(HTTPRedirectHandler):
    """Follows redirections to https only, and on this machine to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        target = urlsplit(newurl)
        is_local = all(url.scheme == "http" and url.hostname in _LOCAL for url in (urlsplit(req.full_url), target))
        if target.scheme != "https" and not is_local:
            raise URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _sha512(path: Path) -> str:
    digest = hashlib.sha512()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
