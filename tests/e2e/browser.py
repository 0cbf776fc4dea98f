"""A headless Chromium, driven by its DevTools protocol through two pipes: no library is needed for that."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE_S = 120
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Tab:
    """A tab, the addresses it has asked for, its exceptions (failures), and the errors on its console.

    Commands: https://chromedevtools.github.io/devtools-protocol/.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.addresses: list[str] = []
        self.failures: list[str] = []
        self.console_errors: list[str] = []
        self._commands, self._answers, self._session = commands, os.fdopen(answers, "rb"), ""
        self._numbers = itertools.count(1)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Return the answer to a command; what happens meanwhile is noted."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = json.loads(self._read())
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            if message.get("method") == "Network.requestWillBeSent":
                self.addresses.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.failures.append(json.dumps(message["params"]["exceptionDetails"]))
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Log.entryAdded" and entry["level"] == "error":
                self.console_errors.append(entry["text"])

    def open(self, url: str, *, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Return what a JavaScript expression gives, as Python's values."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Return the first value of a JavaScript expression that is true."""
        end = time.monotonic() + _PATIENCE_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.1)
        return value

    def upload(self, selector: str, file: Path) -> None:
        """Give a file to an <input type=file>."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _read(self) -> bytes:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return bytes(message)


@contextmanager
def tab() -> Iterator[Tab]:
    """Start a browser with an empty profile, and end it."""
    assert CHROMIUM is not None
    command_reader, commands = os.pipe()
    answers, answer_writer = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{command_reader} 4>&{answer_writer}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(command_reader, answer_writer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_reader)
        os.close(answer_writer)
        try:
            yield Tab(commands, answers)
        finally:
            os.close(commands)
            process.terminate()
            process.wait()
