"""The page `python -m data.anchors`: what it prints, writes and refuses."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from cfg.parse import CfgError
from cfg.plan import load_plan, parse_plan
from data import anchors as page
from data.anchors import deal_masks, fit_on_unseen, input_shapes, judge, main, read_cfg, with_anchors
from data.annotation_formats import open_image_set
from data.clusters import ShapeFit
from data.digits import make_digits
from tests.data.sets import SCENES, write_coco, write_darknet, write_voc
from utils.errors import UserError
from utils.letterbox import whole_placement
from utils.page import run_page

SHIPPED = ("yolov4", "yolov4-csp", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-pico")
MINI = """[net]
width=64
height=32

[convolutional]
filters = 24   # 3 * (5 + 3)
size=1
stride=16
activation=linear

# small ones
[yolo]
mask=0,1,2
anchors = 4,4,  8,8,  16,16   # for nothing in particular
classes=3
num=3
; the end
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("set") / "digits", counts={"train": 60, "val": 2, "test": 2})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed_lines(before: str, after: str) -> dict[str, str]:
    """Old line -> new one; both texts have the same number of lines."""
    pairs = list(zip(before.split("\n"), after.split("\n"), strict=True))
    return {old: new for old, new in pairs if old != new}


# --- boxes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("write", [write_coco, write_voc, write_darknet])
def test_shapes_are_those_at_the_networks_input(tmp_path: Path, write, letterbox: bool) -> None:
    write(tmp_path, "train", SCENES)
    image_set = open_image_set(tmp_path, "train")
    shapes, images = input_shapes(image_set, (96, 128), letterbox)
    expected, owners = [], []
    for index in range(len(image_set)):
        record = image_set[index]
        laid = whole_placement(record.hw, (96, 128), letterbox=letterbox).to_input(record.boxes)
        expected += (laid[:, 2:] - laid[:, :2]).tolist()
        owners += [index] * len(laid)
    assert len(expected) == 3
    np.testing.assert_allclose(shapes, expected, atol=0.005)
    assert images.tolist() == owners


def test_crowd_regions_are_not_clustered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_coco(tmp_path, "train", SCENES)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    shapes, _ = input_shapes(open_image_set(tmp_path, "train"), (60, 80), False)
    assert len(shapes) == 2
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no image of 'train' has an object, but 3 crowd regions"):
        main(["--data", str(tmp_path), "--cfg", "yolov4-pico"])


def test_boxes_that_training_drops_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = np.array([[1.9, 50], [2, 2], [30, 1], [40, 40]])
    kept, images = page.large_enough(shapes, np.arange(4))
    assert images.tolist() == [1, 3] and kept.tolist() == [[2, 2], [40, 40]]
    assert "2 with a side below 2 px are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 boxes have a side below 2 px"):
        page.large_enough(shapes[[0, 2]], np.arange(2))


# --- the cfg ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_only_the_anchors_change(name: str) -> None:
    plan = load_plan(name)
    count = sum(len(head.mask) for head in plan.head_specs)
    new = np.cumsum(np.full((count, 2), 7.5), axis=0)
    text = with_anchors(plan.source_text, plan, new)
    changed = changed_lines(plan.source_text, text)
    kinds = {re.sub(r"\s*=.*", "", line) for line in changed}
    assert kinds == ({"anchors", "mask"} if name == "yolov4-tiny" else {"anchors"})
    made = parse_plan(text, path="new.cfg")
    assert [head.channels for head in made.head_specs] == [head.channels for head in plan.head_specs]
    for head in made.head_specs:
        np.testing.assert_array_equal(head.anchors, new)
    # Each anchor is in one head, and a finer stride has the smaller ones.
    by_stride = sorted(zip(made.strides, (head.mask for head in made.head_specs), strict=True))
    assert [index for _, mask in by_stride for index in mask] == list(range(count))


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("more", [-1, 1, 4])
def test_another_number_changes_masks_and_filters(name: str, more: int) -> None:
    plan = load_plan(name)
    count = sum(len(head.mask) for head in plan.head_specs) + more
    new = np.cumsum(np.full((count, 2), 10.0), axis=0)
    text = with_anchors(plan.source_text, plan, new)
    made = parse_plan(text, path="new.cfg")  # which refuses filters that do not fit
    kinds = {re.sub(r"\s*=.*", "", line) for line in changed_lines(plan.source_text, text)}
    assert {"anchors", "num", "filters"} <= kinds <= {"anchors", "mask", "num", "filters"}
    assert sorted(index for head in made.head_specs for index in head.mask) == list(range(count))
    assert made.classes == plan.classes == 80
    sizes = [len(head.mask) for head in made.head_specs]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("more", [0, 3])
