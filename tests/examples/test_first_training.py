"""examples/first_training.ipynb: without outputs in the repository, and it runs from its first cell to its last."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.commands import Command, flags_after_parsing

nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def notebook(root: Path):  # type: ignore[no-untyped-def]
    return nbformat.read(root / "examples" / "first_training.ipynb", as_version=4)


def test_it_has_no_outputs(notebook) -> None:  # type: ignore[no-untyped-def]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


def test_its_cells_compile_and_its_commands_parse(notebook) -> None:  # type: ignore[no-untyped-def]
    commands = 0
    for cell in notebook.cells:
        lines = cell.source.splitlines() if cell.cell_type == "code" else []
        assert compile("\n".join(line for line in lines if not line.startswith("!")), cell.id, "exec")
        for line in lines:
            if line.startswith("!"):
                assert flags_after_parsing(Command(page="first_training.ipynb", line=0, text=line[1:], whole=True))
                commands += 1
    assert commands >= 4


@pytest.mark.slow
def test_it_runs(root: Path, tmp_path: Path, notebook, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """In a folder that looks like the checkout, so that its data and its run go there."""
    client = pytest.importorskip("nbclient").NotebookClient
    for path in root.iterdir():
        if path.name not in ("datasets", "runs", "examples") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    client(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()
    said = [output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any("error:" in text or "Traceback" in text for text in said)
    assert any(output.get("data") for output in notebook.cells[-2].outputs)
    assert (tmp_path / "runs" / "first" / "best.pt").is_file()
