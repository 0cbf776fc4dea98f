"""The user's cache folder: what is in it can be made or downloaded again."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `yolov4-norms` in $XDG_CACHE_HOME or ~/.cache, whether it exists or not.

    Raises OSError for a user without a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov4-norms"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "no home folder: set XDG_CACHE_HOME", "~/.cache") from error
