"""The page `python -m data.doctor`: each planted defect is found, named and counted; a clean set has none."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cfg.parse import CfgError
from data import problems
from data.annotation_formats import open_image_set, splits_of
from data.box_sizes import input_sides
from data.digits import make_digits
from data.doctor import __main__ as page
from data.doctor import checkup, duplicates, labels
from data.doctor.charts import draw_charts
from data.doctor.checkup import quick_findings
from data.doctor.finding import Finding
from data.doctor.images import jpeg_ends, scan_images
from data.doctor.labels import REPEATED_IOU, label_findings, repeated_boxes
from data.doctor.report import overview, verdict
from data.formats import coco
from data.image_set import ImageSet, Record, pack
from tests.data.sets import CLASSES, Scene, turn, write_coco, write_darknet, write_image, write_voc
from utils.page import run_page

CAT, DOG, OWL = ((name, (8.0 + 9 * at, 6.0, 40.0 + 9 * at, 30.0)) for at, name in enumerate(CLASSES))


def scenes(prefix: str) -> list[Scene]:
    """Two images with objects of all classes and one without."""
    stems = [f"{prefix}{number}" for number in range(3)]
    return [
        Scene(stem=stems[0], objects=[CAT, DOG]),
        Scene(stem=stems[1], objects=[OWL]),
        Scene(stem=stems[2], objects=[]),
    ]


def repaint(folder: Path) -> None:
    """Give every image its own pixels: `write_coco` and the others start each split with the same seed."""
    for seed, path in enumerate(sorted(folder.rglob("*.png"))):
        write_image(path, cv2.imread(str(path)).shape[:2], seed)


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COCO folder with train and val that nothing is wrong with; runs/ are made beside it, without the charts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "draw_charts", lambda *_, **__: None)  # a second each
    for split in ("train", "val"):
        write_coco(Path("set"), split, scenes(split))
    repaint(Path("set"))
    return Path("set")


def doctor(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    """Exit code and page."""
    code = 0
    try:
        page.main([str(each) for each in argv])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().out


def titles(output: str) -> list[str]:
    """The first line of every finding."""
    return re.findall(r"^(?:\w+(?: and \w+)?): \d.*$", output, re.MULTILINE)


def change(file: Path, **lists: object) -> None:
    content = json.loads(file.read_text())
    for name, value in lists.items():
        content[name] = value(content[name])  # type: ignore[operator]
    file.write_text(json.dumps(content))


def with_box(file: Path, image_id: int, category: int, box: Sequence[float]) -> None:
    row = {"id": 77, "image_id": image_id, "category_id": category, "bbox": list(box), "area": 1, "iscrowd": 0}
    change(file, annotations=lambda rows: [*rows, row])


# --- the page --------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_clean_set(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = doctor(capsys, clean)
    assert code == 0 and "Nothing is wrong." in output and titles(output) == []
    assert re.search(r"^images +3 +3$", output, re.MULTILINE)
    assert re.search(r"^  without objects +1 +1$", output, re.MULTILINE)
    assert re.search(r"^objects +3 +3$", output, re.MULTILINE)
    assert re.search(r"^  owl +1 +1$", output, re.MULTILINE)
    folder = Path("runs/doctor-set")
    assert "Nothing is wrong." in (folder / "doctor.txt").read_text()


def test_the_built_in_digits_are_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = make_digits(tmp_path / "digits", counts={"train": 40, "val": 10, "test": 10})
    code, output = doctor(capsys, digits, "--out", tmp_path / "out")
    assert code == 0 and re.search(r"^images +40 +10 +10$", output, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "doctor.png", "doctor.txt"]
    assert cv2.imread(str(tmp_path / "out" / "doctor.png")).shape[1] == 1650


def test_every_defect_of_labels_is_named(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = clean / "annotations" / "instances_train.json"
    with_box(file, 1, 3, (8, 6, 32, 24.5))  # the cat's, again
    with_box(file, 1, 7, (70, 50, 20, 20))
    with_box(file, 2, 9, (90, 70, 5, 5))
    with_box(file, 2, 9, (5, 5, 20, 0))
    with_box(file, 2, 4, (5, 5, 20, 20))
    with_box(file, 3, 9, (5, 5, 1.5, 20))
    change(file, annotations=lambda rows: [*rows, {"image_id": 1, "category_id": 3, "bbox": "big"}])
    code, output = doctor(capsys, clean, "--image-size", "64")
    assert code == 1
    assert sorted(titles(output)) == [
        "train: 1 box drawn twice",
        "train: 1 box outside its image dropped",
        "train: 1 box reaching out of its image clipped",
        "train: 1 box with a side below 2 px at the network's input",
        "train: 1 box without area dropped",
        "train: 1 label of an unknown class dropped",
        "train: 1 malformed label dropped",
    ]
    assert "set/train/train0.png: cat, 8,6 to 40,30.5" in output
    assert "set/train/train2.png: owl, 5,5 to 6.5,25" in output
    assert output.index("Worth a look (6)") < output.index("Good to know (1)") < output.index("below 2 px at")


def test_a_note_alone_is_no_defect(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_box(clean / "annotations" / "instances_train.json", 3, 9, (5, 5, 1.5, 20))
    code, output = doctor(capsys, clean)
    assert code == 0 and titles(output) == [] and "Good to know" not in output  # pico's 160 px are twice the image's
    code, output = doctor(capsys, clean, "--image-size", "64")
    assert code == 0 and titles(output) == ["train: 1 box with a side below 2 px at the network's input"]


def test_every_defect_of_images_is_named(clean: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """capfd: what decoders write to stderr by themselves must not be seen either."""
    jpeg = cv2.imencode(".jpg", cv2.imread(str(clean / "train" / "train0.png")))[1].tobytes()
    (clean / "train" / "train0.png").write_bytes(jpeg[: len(jpeg) // 2])  # its header is whole
    png = (clean / "train" / "train1.png").read_bytes()
    (clean / "train" / "train1.png").write_bytes(png[: len(png) // 2])
    (clean / "val" / "val1.png").unlink()
    (clean / "val" / "val2.png").write_text("no image")
    change(
        clean / "annotations" / "instances_val.json",
        images=lambda rows: [{**rows[0], "height": 120, "width": 160}, *rows[1:]],
    )
    with pytest.raises(SystemExit) as stop:
        page.main([str(clean)])
    output, errors = capfd.readouterr()
    assert stop.value.code == 1 and not re.search("png|jpeg", errors, re.IGNORECASE)
    assert sorted(titles(output)) == [
        "train: 2 images that do not open",
        "val: 1 class of train that has no object here",
        "val: 1 image of another size than annotated, its boxes scaled with it",
        "val: 1 missing image skipped",
        "val: 1 unreadable image skipped",
    ]
    assert "set/val/val0.png: annotated as 120x160, the image is 60x80" in output
    assert re.search(r"^ +\S+set/train/train0\.png\n +\S+set/train/train1\.png$", output, re.MULTILINE)
    code, output = doctor(capfd, clean, "--quick")  # type: ignore[arg-type]
    assert code == 1 and "No image was decoded" in output
    assert not any("open" in title for title in titles(output))
    assert "val: 1 image of another size than annotated, its boxes scaled with it" in titles(output)


@pytest.mark.parametrize("opened", [3, 2])
def test_an_image_that_exif_turns_has_its_size(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, opened: int
) -> None:
    turn(clean / "val" / "val0.png")
    monkeypatch.setattr(coco, "_OPENED_IMAGES", opened)
    assert doctor(capsys, clean)[0] == 0


@pytest.mark.parametrize("opened", [3, 2])
def test_an_image_on_its_side_without_exif_is_named(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, opened: int
) -> None:
    """By its reader, or in a set that is taken at its word by the doctor; boxes stay where they are."""
    path = clean / "val" / "val0.png"
    assert cv2.imwrite(str(path), np.rot90(cv2.imread(str(path))))
    monkeypatch.setattr(coco, "_OPENED_IMAGES", opened)
    code, output = doctor(capsys, clean)
    assert code == 1
    assert titles(output) == ["val: 1 image annotated with width and height swapped, its own size used"]
    assert "set/val/val0.png: annotated as 60x80, the image is 80x60" in output


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("most", "dtype", "named"),
    [
        (4095, np.uint16, True),
        (255, np.uint16, True),
        (65535, np.uint16, False),
        (0, np.uint16, False),
        (20, np.uint8, False),
    ],
)
def test_16_bits_that_are_dark_in_8_are_named(
    clean: Path, capsys: pytest.CaptureFixture[str], suffix: str, most: int, dtype: type[np.generic], named: bool
) -> None:
    path = clean / "train" / "train0.png"  # by its name; decoders go by the content
    image = cv2.imread(str(path)).astype(np.float64)
    path.write_bytes(cv2.imencode(suffix, (image / image.max() * most).astype(dtype))[1].tobytes())
    code, output = doctor(capsys, clean)
    assert code == int(named)
    assert titles(output) == ["train: 1 image of 16 bits that is nearly black in 8"] * named
    assert ("set/train/train0.png\n" in output) == ("Rescale the values to 0 to 255" in output) == named


def test_a_blue_image_of_16_bits_is_not_dark(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though as a grey one it is."""
    blue = np.zeros((60, 80, 3), np.uint16)
    blue[..., 0] = 65535
    assert cv2.imwrite(str(clean / "train" / "train0.png"), blue)
    assert doctor(capsys, clean)[0] == 0


