"""What detect.py and evaluate.py take: darknet's weights with a cfg, or a checkpoint without; and whose names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cfg.plan import load_plan
from models.detector import Detector
from models.weights.trained import COCO_NAMES, class_names, is_darknet, read_trained
from models.weights.writer import write_weights
from models.yolo.postprocess import DetectionOptions
from tests.models.weights.nets import SMALL, heads_of, network_of, plan_of, written
from tests.reference import darknet_weights as oracle
from tests.toy_checkpoint import toy_checkpoint
from utils.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "small.cfg").write_text(SMALL)
    (tmp_path / "two.names").write_text("\ufeffred cell\n\nwhite cell\r\n", encoding="utf-8")
    (tmp_path / "small.weights").write_bytes(oracle.random_file(SMALL, seen=96))
    toy_checkpoint().to_file(tmp_path / "x.pt")
    return {path.name: str(path) for path in tmp_path.iterdir()}


def test_a_detector_of_darknets_files(tmp_path, files):
    network = network_of(plan_of())
    write_weights(tmp_path / "n.weights", network, seen=5)
    content, said = read_trained(str(tmp_path / "n.weights"), cfg=files["small.cfg"], names=files["two.names"])
    assert said == (
        f"weights   {tmp_path / 'n.weights'}: loaded 5 of 5 convolutions and 2 of 2 weighted shortcuts, 0 bytes left",
        f"names     from {files['two.names']}",
    )
    made = partial(Detector.from_checkpoint, content, DetectionOptions(), path="n.weights", device=torch.device("cpu"))
    detector = made()
    assert torch.equal(heads_of(detector.network), heads_of(network))
    assert detector.class_names == ("red cell", "white cell")
    assert detector.letterbox is True and detector.input_hw == (16, 16)
    assert made(input_hw=(32, 16)).input_hw == (32, 16)


def test_names_beside_the_weights_are_read(tmp_path, files):
    (tmp_path / "small.names").write_text("leaf\nstem\n")
    content, said = read_trained(files["small.weights"], cfg=files["small.cfg"], names=None)
    assert content.class_names == ("leaf", "stem") and said[1] == f"names     from {tmp_path / 'small.names'}"
    assert (
        read_trained(files["small.weights"], cfg=files["small.cfg"], names=files["two.names"])[0].class_names[0]
        == "red cell"
    )


def test_a_key_that_nobody_knows_is_told(tmp_path, files):
    (tmp_path / "odd.cfg").write_text(SMALL.replace("groups=2", "groups=2\nactivaton=mish"))
    said = read_trained(files["small.weights"], cfg=str(tmp_path / "odd.cfg"), names=None)[1]
    assert len(said) == 3 and said[2].startswith("warning: ") and "did you mean 'activation'?" in said[2]


def test_names_without_a_file(files):
    names, origin = class_names(load_plan("yolov4-tiny"))
    assert len(names) == 80 and (names[0], names[3], names[-1]) == ("person", "motorcycle", "toothbrush")
    assert len(set(names)) == 80 and origin.startswith("COCO's, because there are 80 classes")
    names, origin = class_names(plan_of())
    assert names == ("class 0", "class 1") and origin.startswith("class 0, class 1 ...; --names FILE")
    assert len(class_names(load_plan("yolov4-tiny", classes=81))[0]) == 81


def test_names_of_another_count_are_refused(files):
    with pytest.raises(UserError, match=r"coco\.names: has 80 names, .*small\.cfg has 2 classes$"):
        read_trained(files["small.weights"], cfg=files["small.cfg"], names=str(COCO_NAMES))
    with pytest.raises(UserError, match=r"no\.names: no such file"):
        read_trained(files["small.weights"], cfg=files["small.cfg"], names="no.names")


def test_cfg_and_checkpoint_do_not_go_together(files):
    for flags in ({"cfg": files["small.cfg"], "names": None}, {"cfg": None, "names": files["two.names"]}):
        with pytest.raises(UserError, match=r"x\.pt: a checkpoint knows its network and its classes: leave --cfg"):
            read_trained(files["x.pt"], **flags)
    assert read_trained(files["x.pt"], cfg=None, names=None)[0].cfg_name == "toy"
    with pytest.raises(UserError, match=r"small\.weights: darknet's weights do not describe their network"):
        read_trained(files["small.weights"], cfg=None, names=None)


def test_part_of_a_network_detects_nothing(tmp_path, files):
    part = written(tmp_path / "part", oracle.random_file(SMALL)[: 20 + 4 * (16 + 108)])
    with pytest.raises(
        UserError, match=r"part: is not the whole network, only train\.py can use it: loaded 1 of 5 conv"
    ):
        read_trained(str(part), cfg=files["small.cfg"], names=None)


@pytest.mark.parametrize("text", [SMALL.replace("width=16", "width=16\nchannels=4"), SMALL.partition("[yolo]")[0]])
def test_no_detector_of_images(tmp_path, text):
    (tmp_path / "odd.cfg").write_text(text)
    weights = written(tmp_path / "odd.weights", oracle.random_file(text))
    with pytest.raises(
        UserError, match=r"odd\.cfg: is no detector of images, which has \[yolo\] layers, and channels=3 or 1"
    ):
        read_trained(str(weights), cfg=str(tmp_path / "odd.cfg"), names=None)


def test_told_apart_by_content(tmp_path, files):
    assert is_darknet(Path(files["small.weights"])) and not is_darknet(Path(files["x.pt"]))
    Path(files["x.pt"]).rename(tmp_path / "y.weights")
    assert not is_darknet(tmp_path / "y.weights")
    for path, sentence in (
        (tmp_path / "gone", r"gone: no such checkpoint or \.weights file$"),
        (tmp_path, r"no such checkpoint"),
        (Path(files["small.cfg"]), r"small\.cfg: neither a checkpoint of this project nor a darknet \.weights file"),
    ):
        with pytest.raises(UserError, match=sentence):
            is_darknet(path)
