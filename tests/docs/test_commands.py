"""Whatever a page tells to type is something that the programs take; `make docs-check` then types it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path

import pytest

from models.norms.own import is_own
from models.norms.table import AUTO, parse_norm
from tests.conftest import ROOT
from tests.docs.__main__ import UNTYPED, reason
from tests.docs.commands import Command, anchors_of, commands, flags_after_parsing, pages, program_of, without_blocks
from utils.errors import UserError

COMMANDS = [command for page in pages(ROOT) for command in commands(page, ROOT)]
OURS = [
    command
    for command in COMMANDS
    if program_of(command.words)[0] not in ("", "venv", "pytest")
    if not re.search("my_norms|--help", command.text)  # that class: tests/e2e/test_norm_choices.py
]


@lru_cache
def taken() -> tuple[set[str], list[str]]:
    """Return the flags of all programs, and the commands that theirs refused."""
    flags, refused = set[str](), []
    for command in OURS:
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                flags |= flags_after_parsing(command)
        except (SystemExit, UserError) as error:
            if command.whole or "are required" not in said.getvalue():  # a sentence may name what it is about only
                refused.append(f"{command}\n    {said.getvalue() or error}")
    return flags, refused


def test_there_are_commands_on_the_pages() -> None:
    assert len(OURS) > 80
    assert len({command.page for command in OURS}) > 12


def test_the_programs_take_the_commands() -> None:
    _, refused = taken()
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("text", ["python train.py --no-such-flag", "python -m data.convert PATH --to coco"])
def test_a_wrong_command_on_a_page_is_found(text: str) -> None:
    with pytest.raises(SystemExit):
        flags_after_parsing(Command(page="a.md", line=1, text=text, whole=True))


def test_flags_in_sentences_exist(root: Path) -> None:
    known, _ = taken()
    known = known | {line.split()[1] for line in (root / "tests/golden/flags.txt").read_text().splitlines()}
    known |= {"--nproc-per-node", "--max-restarts", "--no-deps"}
    for page in pages(root):
        spans = re.findall(r"`([^`]+)`", without_blocks(page.read_text()))
        flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span)}
        assert sorted(flags - known) == [], page.name


def test_norms_on_the_pages_exist(root: Path) -> None:
    typed = {
        norm for page in pages(root) for norm in re.findall(r"--norm(?:-heads)? ([a-z][\w:=,.-]*\w)", page.read_text())
    }
    assert len(typed) > 10
    for norm in typed - {AUTO, "help"}:
        if not is_own(norm.partition(":")[0]):
            assert parse_norm(norm)


def test_files_that_commands_name_are_there(root: Path) -> None:
    ours = ("benchmarks/", "docs/", "tests/", "cfg/", "examples/")
    named = [(word, command) for command in COMMANDS for word in command.words if word.startswith(ours)]
    assert [str(command) for word, command in named if not (root / word).exists()] == []
    cfgs = {word for command in COMMANDS for word in re.findall(r"--cfg (yolo[\w.-]+)", command.text)}
    assert cfgs
    assert [cfg for cfg in cfgs if not (root / "cfg" / f"{cfg}.cfg").is_file()] == []


def test_links_lead_somewhere(root: Path) -> None:
    dead = []
    for page in pages(root):
        for link in re.findall(r"\]\(([^)\s]*[.#][^)\s]*)\)", page.read_text()):
            place, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / place).resolve() if place else page
            if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
                dead.append(f"{page.name}: {link}")
    assert dead == []


def test_extras_and_make_targets_exist(root: Path) -> None:
    _, _, extras = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    for command in COMMANDS:
        if extra := re.search(r"\.\[([\w,]+)\]", command.text):
            assert re.search(rf"^{extra[1]} = ", extras, re.MULTILINE), command
        if command.words[0] == "make":
            assert command.words[1] in targets, command


def test_each_reason_not_to_type_a_command_has_one() -> None:
    found = {reason(command) for command in COMMANDS}
    assert [why for _, why in UNTYPED if why not in found] == []
    assert sum(reason(command) is None for command in COMMANDS) > 40
