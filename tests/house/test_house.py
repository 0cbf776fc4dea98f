"""Small habits of the house which a reader would miss and a machine does not."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

SHAPELESS = {"misc", "general", "common", "helpers", "helper"}
REGISTRIES = ["pypi" + ".org", "pythonhosted" + ".org", "pytorch" + ".org/whl", "index" + "-url"]
ASSERTING = ("Assert(", "raises", "assert_", "check", "warns")  # in the dump of a test's tree


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


def is_shapeless(module: str) -> bool:
    return module in SHAPELESS or module.endswith(("_utils", "_helpers"))


def idle_tests(tree: ast.Module) -> list[str]:
    """Test functions in which nothing can fail but by an accident."""
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
    ]
    return [test.name for test in tests if not any(word in ast.dump(test) for word in ASSERTING)]


def test_no_file_runs_code_it_reads(root: Path) -> None:
    found = {
        str(path): calls
        for path in tracked(root)
        if path.suffix == ".py" and (calls := unsafe_calls(ast.parse(path.read_text())))
    }
    assert found == {}


def test_modules_are_named_by_nouns(root: Path) -> None:
    assert [path for path in tracked(root) if path.suffix == ".py" and is_shapeless(path.stem)] == []


def test_init_files_are_empty(root: Path) -> None:
    assert [path for path in tracked(root) if path.name == "__init__.py" and path.read_text()] == []


def test_no_file_names_a_registry(root: Path) -> None:
    found = [
        (path.name, registry)
        for path in tracked(root)
        for registry in REGISTRIES
        if registry in path.read_bytes().decode(errors="ignore")
    ]
    assert found == []


def test_citations_point_at_files_that_exist(root: Path) -> None:
    rows = [line for line in (root / "CITATIONS.md").read_text().splitlines() if line.startswith("|")]
    cited = {path for row in rows[2:] for path in re.findall(r"`([^`]+)`", row.split("|")[-2])}
    assert len(cited) > 10
    assert sorted(path for path in cited if not (root / path).exists()) == []


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


def test_a_planted_idle_test_is_found() -> None:
    idle, asserting = "def test_a():\n    f()\n", "def test_b():\n    assert f()\n"
    raising = "def test_c():\n    with pytest.raises(E):\n        f()\n"
    assert idle_tests(ast.parse(idle + asserting + raising)) == ["test_a"]


def test_a_planted_shapeless_name_is_found() -> None:
    assert [name for name in ("misc", "box_utils", "boxes", "clock") if is_shapeless(name)] == [
        "misc",
        "box_utils",
    ]
