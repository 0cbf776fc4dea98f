"""The pages on sets as tools export them, and what they say of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import detect
import evaluate
import train
from data.annotation_formats import open_image_set
from engine.data_sets import open_sets
from tests.data.packagings import ONE_JSON, PACKAGINGS, UNDIVIDED, instances, rewritten, text
from tests.data.sets import Scene, write_coco
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint
from utils.errors import UserError

PLAIN = ("--workers", "0", "--device", "cpu")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the time of a small evaluation."""
    for name in ("evaluation.evaluator.plot_pr_curves", "evaluation.evaluator.plot_confusion", "train.plot_results"):
        monkeypatch.setattr(name, lambda *_: None)


def trained(data: Path, cfg: str, folder: Path, *flags: str) -> Path:
    """Two steps. Returns the weights."""
    steps = ("--max-steps", "2", "--batch-size", "2", "--subdivisions", "1", "--evals", "1", "--cache", "off")
    train.main(["--data", str(data), "--cfg", cfg, "--out", str(folder), *steps, *PLAIN, *flags])
    return folder / "best.pt"


def evaluated(weights: Path, data: Path, folder: Path, *flags: str) -> float:
    evaluate.main(["--weights", str(weights), "--data", str(data), "--out", str(folder), *PLAIN, *flags])
    return float(json.loads((folder / "metrics.json").read_text())["AP50"])


