"""Albumentations, told not to ask the network for updates: import it from here.

The library looks for a newer version of itself on import, in every worker, unless this variable is set.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations

__all__ = ["albumentations"]
