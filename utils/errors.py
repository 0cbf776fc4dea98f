"""Errors that the user can fix, and how a page ends on them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from utils.printable import printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a limit of files


class UserError(ValueError):
    """Bad input: a path, a file, a value. The message is one sentence with file (and line) and remedy."""


def exit_on_error(page: Callable[[], None], kinds: tuple[type[Exception], ...] = (UserError,)) -> None:
    """Run `page`; an error of these kinds, an OSError with a file name or of a full disk becomes a line on stderr.

    The exit code is 2 then.

    An error with an `exit_code` ends with that one.

    As in shells, the exit code of Ctrl-C is 130, and of a closed output, as after `| head`, 141 without a message.
    """
    try:
        page()
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            message = "too many files are open: raise the limit with `ulimit -n 4096`, or take fewer --workers"
        elif isinstance(error, OSError) and error.errno in FULL:
            message = f"a file could not be written: {error.strerror}"
        elif not isinstance(error, kinds):
            raise
        lines = map(printable, message.splitlines() or [""])  # names of files and classes may hold terminal escapes
        print("error: " + "\n".join(lines), file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _ignore_broken_pipe()


def _ignore_broken_pipe() -> None:
    """Flush the output, dropping it if nobody reads it: Python would try again at exit, and print an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as under pythonw
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