def test_darknets_own_cfgs(shared: Path, more: int) -> None:
    """Masks in any order, blanks anywhere, [net] blocks pasted at the end, 16 anchors in four heads."""
    checked = 0
    for file in sorted((shared / "darknet" / "cfg").glob("*.cfg")):
        if "[yolo]" not in file.read_text(errors="replace"):
            continue
        text, plan = read_cfg(str(file), None)
        count = sum(len(head.mask) for head in plan.head_specs) + more
        new_text = with_anchors(text, plan, np.cumsum(np.full((count, 2), 10.0), axis=0))
        kinds = {re.sub(r"\s*=.*", "", line) for line in changed_lines(text, new_text)}
        assert "anchors" in kinds and kinds <= {"anchors", "mask", "num", "filters"}
        made = parse_plan(new_text, path=file.name)
        by_stride = sorted(zip(made.strides, (head.mask for head in made.head_specs), strict=True))
        assert [index for _, mask in by_stride for index in mask] == list(range(count))
        checked += 1
    assert checked >= 25


def test_comments_blanks_and_line_ends_stay() -> None:
    for text in (MINI, MINI.replace("\n", "\r\n"), "\ufeff" + MINI, MINI.replace("small", "kl\udce4ine")):
        plan = parse_plan(text.removeprefix("\ufeff"), path="mini.cfg")
        made = with_anchors(text, plan, np.array([[3, 5], [7.5, 9]]))
        end = "\r" if "\r" in text else ""
        assert changed_lines(text, made) == {
            f"filters = 24   # 3 * (5 + 3){end}": f"filters = 16   # 3 * (5 + 3){end}",
            f"mask=0,1,2{end}": f"mask=0,1{end}",
            f"anchors = 4,4,  8,8,  16,16   # for nothing in particular{end}": (
                f"anchors = 3,5, 7.5,9   # for nothing in particular{end}"
            ),
            f"num=3{end}": f"num=2{end}",
        }


def test_a_key_that_was_left_to_its_default_is_added() -> None:
    text = MINI.replace("mask=0,1,2\n", "").replace("num=3\n", "")
    made = with_anchors(text, parse_plan(text, path="mini.cfg"), np.array([[3, 5], [7.5, 9]]))
    head = parse_plan(made, path="new.cfg").head_specs[0]
    assert (head.mask, head.anchors) == ((0, 1), ((3, 5), (7.5, 9)))
    assert "num=2" in made


def test_heads_that_no_convolution_feeds_keep_their_size() -> None:
    text = MINI.replace("\n# small ones", "\n[upsample]\nstride=2\n")
    plan = parse_plan(text, path="mini.cfg")
    assert "anchors = 1,1, 2,2, 3,3" in with_anchors(text, plan, np.array([[1, 1], [2, 2], [3, 3]]))
    with pytest.raises(CfgError, match=r"mini\.cfg:\d+: \[yolo\] can be resized only right after a \[conv"):
        with_anchors(text, plan, np.array([[1, 1], [2, 2]]))


def test_masks_are_dealt_by_stride() -> None:
    assert deal_masks(9, (3, 3, 3), (8, 16, 32)) == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert deal_masks(9, (3, 3, 3), (32, 16, 8)) == [(6, 7, 8), (3, 4, 5), (0, 1, 2)]  # as yolov3 lists them
    assert deal_masks(5, (2, 3), (32, 16)) == [(3, 4), (0, 1, 2)]
    assert deal_masks(7, (2, 3), (32, 16)) == [(4, 5, 6), (0, 1, 2, 3)]
    with pytest.raises(UserError, match="2 anchors are too few for 3 heads"):
        deal_masks(2, (3, 3, 3), (8, 16, 32))


# --- the verdict -----------------------------------------------------------------------------------------------


def test_what_is_clearly_better() -> None:
    before = ShapeFit(mean_iou=0.7, recall=(0.9, 1.0))
    for mean, better in {0.715: False, 0.6: False, 0.7201: True, 0.9: True}.items():
        is_better, words = judge(before, ShapeFit(mean_iou=mean, recall=(0.9, 1.0)))
        assert is_better is better
        assert f"{mean - 0.7:+.3f}" in words and ("not clearly" in words) is not better
    assert judge(before, None)[0] is False


def test_the_verdict_is_passed_on_other_images() -> None:
    """Noise of which every image has its own: clusters fit their own half well and the other badly."""
    shapes = np.random.default_rng(0).uniform(5, 300, (24, 2))
    fit = fit_on_unseen(shapes, np.arange(24), 10, None)
    assert fit is not None
    own = page.measure_fit(page.best_iou(shapes, page.cluster_shapes(shapes, 10)), (0.5,))
    assert fit.mean_iou < own.mean_iou - 0.08
    assert fit_on_unseen(shapes, np.arange(24), 13, None) is None  # one half has 12


# --- the page --------------------------------------------------------------------------------------------------


