"""The error a user can mend, and how a page ends on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: a path, a file, a value. The message is one sentence naming file (and line) and the remedy."""


def exit_on_error(page: Callable[[], None], kinds: tuple[type[Exception], ...] = (UserError,)) -> None:
    """Run `page`; an error of these kinds, or an OSError that names a file, becomes one line on stderr and exit code 2.

    As in shells, Ctrl-C is 130; and 141, without a word, that nobody reads the output any more, as after `| head`.
    """
    try:
        page()
    except BrokenPipeError:
        raise SystemExit(141) from None
    except kinds as error:
        _end_on(error)
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        _end_on(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _drop_what_nobody_reads()


def _end_on(error: Exception) -> None:
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    print(f"error: {said}", file=sys.stderr)
    raise SystemExit(2) from None


def _drop_what_nobody_reads() -> None:
    """Of what was printed; else Python, leaving, would try once more to write it, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as under pythonw
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