@pytest.mark.parametrize("quick", [False, True])
def test_images_in_two_splits_are_found_by_their_bytes(
    clean: Path, capsys: pytest.CaptureFixture[str], quick: bool
) -> None:
    shutil.copy(clean / "train" / "train1.png", clean / "val" / "val2.png")
    shutil.copy(clean / "train" / "train0.png", clean / "val" / "val1.png")
    shutil.copy(clean / "train" / "train0.png", clean / "train" / "train2.png")
    code, output = doctor(capsys, clean, *(["--quick"] if quick else []))
    assert code == 1
    assert titles(output) == [
        "train and val: 2 images in both, byte for byte",
        "train: 1 image that repeats an earlier one, byte for byte",
    ]
    for pair in (
        "val/val1.png = train/train0.png",
        "val/val2.png = train/train1.png",
        "train/train2.png = train/train0.png",
    ):
        later, earlier = (str((clean / place).resolve()) for place in pair.split(" = "))
        assert f"      {later} = {earlier}\n" in output
    assert "AP on val is too high" in output


def test_classes_that_training_does_not_know(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (clean / "annotations" / f"instances_{split}.json" for split in ("train", "val"))
    both = lambda rows: [*rows, {"id": 20, "name": "bat"}]  # noqa: E731
    change(train, categories=both, annotations=lambda rows: [row for row in rows if row["category_id"] != 9])
    change(
        val,
        categories=lambda rows: [*both(rows), {"id": 30, "name": "emu"}],
        annotations=lambda rows: [row for row in rows if row["category_id"] != 3],
    )
    code, output = doctor(capsys, clean)
    assert code == 1
    assert titles(output) == [
        "train: 2 classes of the list that no object has",
        "val: 1 class that train does not list",
        "val: 1 class that no object of train has",
        "val: 1 class of train that has no object here",
    ]
    found = re.findall(r"^      (\S.*)$", output, re.MULTILINE)
    assert found == ["owl", "bat", "emu", "owl: 1 objects", "cat"]


def test_a_split_without_objects_is_a_finding(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        change(clean / "annotations" / f"instances_{split}.json", annotations=lambda rows: [])
    code, output = doctor(capsys, clean)
    assert code == 1
    assert titles(output) == [f"{split}: 3 images, none of which has an object" for split in ("train", "val")]
    assert "no box to compare them with" in output


def test_a_split_that_a_training_wants_is_missed(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clean / "annotations" / "instances_val.json").rename(clean / "annotations" / "instances_dev.json")
    (clean / "val").rename(clean / "dev")
    code, output = doctor(capsys, clean)
    assert code == 1 and titles(output) == ["val: 1 absent split"] and "--val-split" in output
    assert doctor(capsys, clean, "--splits", "train")[0] == 0
    (clean / "annotations" / "instances_train.json").unlink()
    code, output = doctor(capsys, clean)
    assert code == 1 and titles(output) == [f"{split}: 1 absent split" for split in ("train", "val")]


def test_one_image_of_one_class_in_one_split(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = clean / "annotations" / "instances_train.json"
    (clean / "annotations" / "instances_val.json").unlink()
    change(
        file,
        images=lambda rows: rows[:1],
        annotations=lambda rows: [row for row in rows if row["category_id"] == 3],
        categories=lambda rows: [row for row in rows if row["id"] == 3],
    )
    code, output = doctor(capsys, clean, "--splits", "train")
    assert code == 0 and "objects of 1 classes" in output
    loose = clean / "loose.json"
    shutil.move(file, loose)
    change(loose, images=lambda rows: [{**row, "file_name": f"train/{row['file_name']}"} for row in rows])
    assert splits_of(loose) == ()
    assert doctor(capsys, loose)[0] == 0


def test_darknet_and_voc_name_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "draw_charts", lambda *_, **__: None)
    for split in ("train", "val"):
        write_darknet(Path("dark"), split, scenes(split))
        write_voc(Path("voc"), split, scenes(split))
    repaint(Path("dark"))
    repaint(Path("voc"))
    assert doctor(capsys, "dark")[0] == doctor(capsys, "voc")[0] == 0
    label = Path("dark/labels/train0.txt")
    label.write_text(label.read_text() + "0 0.5 0.5 0 0.2\n7 0.5 0.5 0.2 0.2\n")
    code, output = doctor(capsys, "dark")
    assert code == 1 and "dark/labels/train0.txt:3\n" in output and "train0.txt:4 names class 7 of 3" in output
    xml = Path("voc/Annotations/val0.xml")
    xml.write_text(xml.read_text().replace("<xmax>40.0</xmax>", "<xmax>8.0</xmax>"))
    code, output = doctor(capsys, "voc")
    assert code == 1 and "val: 1 box without area dropped" in output and "val0.xml object 1" in output
    assert "runs/doctor-voc-2/doctor.txt" in output


def test_all_places_are_in_the_file_and_with_all_on_the_page(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(7):
        with_box(clean / "annotations" / "instances_train.json", 1, 3, (8, 6, 32, 24))
    place = "set/train/train0.png: cat, 8,6 to 40,30"
    _, output = doctor(capsys, clean, "--out", "short")
    assert "train: 7 boxes drawn twice" in output and output.count(place) == 5 and "and 2 more" in output
    assert Path("short/doctor.txt").read_text().count(place) == 7
    _, output = doctor(capsys, clean, "--out", "long", "--all")
    assert output.count(place) == 7 and "more" not in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["bare"], "bare: holds no known data set"),
        (["set", "--splits", "train", "holidays"], "no split 'holidays'"),
        (["set", "--cfg", "no-such"], "no such cfg among"),
        (["set", "--image-size", "big"], "'big' is not a size"),
        (["set", "--threads", "0"], "0 must be at least 1"),
        (["set", "--out", "set"], "set: already exists"),
        (["empty"], "its list 'images' is empty"),
        (["unreadable"], "no usable image in split 'train': 3 unreadable images skipped"),
        ([], "the following arguments are required: PATH"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    argv: list[str], message: str, clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bare").mkdir()
    change(write_coco(Path("empty"), "train", scenes("x")), images=lambda rows: [])
    write_coco(Path("unreadable"), "train", scenes("x"))
    for path in Path("unreadable/train").iterdir():
        path.write_text("no image")
    monkeypatch.setattr(sys, "argv", ["data.doctor", *argv])
    with pytest.raises(SystemExit) as stop:
        run_page(page.main, CfgError)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "Traceback" not in error
    assert not Path("runs").exists()


# --- its parts -------------------------------------------------------------------------------------------------


def test_what_a_training_says(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [open_image_set(clean, split) for split in ("train", "val")]
    assert quick_findings(*sets) == []
    with_box(clean / "annotations" / "instances_val.json", 1, 7, (5, 5, 0, 5))
    shutil.copy(clean / "train" / "train1.png", clean / "val" / "val2.png")
    sets = [open_image_set(clean, split) for split in ("train", "val")]
    folder = clean.resolve()
    expected = [
        "val: 1 box without area dropped (first: instances_val.json annotation 77)",
        f"train and val: 1 image in both, byte for byte (first: {folder}/val/val2.png = {folder}/train/train1.png)",
    ]
    assert quick_findings(*sets) == expected
    monkeypatch.setattr(checkup, "_QUICKLY_READ", 5)  # of six images: only paths are compared
    assert quick_findings(*sets) == expected[:1]
    assert "train: 3 images in both, byte for byte" in quick_findings(sets[0], sets[0])[0]


def test_there_is_advice_for_every_problem_of_readers() -> None:
    kinds = {value for name, value in vars(problems).items() if name.isupper() and isinstance(value, tuple)}
    assert len(kinds) >= 8 and kinds == set(labels._ADVICE)


def random_set(rng: np.random.Generator, objects: int) -> ImageSet:
    """Boxes of which many nearly equal another; of three images, two classes, and a few crowds."""
    records = []
    for image in range(3):
        corners = rng.integers(0, 4, (objects, 2)) * 20.0
        boxes = np.concatenate([corners, corners + 40], axis=1) + rng.uniform(-1, 1, (objects, 4))
        records.append(
            Record(
                path=f"{image}.png",
                image_id=image,
                boxes=boxes.astype(np.float32),
                labels=rng.integers(0, 2, objects),
                is_crowd=rng.random(objects) < 0.1,
                hw=(120, 120),
            )
        )
    kept = {"name": "r", "split": "train", "class_names": ["a", "b"], "category_ids": [1, 2]}
    return pack(records, **kept, problems=problems.Problems(), source="r")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_repeated_boxes_are_those_of_a_slow_loop(seed: int) -> None:
    """Every pair compared; of a pair the one further right, or the later one, counts."""
    image_set = random_set(np.random.default_rng(seed), 40)
    expected = set()
    for image in range(3):
        mine = range(image_set.starts[image], image_set.starts[image + 1])
        for i in mine:
            for j in mine:
                (a, b, c, d), (e, f, g, h) = image_set.boxes[i].tolist(), image_set.boxes[j].tolist()
                shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
                iou = shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)
                same = image_set.labels[i] == image_set.labels[j] and not image_set.is_crowd[[i, j]].any()
                if same and iou >= REPEATED_IOU and (a, i) < (e, j):
                    expected.add(j)
    assert len(expected) > 5
    assert repeated_boxes(image_set).tolist() == sorted(expected)


def test_no_boxes_repeat_nothing() -> None:
    empty = random_set(np.random.default_rng(0), 0)
    assert len(repeated_boxes(empty)) == 0
    assert [each.title for each in label_findings(empty)] == ["train: 3 images, none of which has an object"]


@pytest.mark.parametrize("flags", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)])
def test_a_jpeg_that_was_cut_off_is_known_by_its_missing_end(flags: tuple[int, ...]) -> None:
    """Which OpenCV 4 decodes all the same. Previews in front and what cameras append behind do not mislead."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", noise, flags)[1].tobytes()
    preview = b"Exif\0\0" + jpeg
    whole = jpeg[:2] + b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview + jpeg[2:]
    for content in (jpeg, whole):
        assert jpeg_ends(content) and jpeg_ends(content + b"\0\0") and jpeg_ends(content + b"\xff\xda a film")
    # Not within the preview's last bytes, where the file would end as an image does.
    for cut in (4, 30, len(preview), len(whole) - 500, len(whole) - 2, len(whole) - 1):
        assert not jpeg_ends(whole[:cut])


def test_a_scan_does_not_depend_on_the_threads(clean: Path) -> None:
    image_set = open_image_set(clean, "train")
    one, four = scan_images(image_set, 1), scan_images(image_set, 4)
    assert one.digests == four.digests and one.opens.all()
    assert one.hws.tolist() == [[60, 80]] * 3


def test_an_image_that_vanished_meanwhile_does_not_open(clean: Path) -> None:
    image_set = open_image_set(clean, "train")
    (clean / "train" / "train1.png").unlink()
    scan = scan_images(image_set, 1)
    assert scan.opens.tolist() == [True, False, True] and scan.digests[1] == b""
    assert duplicates.same_bytes([image_set, image_set], [[b"", b"a", b"b"], [b"", b"c", b"d"]]) == []
    assert duplicates.quick_digests(image_set)[1] == b""


def test_many_classes_and_odd_names_fit_on_the_page(tmp_path: Path) -> None:
    image_set = random_set(np.random.default_rng(0), 40)
    names = tuple(f"${number}$ a rather long name of a class" for number in range(300))
    image_set = replace(image_set, class_names=names, labels=image_set.labels * 150)
    sides = [input_sides(image_set, (64, 96), True)] * 2
    lines = list(overview([image_set] * 2, sides))
    assert "objects of 300 classes" in "\n".join(lines) and len(lines) < 50
    assert any(line.split()[:2] == ["280", "more"] for line in lines)
    draw_charts([image_set] * 2, sides, tmp_path / "a.png", input_hw=(64, 96), anchors=np.zeros((0, 2)))
    assert cv2.imread(str(tmp_path / "a.png")).std() > 5


@pytest.mark.filterwarnings("error")
def test_the_charts_of_no_objects(tmp_path: Path) -> None:
    empty = random_set(np.random.default_rng(0), 0)
    sides = [input_sides(empty, (64, 96), True)]
    draw_charts([empty], sides, tmp_path / "a.png", input_hw=(64, 96), anchors=np.ones((2, 2)))
    assert cv2.imread(str(tmp_path / "a.png")).std() > 5
    assert "  median                                       -" in list(overview([empty], sides))


def test_defects_come_first_and_more_are_counted() -> None:
    note = Finding(kind=("b", "bs"), where="val", count=1, advice="Fine.", is_note=True)
    defect = Finding(kind=("a", "as"), where="train", count=1200, advice="Mend it.", places=("x", "y", "z"))
    lines = list(verdict([note, defect], every_place=True))
    assert lines.index("train: 1,200 as") < lines.index("      and 1,197 more") < lines.index("val: 1 b")
    assert defect.line() == "train: 1,200 as (first: x, y, z)" and note.line() == "val: 1 b"
    assert list(verdict([note], every_place=True))[:2] == ["", "Nothing is wrong."]


def test_bccd(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two boxes without area."""
    code, output = doctor(capsys, shared / "data" / "bccd", "--out", tmp_path / "out", "--cfg", "yolov4-tiny")
    assert code == 1
    assert titles(output) == [
        "train: 1 box without area dropped",
        "val: 1 box without area dropped",
    ]
    assert re.search(r"^objects +2,804 +1,137 +945$", output, re.MULTILINE)
    assert "mean 0.749" in output


def test_coco(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = doctor(capsys, shared / "data" / "coco_tiny", "--out", tmp_path / "out")
    assert code == 0 and all("below 2 px" in title for title in titles(output)) and len(titles(output)) == 2
