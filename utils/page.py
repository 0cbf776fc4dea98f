"""Running a page, so that bad input ends it with one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from utils.environment import check_opencv, check_torchvision
from utils.errors import UserError, exit_on_error
from utils.output import outlive_disk_and_reader


def run_page(page: Callable[[Sequence[str] | None], None], *errors: type[Exception]) -> None:
    """Run `page` on the command line; UserError and `errors` become one sentence on stderr and exit code 2."""
    outlive_disk_and_reader()

    def checked() -> None:
        check_torchvision()
        check_opencv()
        page(sys.argv[1:])

    exit_on_error(checked, (UserError, *errors))
