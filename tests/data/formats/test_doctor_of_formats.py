"""The doctor's page on every packaging: nothing is wrong, then the planted faults are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.doctor import __main__ as page
from tests.data.packagings import ONE_JSON, PACKAGINGS, UNDIVIDED, Packaging

EVERY: dict[str, Packaging] = PACKAGINGS | UNDIVIDED | ONE_JSON
SIZE = "another size than annotated"  # right, where images were resized after they were annotated
DEFECTS = {
    "COCO, images resized": [SIZE],
    "VOC, images resized": [SIZE],
    "darknet with each line twice": ["repeated label line"],
}


@pytest.fixture(autouse=True)
def quick_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "draw_charts", lambda *_, **__: None)  # a second each


def doctor(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, str]:
    try:
        page.main([str(path), "--threads", "1"])
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.mark.parametrize("name", EVERY)
def test_the_doctor_finds_nothing_and_then_what_is_planted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = EVERY[name](tmp_path / "set")
    code, output = doctor(capsys, path)
    defects = DEFECTS.get(name, [])
    assert code == bool(defects), output
    assert all(defect in output for defect in defects)
    next(each for each in path.parent.rglob("t1.*") if each.suffix.lower() == ".png").write_bytes(b"")
    code, output = doctor(capsys, path)
    assert code == 1
    assert "1 unreadable image skipped" in output


def replaced(old: bytes, new: bytes, pattern: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        for file in root.rglob(pattern):
            file.write_bytes(file.read_bytes().replace(old, new))

    return plant


BOX = b'"bbox": [8, 6, 32, 24]'
FAULTS = {
    "COCO of Roboflow": [
        (replaced(BOX, b'"bbox": [8, 6, 32]', "*.json"), "expected 4 numbers as bbox, found [8, 6, 32]"),
        (replaced(BOX, b'"bbox": [8, 6, 320, 24]', "*.json"), "1 box reaching out of its image clipped"),
        (replaced(b'"category_id": 2', b'"category_id": 9', "*.json"), "names category 9"),
    ],
    "VOC of Roboflow": [
        (replaced(b"<xmax>40<", b"<xmax>far<", "*1.xml"), "expected numbers in <bndbox>, found xmin='8'"),
        (replaced(b"<xmax>40<", b"<xmax>8<", "*1.xml"), "1 box without area dropped"),
        (replaced(b"</annotation>", b"", "t1.xml"), "1 unusable annotation file"),
        (replaced(b"<annotation>", b"<!DOCTYPE a><annotation>", "t1.xml"), "found a DOCTYPE or ENTITY"),
    ],
    "yaml of Roboflow": [
        (replaced(b"0 0.", b"7 0.", "t1.txt"), "t1.txt:1 names class 7 of 3"),
        (replaced(b"0 0.", b"0 nan 0.", "t1.txt"), "expected 'class x y w h', found '0 nan"),
        (replaced(b"2 0.", b"2 12.", "t1.txt"), "pixels?"),
    ],
    "LabelImg's txt": [(replaced(b"\n", b" 3 4\n", "t1.txt"), "as the upright boxes around them")],
    "LabelImg's xml": [(replaced(b"<name>cat", b"<name>", "t1.xml"), "expected a class in <name>, found none")],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, at) for name, faults in FAULTS.items() for at in range(len(faults))]
)
def test_planted_faults_of_annotations_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, number: int
) -> None:
    plant, message = FAULTS[name][number]
    path = EVERY[name](tmp_path / "set")
    plant(tmp_path / "set")
    _, output = doctor(capsys, path)
    assert message in output
