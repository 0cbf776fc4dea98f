"""The examples of docs/python.md and of the README, one after the other, as they stand there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.detector import Detector
from tests.models.checkpoint_file import write_checkpoint


def test_the_examples_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    write_checkpoint(tmp_path / "best.pt", class_names=("person", "dog", "cat"))
    for name in ("street.jpg", "park.jpg"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    examples = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.py").write_text("\n".join(examples))
    load = Detector.load
    # A network that nobody trained finds something, if little is enough.
    monkeypatch.setattr(Detector, "load", lambda path: load(path).with_options(confidence=0.003))
    made = runpy.run_path("examples.py")
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(person|dog|cat) 0\.\d+ \(.*\)", said[0])
    assert any(re.fullmatch(r"park\.jpg \d+ Found\(.*\)", line) for line in said)
    assert Image.open("annotated.png").size == (80, 60)
    assert {row["category_id"] for row in made["rows"]} <= {1, 18}


def test_the_readme_has_an_example_that_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_checkpoint(tmp_path / "runs" / "mine" / "best.pt", class_names=("person", "dog"))
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(example)
    assert runpy.run_path("example.py")["found"].boxes.shape[1:] == (4,)
    assert capsys.readouterr().out.startswith("[")
