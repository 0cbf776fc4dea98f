"""Small habits of the house which a reader would miss and a machine does not."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from models.norms.table import NORMS

SHAPELESS = {"misc", "general", "common", "helpers", "helper"}


def tracked(root: Path) -> list[Path]:
    """The files that git knows or would add; of an archive, all but hidden and generated folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout
        paths = [root / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        generated = {"datasets", "runs", "build"}
        paths = [
            path
            for path in root.rglob("*")
            if not any(p.startswith(".") or p in generated for p in path.relative_to(root).parts)
        ]
    return [path for path in paths if path.is_file()]


def unsafe_calls(tree: ast.Module) -> list[str]:
    """eval(), exec(), and torch.load() that may run what a file says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        safe = any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
        if name in ("eval", "exec") or (name == "torch.load" and not safe):
            found.append(f"{node.lineno}: {name}")
    return found


def unencoded_texts(tree: ast.Module) -> list[str]:
    """Text files read or written in the locale's encoding, which the next machine need not have."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        called = ast.unparse(node.func)
        mode = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        is_text = called in ("open", "os.fdopen") and not any("b" in ast.unparse(each) for each in mode)
        if is_text or called.endswith((".read_text", ".write_text")):
            found.append(f"{node.lineno}: {called}")
    return found


def is_shapeless(module: str) -> bool:
    return module in SHAPELESS or module.endswith(("_utils", "_helpers"))


def idle_tests(tree: ast.Module) -> list[str]:
    """Return the names of test functions that assert nothing."""
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
    ]
    return [test.name for test in tests if not any(map(can_fail, ast.walk(test)))]


def can_fail(node: ast.AST) -> bool:
    """Return whether this is an assert statement or a call of raises, warns, check_* or assert_*."""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Assert)
    name = ast.unparse(node.func).rpartition(".")[2]
    return name in ("raises", "warns") or name.startswith(("check_", "assert_"))


def test_no_file_runs_code_it_reads(root: Path) -> None:
    found = {
        str(path): calls
        for path in tracked(root)
        if path.suffix == ".py" and (calls := unsafe_calls(ast.parse(path.read_text())))
    }
    assert found == {}


def test_texts_have_an_encoding(root: Path) -> None:
    found = {
        str(path): calls
        for path in tracked(root)
        if path.suffix == ".py" and not path.is_relative_to(root / "tests")
        if (calls := unencoded_texts(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


def test_modules_are_named_by_nouns(root: Path) -> None:
    assert [path for path in tracked(root) if path.suffix == ".py" and is_shapeless(path.stem)] == []


def test_init_files_are_empty(root: Path) -> None:
    assert [path for path in tracked(root) if path.name == "__init__.py" and path.read_text()] == []


def test_citations_point_at_files_that_exist(root: Path) -> None:
    rows = [line for line in (root / "CITATIONS.md").read_text().splitlines() if line.startswith("|")]
    cited = {path for row in rows[2:] for path in re.findall(r"`([^`]+)`", row.split("|")[-2])}
    assert len(cited) > 10
    assert sorted(path for path in cited if not (root / path).exists()) == []


@pytest.mark.parametrize("name", NORMS)
def test_the_publication_of_a_norm_is_cited(root: Path, name: str) -> None:
    """With the file that the norm is in."""
    published = re.search(r"arXiv:[0-9.]+", NORMS[name].source)
    if published is None:
        assert re.match("ours|baseline", NORMS[name].source)
        return
    file = NORMS[name].__module__.replace(".", "/") + ".py"
    rows = (root / "CITATIONS.md").read_text().splitlines()
    assert any(published[0] in row and file in row for row in rows)


def test_no_file_has_marks_of_a_merge(root: Path) -> None:
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    texts = {path: path.read_bytes().decode(errors="replace").splitlines() for path in tracked(root)}
    assert [str(path) for path, lines in texts.items() if any(line.startswith(marks) for line in lines)] == []


def test_every_test_can_fail(root: Path) -> None:
    found = {
        path.name: idle
        for path in tracked(root)
        if path.name.startswith("test_") and path.suffix == ".py"
        if (idle := idle_tests(ast.parse(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize("source", ["eval('1')", "def f():\n    exec(text)", "torch.load(path)"])
def test_a_planted_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls(ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "json.load(file)"])
def test_a_safe_call_passes(source: str) -> None:
    assert unsafe_calls(ast.parse(source)) == []


@pytest.mark.parametrize("source", ["open(p)", "open(p, 'w')", "p.write_text(t)", "f(x).read_text(errors='replace')"])
def test_a_planted_text_without_an_encoding_is_found(source: str) -> None:
    assert len(unencoded_texts(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["open(p, 'rb')", "open(p, mode='xb')", "p.write_text(t, encoding='utf-8')", "write_text(p, t)", "os.open(p)"],
)
def test_bytes_and_encoded_texts_pass(source: str) -> None:
    assert unencoded_texts(ast.parse(source)) == []


@pytest.mark.parametrize("body", ["f()", "read_checkpoint(path)", "raises", "'assert_'", "checker.run()", "x.check"])
def test_a_planted_idle_test_is_found(body: str) -> None:
    assert idle_tests(ast.parse(f"def test_a():\n    {body}\n")) == ["test_a"]


@pytest.mark.parametrize(
    "body",
    [
        "assert f()",
        "with pytest.raises(E): f()",
        "with pytest.warns(W): f()",
        "torch.testing.assert_close(a, b)",
        "check_gradients(layer)",
        "for x in y:\n        if x: assert z",
    ],
)
def test_a_test_that_can_fail_passes(body: str) -> None:
    assert idle_tests(ast.parse(f"def test_a():\n    {body}\n")) == []


def test_a_planted_shapeless_name_is_found() -> None:
    assert [name for name in ("misc", "box_utils", "boxes", "clock") if is_shapeless(name)] == [
        "misc",
        "box_utils",
    ]
