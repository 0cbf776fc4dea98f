"""Albumentations without its online update check: import it from here.

The library looks for a newer version on import, in every worker, unless this variable is set.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations

__all__ = ["albumentations"]
