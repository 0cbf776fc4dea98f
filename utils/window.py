"""A window on the screen that shows images."""

from __future__ import annotations

import os
import sys

import cv2
import numpy as np

from utils.errors import UserError

_ENDS = {ord("q"), 27}  # the escape key


class Window:
    """A window with the newest image. Raises UserError where OpenCV or the machine has none."""

    def __init__(self, title: str) -> None:
        # Without a display Qt would end the process.
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--show: there is no display here; leave it out, and look at the files")
        self._title, self.is_closed = title, False
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserError(
                "--show: the installed OpenCV has no windows (opencv-python-headless has none); leave it out, and look "
                "at the files, or `pip uninstall opencv-python-headless`, then `pip install opencv-python`"
            ) from error

    def show(self, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8 RGB; q or escape sets `is_closed`."""
        cv2.imshow(self._title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.is_closed |= cv2.waitKey(1) & 0xFF in _ENDS
