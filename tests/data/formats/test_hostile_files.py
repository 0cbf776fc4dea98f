"""Annotation files made to do harm: a sentence or a skipped image, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import Tensor

from data.annotation_formats import open_image_set
from data.dataset import EvalDataset, EvalKey
from data.doctor.__main__ import main as doctor
from data.doctor.charts import _draw_classes
from data.doctor.checkup import full_checkup, quick_findings
from data.doctor.labels import repeated_boxes
from tests.data.packagings import PACKAGINGS, text
from tests.data.sets import noise_image_set
from utils.boxes import elementwise_iou
from utils.errors import UserError, exit_on_error
from utils.image_file import image_fault, image_hw, is_plausible, read_image

ENTITIES = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>',
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>',
)


@pytest.mark.parametrize("content", ENTITIES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_not_expanded(tmp_path: Path, content: str, encoding: str) -> None:
    path = PACKAGINGS["VOC"](tmp_path)
    (tmp_path / "Annotations" / "v1.xml").write_bytes(content.encode(encoding))
    image_set = open_image_set(path, "val")
    assert len(image_set) == 1
    assert "Annotations/v1.xml: expected plain xml, found a DOCTYPE or ENTITY" in image_set.problems.summary()[0]


@pytest.mark.parametrize("content", [b"[" * 10_000_000, b'{"images": [' + b"9" * 10_000 + b"]}"])
def test_brackets_and_digits_without_end(tmp_path: Path, content: bytes) -> None:
    path = PACKAGINGS["COCO"](tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_bytes(content)
    with pytest.raises(UserError, match=r"instances_val2017\.json: (its brackets are nested too deep|cannot be read)"):
        open_image_set(path, "val")


@pytest.mark.parametrize(
    ("name", "file"),
    [("darknet", "obj_val/v1.txt"), ("VOC", "Annotations/v1.xml"), ("yaml", "labels/val/v1.txt")],
)
def test_a_huge_file_is_not_read(tmp_path: Path, name: str, file: str) -> None:
    path = PACKAGINGS[name](tmp_path)
    os.truncate(tmp_path / file, 1 << 30)
    (line,) = open_image_set(path, "val").problems.summary()
    assert re.search(r"has 1,073,741,824 bytes, at most (4,194,304|16,777,216) are read", line)


@pytest.mark.parametrize("name", ["darknet", "yaml"])
def test_a_huge_list_of_settings_is_a_sentence(tmp_path: Path, name: str) -> None:
    path = PACKAGINGS[name](tmp_path)
    os.truncate(next(iter(tmp_path.glob("*.data" if name == "darknet" else "*.yaml"))), 1 << 30)
    with pytest.raises(UserError, match=r"has 1,073,741,824 bytes, at most [\d,]+ are read"):
        open_image_set(path, "val")


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x22\0\2\x11\1\3\x11\1"


@pytest.mark.parametrize("side", [0, 60_000, 2**31 - 1, 2**32 - 1])
def test_a_header_that_claims_too_much_is_no_image(tmp_path: Path, side: int) -> None:
    content = png_header(side, side) if side > 65535 or not side else jpeg_header(side, side)
    file = tmp_path / "a.png"
    file.write_bytes(content)
    assert image_hw(str(file)) is None
    assert read_image(str(file)) is None


@pytest.mark.parametrize("size", ["100000", "2147483648", "0", "-5"])
def test_a_written_size_that_cannot_be_is_not_believed(tmp_path: Path, size: str) -> None:
    path = PACKAGINGS["COCO"](tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"height": 60, "width": 80', f'"height": {size}, "width": {size}'))
    assert open_image_set(path, "val")[0].hw == (60, 80)
    path = PACKAGINGS["VOC"](tmp_path / "voc")
    file = tmp_path / "voc" / "Annotations" / "v1.xml"
    file.write_text(file.read_text().replace("<width>80", f"<width>{size}"))
    assert open_image_set(path, "val")[0].hw == (60, 80)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("COCO", '"height": 60, "width": 80', '"height": 120, "width": 160'),
        ("VOC", "<width>80</width><height>60</height>", "<width>160</width><height>120</height>"),
        ("csv of Roboflow", "v1.png,80,60,", "v1.png,160,120,"),
    ],
)
def test_a_written_size_that_the_image_does_not_have_is_told_at_the_start(
    tmp_path: Path, name: str, old: str, new: str
) -> None:
    """Boxes refer to the written one, so that they are scaled."""
    path = PACKAGINGS[name](tmp_path)
    boxes = open_image_set(path, "val")[0].boxes
    for file in [each for each in tmp_path.rglob("*") if each.suffix in (".json", ".xml", ".csv")]:
        file.write_text(file.read_text().replace(old, new))
    image_set = open_image_set(path, "val")
    assert image_set[0].hw == (120, 160) and (image_set[0].boxes == boxes).all()
    assert any("of another size than annotated" in line for line in quick_findings(image_set))


ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize("name", ["COCO", "darknet", "yaml"])
def test_terminal_escapes_of_names_are_not_printed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = PACKAGINGS[name](tmp_path)
    for file in (*tmp_path.rglob("*.json"), *tmp_path.glob("obj.names"), *tmp_path.glob("*.yaml")):
        escaped = r"\u001b]0;owned\u0007\u001b[2J" if file.suffix in (".json", ".yaml") else ESCAPE
        quoted = f'"{escaped}"' if file.suffix == ".yaml" else escaped
        text(file, file.read_text().replace("cat", quoted, 1))
    image_set = open_image_set(path, "val")
    assert all(each.isprintable() for each in image_set.class_names)
    assert all(row["name"].isprintable() for row in image_set.ground_truth()["categories"])

    def page() -> None:
        open_image_set(tmp_path / f"no {ESCAPE}\nset", "val")

    with pytest.raises(SystemExit):
        exit_on_error(page)
    assert "\x1b" not in capsys.readouterr().err


def test_an_escape_in_a_file_name_is_escaped_in_problems(tmp_path: Path) -> None:
    path = PACKAGINGS["darknet"](tmp_path)
    text(tmp_path / "val.txt", f"obj_val/v1.png\n{ESCAPE}.png\n")
    (line,) = open_image_set(path, "val").problems.summary()
    assert line.startswith(r"1 missing image skipped (first: \x1b]0;owned\x07\x1b[2J.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".webp", ".gif", ".ppm", ".jp2"])
def test_an_image_above_the_limit_is_not_decoded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all formats, before its pixels take memory; the problem says why."""
    file = tmp_path / f"a{suffix}"
    try:
        file.write_bytes(cv2.imencode(suffix, np.zeros((70, 90, 3), np.uint8))[1].tobytes())
    except cv2.error:
        pytest.skip(f"this OpenCV writes no {suffix}")
    assert image_hw(str(file)) == (70, 90)
    assert image_fault(str(file)) == str(file)
    monkeypatch.setattr("utils.image_file.MOST_PIXELS", 70 * 90 - 1)
    decoded: list[object] = []
    monkeypatch.setattr(cv2, "imdecode", lambda *arguments: decoded.append(arguments))
    assert image_hw(str(file)) is read_image(str(file)) is None
    assert not decoded
    assert "its header claims no area, or more than 0.006299 megapixels" in image_fault(str(file))
    path = PACKAGINGS["darknet"](tmp_path / "set")
    monkeypatch.setattr("utils.image_file.MOST_PIXELS", 64 * 62)
    problems = open_image_set(path, "val").problems.summary()
    assert any("v1.png: its header claims" in line for line in problems)


