"""A window where there is a screen, and one sentence where there is none."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.window import Window


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Pretend that there is one; returns the images shown."""
    shown: list[np.ndarray] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image))
    return shown


@pytest.mark.parametrize(("key", "closes"), [(-1, False), (ord("x"), False), (ord("q"), True), (27, True)])
def test_q_and_escape_close_it(display, monkeypatch, key, closes):
    monkeypatch.setattr(cv2, "waitKey", lambda _: key)
    window = Window("x")
    window.show(np.full((2, 3, 3), (1, 2, 3), np.uint8))
    assert window.is_closed == closes
    assert display[0][0, 0].tolist() == [3, 2, 1]  # OpenCV shows BGR


def test_without_a_display_it_is_the_users_error(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="--show: there is no display here"):
        Window("x")


def test_a_headless_opencv_is_the_users_error(monkeypatch):
    def headless(*_: object) -> None:
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", headless)
    with pytest.raises(UserError, match="opencv-python-headless has none"):
        Window("x")
