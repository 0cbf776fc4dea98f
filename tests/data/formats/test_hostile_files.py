"""Annotation files made to do harm: a sentence or a skipped image, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from data.annotation_formats import open_image_set
from tests.data.packagings import PACKAGINGS, text
from utils.errors import UserError, exit_on_error
from utils.image_file import image_hw, read_image

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
    assert "has 1,073,741,824 bytes, at most 16,777,216 are read" in line


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