def test_by_default_an_image_has_up_to_100_megapixels() -> None:
    assert is_plausible((10_000, 10_000)) and not is_plausible((10_000, 10_001))


def test_an_unreadable_image_is_grey_in_the_input_s_size(tmp_path: Path) -> None:
    """Whatever size its annotations give it."""
    path = PACKAGINGS["COCO"](tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"height": 60, "width": 80', '"height": 9000, "width": 11000'))
    image_set = open_image_set(path, "val")
    assert image_set[0].hw == (9000, 11000)
    dataset = EvalDataset(image_set, letterbox=True)
    for content in (None, b"none"):
        if content is not None:
            Path(image_set[0].path).write_bytes(content)
        tracemalloc.start()
        sample = dataset[EvalKey(0, (64, 64))]
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
        tracemalloc.stop()
        assert sample.placement is not None and sample.placement.source_hw == (9000, 11000)
    assert (sample.image == 127).all()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a whole path may be too long
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize(
    ("name", "make"),
    [(name, fifo) for name in ("COCO", "VOC", "darknet", "yaml", "csv of Roboflow")]
    + [("COCO", device), ("darknet", unix_socket)]
    + [pytest.param(name, fifo, marks=pytest.mark.slow) for name in sorted(PACKAGINGS)],
)
def test_what_is_no_regular_file_is_never_read(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """In place of any one file: a sentence, or a line."""
    path = PACKAGINGS[name](tmp_path)
    for file in sorted(each for each in tmp_path.rglob("*") if each.is_file()):
        aside = file.rename(tmp_path / "aside")
        make(file)
        try:
            image_set = open_image_set(path, "val")
            lines = [finding.line() for finding in full_checkup([image_set], 1)]
            dataset = EvalDataset(image_set, letterbox=True)
            samples = [dataset[EvalKey(index, (32, 32))] for index in range(len(image_set))]
            assert len(samples) == 2 or any(file.stem in line for line in [*lines, *image_set.problems.lines()])
        except UserError as error:
            assert file.name in str(error) or "holds no known data set" in str(error) or "has no split" in str(error)
        file.unlink()
        aside.rename(file)


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e"


@pytest.mark.parametrize("place", ["a folder", "an image", "a class", "a list"])
def test_nothing_that_a_data_set_says_reaches_the_terminal_raw(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = PACKAGINGS["VOC"](tmp_path / (HOSTILE if place == "a folder" else "set"))
    split = "val"
    if place == "an image":
        for file in path.rglob("v1.*"):
            file.rename(file.with_name(f"{HOSTILE}{file.suffix}"))
        (path / "ImageSets/Main/val.txt").write_text(f"{HOSTILE}\nnone {HOSTILE}\nv2\n", encoding="utf-8")
        (path / "JPEGImages" / f"{HOSTILE}.png").write_bytes(b"\x89PNG")
    elif place == "a class":
        for file in path.rglob("*.xml"):
            file.write_text(file.read_text().replace("cat", "cat&#x9b;2J&#x202e;").replace("dog", "dog&#13;&#10;ok"))
    elif place == "a list":
        split = HOSTILE
        (path / "ImageSets/Main/val.txt").rename(path / f"ImageSets/Main/{HOSTILE}.txt")
    with contextlib.suppress(SystemExit):
        doctor([str(path), "--splits", split, "--all"])
    printed = capsys.readouterr()
    assert len(printed.out) > 1000
    assert all(each.isprintable() for each in printed.out.replace("\n", ""))
    assert all(each.isprintable() for each in printed.err.replace("\n", "").replace("\r", ""))


@pytest.mark.parametrize("name", ["COCO", "VOC", "darknet", "yaml", "csv of Roboflow"])
def test_a_class_name_of_megabytes_is_a_sentence(tmp_path: Path, name: str) -> None:
    """Tables and captions would be as wide."""
    path = PACKAGINGS[name](tmp_path)
    for file in [each for each in tmp_path.rglob("*") if each.suffix in (".json", ".xml", ".names", ".yaml", ".csv")]:
        file.write_text(re.sub(r"\bcat\b", "cat" * 10_000, file.read_text()))
    with pytest.raises(UserError, match=r"names a class of 30,000 characters, 'catcat.*': give it a name of at most"):
        open_image_set(path, "val")


def test_the_chart_of_thousands_of_classes_is_one_line(tmp_path: Path) -> None:
    """A bar takes a millisecond."""
    axes = Figure().subplots()
    names = tuple(map(str, range(5000)))
    image_set = replace(noise_image_set(tmp_path, 2), class_names=names)
    _draw_classes(axes, [image_set])
    assert (len(axes.patches), len(axes.lines)) == (0, 1)


def test_a_label_file_of_the_largest_size_is_judged_in_bounded_time(tmp_path: Path) -> None:
    """Each box is compared with 200 others, be they all at one place."""
    path = PACKAGINGS["darknet"](tmp_path)
    rows = "".join(f"0 .5 .{number:06d} .1 .0{number % 7 + 1}\n" for number in range(2000))
    (tmp_path / "obj_val" / "v1.txt").write_text(rows)
    image_set = open_image_set(path, "val")
    calls: list[int] = []

    def counted(first: Tensor, second: Tensor) -> Tensor:
        calls.append(len(first))
        return elementwise_iou(first, second)

    with patch("data.doctor.labels.elementwise_iou", counted):
        repeated_boxes(image_set)
    assert sum(calls) < 200 * len(image_set.boxes) and len(calls) < 200


@pytest.mark.parametrize(
    "written", ["../../../../etc/passwd", "/etc/passwd", "..\\..\\etc\\passwd", "file:///etc/passwd"]
)
def test_a_path_that_leads_elsewhere_costs_its_own_image_only(tmp_path: Path, written: str) -> None:
    """Even if it is the first, by which the folder of all is chosen."""
    path = PACKAGINGS["COCO"](tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = written
    file.write_text(json.dumps(content))
    image_set = open_image_set(path, "val")
    assert [Path(os.fsdecode(each)).name for each in image_set.paths] == ["v2.png"]


def test_an_image_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = PACKAGINGS["darknet"](tmp_path)
    for file in tmp_path.rglob("v1.png"):
        os.truncate(file, 1 << 40)
    image_set = open_image_set(path, "val")
    assert [Path(os.fsdecode(each)).name for each in image_set.paths] == ["v2.png"]
    os.truncate(image_set[0].path, 1 << 40)
    assert read_image(image_set[0].path) is None
    assert any("does not open" in finding.line() for finding in full_checkup([image_set], 1))
