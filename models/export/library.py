"""Libraries of the extra `export`, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from utils.errors import UserError


def library(name: str, *, package: str | None = None) -> Any:
    """Import a module. Raises UserError with the command that installs it. package: that has it, if not its first."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name.partition(".")[0]
        hint = "pip install -e '.[export]'"
        raise UserError(f"{package} is not installed or does not load ({error}): run `{hint}`") from error