def test_digits_get_better_anchors_in_a_copy(digits: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(digits), "--cfg", "yolov4-pico"])
    output = capsys.readouterr().out
    means = [float(line.split()[-3]) for line in output.splitlines() if re.match("anchors of|new", line)]
    assert means[1] > means[0] + 0.05
    assert means[2] > means[0] + 0.03
    assert re.search(r"stride 8 +\d+ 10,13 16,18 20,28 +\d+ ", output)
    path = here / "yolov4-pico-digits.cfg"
    plan, made = load_plan("yolov4-pico"), load_plan(str(path))
    assert set(changed_lines(plan.source_text, path.read_text())) == {
        "anchors=10,13, 16,18, 20,28, 30,32, 36,48, 54,58"
    }
    counts = [int(count) for count in re.findall(r"stride \d+ +\d+ [\d., ]+? {2,}(\d+) ", output)]
    shapes, _ = input_shapes(open_image_set(digits, "train"), (160, 160), True)
    assert sum(counts) == len(shapes)
    assert made.head_specs[0].anchors < made.head_specs[1].anchors[3:]
    # Once more, from the result: nothing to gain, nothing written.
    main(["--data", str(digits), "--cfg", str(path)])
    assert "not clearly better" in capsys.readouterr().out
    assert sorted(here.iterdir()) == [path]


def test_nothing_is_written_over(digits: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", str(digits), "--cfg", "yolov4-tiny", "--image-size", "128", "--force"]
    for number in ("", "-2", "-3"):
        main(argv)
        output = capsys.readouterr().out
        assert f"yolov4-tiny-digits{number}.cfg" in output and "--image-size 128x128" in output
    mine = here / "mine.cfg"
    mine.write_text("precious")
    with pytest.raises(UserError, match=r"mine\.cfg: already exists"):
        main([*argv, "--out", str(mine)])
    assert mine.read_text() == "precious"
    with pytest.raises(UserError, match=r"no-such-folder.*: cannot be written"):
        main([*argv, "--out", str(here / "no-such-folder" / "a.cfg")])
    main([*argv, "--out", "other.cfg", "--clusters", "8", "--no-letterbox"])
    assert [len(head.mask) for head in load_plan("other.cfg").head_specs] == [4, 4]


def test_bytes_that_are_no_text_stay(digits: Path, here: Path) -> None:
    raw = MINI.replace("small", "kleine f\xfcr").replace("\n", "\r\n").encode("latin-1")
    (here / "mini.cfg").write_bytes(raw)
    main(["--data", str(digits), "--cfg", "mini.cfg", "--force", "--out", "new.cfg"])
    made = (here / "new.cfg").read_bytes()
    pairs = list(zip(raw.split(b"\n"), made.split(b"\n"), strict=True))
    assert [old for old, new in pairs if old != new] == [b"anchors = 4,4,  8,8,  16,16   # for nothing in particular\r"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clusters", "5000"], "5000 anchors need boxes of at least as many different shapes"),
        (["--clusters", "1"], "1 anchors are too few for 2 heads"),
        (["--clusters", "0"], "0 must be at least 1"),
        (["--clusters", "-3"], "-3 must be at least 1"),
        (["--clusters", "many"], "invalid"),
        (["--image-size", "big"], "'big' is not a size"),
        (["--image-size", "4"], "yolov4-pico.cfg:"),
        (["--cfg", "no-heads.cfg"], "no-heads.cfg:1: has no [yolo] layer"),
        (["--cfg", "no-such"], "no such cfg among"),
        (["--cfg", "broken.cfg"], "broken.cfg:2: "),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--split", "holidays"], "no split 'holidays'"),
        (["--data", "same"], "there are 1 (3 boxes)"),
        (["--data", "empty"], "no image of 'train' has an object"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    argv: list[str],
    message: str,
    digits: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "no-heads.cfg").write_text("[net]\nwidth=32\nheight=32\n[convolutional]\nfilters=2\n")
    (here / "broken.cfg").write_text("[net]\nwidth=wide\nheight=32\n")
    box = (8, 6, 40, 30)
    same = [type(SCENES[0])(stem=stem, objects=[("cat", box)]) for stem in "abc"]
    write_coco(here / "same", "train", same)
    write_coco(here / "empty", "train", [SCENES[1]])
    given = argv if "--data" in argv else ["--data", str(digits), *argv]
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(sys, "argv", ["data.anchors", *given])
        run_page(main, CfgError)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "Traceback" not in error
    assert sorted(here.rglob("*")) == before


def test_the_command_line(
    digits: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data.anchors", "--data", str(digits), "--clusters", "9999"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(page.__file__), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: 9999 anchors need boxes")


def test_bccd(shared: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Round cells are covered well by other anchors than COCO's."""
    main(["--data", str(shared / "data" / "bccd"), "--cfg", "yolov4-tiny"])
    output = capsys.readouterr().out
    assert "205 images, 2804 boxes, stretched to 416x416" in output
    means = [float(line.split()[-3]) for line in output.splitlines() if re.match("anchors of|new", line)]
    assert means == pytest.approx([0.749, 0.865, 0.862], abs=0.004)
    assert [head.mask for head in load_plan("yolov4-tiny-bccd.cfg").head_specs] == [(3, 4, 5), (0, 1, 2)]
