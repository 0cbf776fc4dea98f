"""The error a user can mend, and how a page ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: a path, a file, a value. The message is one sentence naming file (and line) and the remedy."""


def exit_on_error(page: Callable[[], None], kinds: tuple[type[Exception], ...] = (UserError,)) -> None:
    """Run `page`; an error of these kinds becomes one line on stderr and exit code 2. Ctrl-C is 130, as in shells."""
    try:
        page()
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
