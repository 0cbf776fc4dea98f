"""Streams of a real ffmpeg on 127.0.0.1 that break off and come back."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from itertools import islice

import pytest

from data.inference_sources import find_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on the PATH"),
]
INPUT = ["-re", "-f", "lavfi", "-i", "testsrc2=size=160x120:rate=15"]
ENCODING = ["-c:v", "mpeg2video", "-g", "15", "-f", "mpegts"]


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(*output: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["ffmpeg", "-v", "quiet", *INPUT, *ENCODING, *output], stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("scheme", ["udp", "http"])
def test_a_stream_that_is_killed_comes_back(scheme):
    """The stream ends and begins again; over http it is made anew, as ffmpeg's server takes a single connection."""
    port = free_port(socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM)
    url = f"udp://127.0.0.1:{port}" if scheme == "udp" else f"http://127.0.0.1:{port}/live.ts"
    output = [f"{url}?pkt_size=1316"] if scheme == "udp" else ["-listen", "1", url]
    senders, notes = [send(*output)], []

    def say(note: str) -> None:
        notes.append(note)
        if len(senders) == 1:
            senders.append(send(*output))

    try:
        time.sleep(1)
        (source,) = find_sources([url])
        assert source.live is not None
        frames = source.read(say=say)
        before = [frame.number for frame in islice(frames, 20)]
        assert notes == []
        senders[0].kill()
        after = []
        while not notes or "back" not in notes[-1]:
            after.append(next(frames).number)
        after += [frame.number for frame in islice(frames, 20)]
        frames.close()
    finally:
        for process in senders:
            process.kill()
            process.wait()
    numbers = before + after
    assert numbers == sorted(set(numbers))
    assert all(note.startswith(f"{url}: ") for note in notes) and "connecting again" in notes[0]
