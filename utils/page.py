"""Running a page, so that bad input ends it with one sentence."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from utils.environment import check_opencv, check_torchvision
from utils.errors import UserError, exit_on_error


def run_page(page: Callable[[Sequence[str] | None], None], *errors: type[Exception]) -> None:
    """Run `page` on the command line; UserError and `errors` become one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be valid text: what cannot be printed is escaped. Replaced streams may not support it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def checked() -> None:
        check_torchvision()
        check_opencv()
        page(sys.argv[1:])

    exit_on_error(checked, (UserError, *errors))
