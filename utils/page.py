"""Running a page, so that bad input ends it with one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from utils.environment import check_opencv, check_torchvision
from utils.errors import UserError, exit_on_error
from utils.memory import is_out_of_memory
from utils.output import outlive_disk_and_reader


def run_page(page: Callable[[Sequence[str] | None], None], *errors: type[Exception]) -> None:
    """Run `page` on the command line; UserError and `errors` become one sentence on stderr and exit code 2."""
    outlive_disk_and_reader()

    def checked() -> None:
        check_torchvision()
        check_opencv()
        try:
            page(sys.argv[1:])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            smaller = "a smaller input (--image-size), batch (--batch-size) or network (--cfg) takes less"
            raise UserError(f"memory ran out ({reason}); {smaller}") from error

    exit_on_error(checked, (UserError, *errors))
