"""Text of strangers' files, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return the text with control characters, which a terminal would obey, as `\x1b`, and half surrogates, too."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text
    )