def test_a_heap_is_trained_on_and_evaluated_by_what_was_held_out(
    tmp_path: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = UNDIVIDED["LabelImg's xml"](tmp_path / "set")
    weights = trained(data, toy_cfg, tmp_path / "run", "--val-fraction", "0.4")
    said = capsys.readouterr().out
    assert "train: 3 images" in said and "val: 2 images" in said and "2 images held out for validation" in said
    AP50 = evaluated(weights, data, tmp_path / "eval", "--val-fraction", "0.4")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["AP50"] == AP50
    with pytest.raises(UserError, match=r"nothing divides its images"):
        evaluated(weights, data, tmp_path / "not")


def test_two_json_files(tmp_path: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = ONE_JSON["FiftyOne"](tmp_path / "a") / "labels.json"
    second = ONE_JSON["Label Studio"](tmp_path / "b") / "result.json"
    trained(first, toy_cfg, tmp_path / "run", "--val-data", str(second), "--val-split", "all")
    said = capsys.readouterr().out
    assert "a train: 5 images" in said and "b all: 5 images" in said and "held out" not in said


def test_some_classes_by_name(tmp_path: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = PACKAGINGS["yaml of Roboflow"](tmp_path / "set")
    weights = trained(data, toy_cfg, tmp_path / "run", "--classes", "owl,cat")
    assert Checkpoint.from_file(weights).class_names == ("cat", "owl")
    assert "## Use" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(UserError, match=r"data\.yaml|valid.images: the data set has classes .*not trained on: dog"):
        evaluated(weights, data, tmp_path / "not")
    evaluated(weights, data, tmp_path / "eval", "--classes", "cat")
    assert "evaluated on" in (tmp_path / "eval" / "report.html").read_text()
    truth = json.loads((tmp_path / "eval" / "ground_truth.json").read_text())
    assert [row["name"] for row in truth["categories"]] == ["cat"]
    assert {row["category_id"] for row in json.loads((tmp_path / "eval" / "detections.json").read_text())} <= {0}
    with pytest.raises(UserError, match=r"has no class 'bat'; it has cat, dog, owl"):
        evaluated(weights, data, tmp_path / "not", "--classes", "bat")
    (data / "valid" / "images" / "notes.txt").touch()
    (data / "valid" / "images" / "a.heic").touch()
    capsys.readouterr()
    found = ("--weights", str(weights), "--device", "cpu", "--confidence", "0", "--save-json")
    detect.main([*found, "--classes", "owl", "--out", str(tmp_path / "found"), str(data / "valid" / "images")])
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert {each["class"] for row in rows for each in row["objects"]} == {"owl"}
    assert "skipped files, neither images nor videos by their endings: 1 .heic, 1 .txt" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--classes: the network knows no 'dog', but cat, owl"):
        detect.main([*found, "--classes", "dog", str(data / "valid" / "images")])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 image can be read"):
        detect.main([*found, "--out", str(tmp_path / "none"), str(tmp_path / "broken.png")])


def test_a_set_of_roboflow_has_the_name_of_its_folder(tmp_path: Path) -> None:
    data = PACKAGINGS["COCO of Roboflow"](tmp_path / "pets")
    assert {open_image_set(data, split).name for split in ("train", "val")} == {data.name}


def test_a_class_that_only_training_images_have_can_be_chosen(tmp_path: Path, toy_cfg: str) -> None:
    first = ONE_JSON["FiftyOne"](tmp_path / "a") / "labels.json"
    second = ONE_JSON["FiftyOne"](tmp_path / "b") / "labels.json"
    content = json.loads(second.read_text())
    gone = {each["id"] for each in content["categories"] if each["name"] == "owl"}
    for key, of in (("categories", "id"), ("annotations", "category_id")):
        content[key] = [each for each in content[key] if each[of] not in gone]
    second.write_text(json.dumps(content))
    train_set, val_set = open_sets({"data": str(first), "val_data": str(second), "classes": ("owl", "cat")})
    assert set(train_set.class_names) == {"owl", "cat"} and val_set.class_names == ("cat",)


def test_a_grey_network_trains_and_detects(tmp_path: Path) -> None:
    (tmp_path / "grey.cfg").write_text(TOY_CFG.replace("[net]", "[net]\nchannels=1"))
    data = PACKAGINGS["VOC of Roboflow"](tmp_path / "set")
    weights = trained(data, str(tmp_path / "grey.cfg"), tmp_path / "run")
    assert Checkpoint.from_file(weights).weights["layers.0.conv.weight"].shape[1] == 1
    evaluated(weights, data, tmp_path / "eval")
    detect.main(
        ["--weights", str(weights), "--device", "cpu", "--out", str(tmp_path / "found"), str(data / "valid" / "v1.png")]
    )
    assert (tmp_path / "found" / "v1.png").exists()


def test_a_split_without_objects_ends_training_and_evaluation(tmp_path: Path, toy_cfg: str) -> None:
    good = PACKAGINGS["darknet"](tmp_path / "good")
    weights = trained(good, toy_cfg, tmp_path / "run")
    bad = rewritten(PACKAGINGS["darknet"], "obj_val/*.txt", lambda content: content.replace(b" ", b";"))(
        tmp_path / "bad"
    )
    sentence = rf"{bad}: none of the 2 images of 'val' has an object; 3 malformed labels dropped"
    with pytest.raises(UserError, match=sentence):
        evaluated(weights, bad, tmp_path / "eval")
    with pytest.raises(UserError, match=sentence):
        trained(bad, toy_cfg, tmp_path / "not")
    assert not (tmp_path / "eval").exists() and not (tmp_path / "not").exists()


def test_a_class_without_objects_bars_no_evaluation(tmp_path: Path, toy_cfg: str) -> None:
    data = PACKAGINGS["COCO"](tmp_path / "set")
    weights = trained(data, toy_cfg, tmp_path / "run")
    before = evaluated(weights, data, tmp_path / "before")
    content = instances("val")
    content["categories"].append({"id": 9, "name": "bat"})
    text(data / "annotations" / "instances_val2017.json", json.dumps(content))
    assert evaluated(weights, data, tmp_path / "after", "--metric", "darknet") == before


def test_an_evaluation_warns_of_what_a_training_warns_of(
    tmp_path: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PACKAGINGS["darknet"](tmp_path / "set")
    weights = trained(data, toy_cfg, tmp_path / "run")
    labels = data / "obj_val" / "v1.txt"
    labels.write_text(labels.read_text() + "1 0.3 0.3 0.40001 0.4\n1 0.3 0.3 0.40002 0.4\n")
    (data / "val.txt").write_text("obj_val/v1.png\nobj_val/v2.png\nobj_val/v2.png\n")
    capsys.readouterr()
    evaluated(weights, data, tmp_path / "eval")
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(" (first")[0] for line in warned] == [
        "warning: val: 2 boxes drawn twice",
        "warning: val: 1 image that repeats an earlier one, byte for byte",
    ]


def test_more_than_100_objects_of_an_image_are_said_and_measured(
    tmp_path: Path, toy_cfg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [(float(x), float(y)) for x in range(0, 120, 8) for y in range(0, 80, 8)]
    scene = Scene(stem="a", objects=[("cat", (x, y, x + 6, y + 6)) for x, y in grid], hw=(80, 120))
    few = Scene(stem="b", objects=[("cat", (1, 1, 30, 30))])
    for split in ("train", "val"):
        write_coco(tmp_path / "set", split, [scene, few])
    ceiling = np.mean(np.linspace(0, 1, 101) <= 101 / 151)  # of 150 + 1 objects 100 + 1 are counted
    sentence = "val: 1 image with more than 100 objects: COCO's AP counts the 100 best detections of each, so AP on "
    sentence += f"them all is at most {ceiling:.3f}"
    weights = trained(tmp_path / "set", toy_cfg, tmp_path / "run")
    assert sentence in capsys.readouterr().out
    evaluated(weights, tmp_path / "set", tmp_path / "eval", "--max-detections", "150", "--confidence", "0")
    said = capsys.readouterr().out
    assert sentence in said
    assert said.count("maxDets=100") == said.count("maxDets=150") == 10
    assert "with 150 detections per image in place of COCO's 100:" in said
    assert (tmp_path / "eval" / "metrics.txt").read_text().count("maxDets=150") == 10
    assert open_image_set(tmp_path / "set", "val").problems.summary() == []
