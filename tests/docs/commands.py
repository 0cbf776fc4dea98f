"""The commands on the pages, and whether the programs they name would take them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

PROGRAMS = ("python", "python3", "pip", "make", "torchrun", "git", "source")


@dataclass(frozen=True, kw_only=True)
class Command:
    """page: relative to the checkout. whole: it stands in a block of its own, not in a sentence."""

    page: str
    line: int
    text: str
    whole: bool

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text, comments=True)
        return [word for word in words if word != "..."]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


class Parsed(BaseException):
    """Raised in place of what a program does after its parser was content."""

    def __init__(self, flags: set[str]) -> None:
        super().__init__()
        self.flags = flags


def pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def commands(path: Path, root: Path) -> Iterator[Command]:
    """Yield the commands in blocks without a language, and those in sentences; `a && b` is two."""
    text, page = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = text[: block.start()].count("\n") + 2
        for number, line in enumerate(block[2].splitlines()):
            for part in line.split(" && ") if not block[1] else ():
                if part.split(" ")[0] in PROGRAMS:
                    yield Command(page=page, line=first + number, text=without_options(part), whole=True)
    for span in re.finditer(r"`([^`]+)`", without_blocks(text)):
        words = span[1].split()
        if words[0] in PROGRAMS and len(words) > 1:
            line = text[: span.start()].count("\n") + 1
            yield Command(page=page, line=line, text=without_options(" ".join(words)), whole=False)


def without_blocks(text: str) -> str:
    """Blank the blocks, in as many characters."""
    return re.sub(r"^```.*?^```", lambda block: re.sub(r"[^\n]", " ", block[0]), text, flags=re.MULTILINE | re.DOTALL)


def without_options(text: str) -> str:
    """`a [--b C]` -> `a --b C`."""
    return re.sub(r"(?<= )\[|\](?= |$)", "", text.partition(" #")[0]).strip()


def program_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module, and the words for it: ("train", [...]) of `torchrun --nproc-per-node 2 train.py ...`."""
    at = next((at for at, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
    if at is None:
        return "", []
    if words[at] == "-m":
        return words[at + 1], list(words[at + 2 :])
    return words[at].removesuffix(".py").replace("/", "."), list(words[at + 1 :])


def flags_after_parsing(command: Command) -> set[str]:
    """Let the program parse the command, and nothing more. Returns the flags it has. Raises SystemExit, UserError."""
    module, rest = program_of(command.words)
    spec = find_spec(module)
    assert spec is not None, f"{command}: there is no {module}"
    main = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> NoReturn:
        parse_args(parser, argv, namespace)
        raise Parsed(set(flags_of(parser)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [module, *rest])
        try:
            main()
        except Parsed as parsed:
            return parsed.flags
    raise AssertionError(f"{command}: {module} parses nothing")


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from flags_of(each)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
