"""Pieces of HTML and Markdown. Whatever comes from data sets and settings is escaped here, and nowhere else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from utils.printable import printable

DASH = "\N{EN DASH}"  # for what is unknown
_VOID = ("img", "input")


class Markup(str):
    """HTML as it is; every other string is text."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Return a value as HTML text, which is also safe between the quotes of an attribute."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value))))


def element(tag: str, *content: Any, **attributes: Any) -> Markup:
    """Return <tag>content</tag>; `class_` and `data_name` are the attributes class and data-name."""
    given = "".join(f' {name.strip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{''.join(map(text, content))}</{tag}>")


def joined(parts: Iterable[Any]) -> Markup:
    return Markup("".join(map(text, parts)))


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], **attributes: Any) -> Markup:
    """Return a table in a box that scrolls by itself; the first column is text, the others are numbers."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]), data_row=number)
        for number, row in enumerate(rows)
    )
    whole = element("table", element("thead", head), element("tbody", *body), **attributes)
    return element("div", whole, class_="scroll", tabindex=0)


def section(name: str, title: str, *content: Any) -> Markup:
    return element("section", element("h2", title), *content, id=name)


def note(*content: Any) -> Markup:
    return element("p", *content, class_="note")


def unbroken(said: str) -> Markup:
    """Return a text as HTML, in which a number and its % stay in one line."""
    return Markup(text(said).replace(" %", "&nbsp;%"))


def percent(share: Any, digits: int = 1) -> str:
    """Return 0.431 as "43.1"; a dash for what is no number, and for -1, which is COCO's unknown."""
    return f"{100 * share:.{digits}f}" if isinstance(share, int | float) and share != -1 else DASH


def script_json(value: Any) -> Markup:
    """Return JSON that no content can make leave its <script>."""
    escaped = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(escaped.replace("&", "\\u0026"))


def markdown(value: Any) -> str:
    """Return a value as text of Markdown, in one line, without any meaning of its own there or in HTML."""
    return re.sub(r"([\\`*_{}\[\]()#!|~<>&$])", r"\\\1", " ".join(printable(str(value)).split()))
