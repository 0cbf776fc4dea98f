"""Exported files: what they return, and what happens with those of strangers."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.detector import Detector
from models.export.formats import write_file
from models.export.load import OPENERS, load_exported
from models.export.metadata import KEY, Metadata
from models.norms.fold import fold
from models.predictor import EXPORTED
from models.yolo.nms import NmsRule, classwise_nms
from models.yolo.postprocess import DetectionOptions
from tests.models.export.networks import metadata_of, pico, trained_network
from tests.models.export.test_graph import differences, expected_of
from utils.errors import UserError
from utils.letterbox import as_input

onnx = pytest.importorskip("onnx", reason="extra: export")
pytest.importorskip("onnxruntime", reason="extra: export")
pytest.importorskip("openvino", reason="extra: export")
LIBRARY = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript"}
PLAN = pico()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trained_network(PLAN)


@pytest.fixture(scope="module")
def written(network, tmp_path_factory) -> dict[str, Path]:
    """One file of each library, decoded, of one image of one size."""
    folder = tmp_path_factory.mktemp("written")
    folded = fold(network)
    return {kind: write_file(kind, folded, metadata_of(PLAN), folder / "pico")[0] for kind in LIBRARY}


@pytest.fixture
def copied(written, tmp_path) -> dict[str, Path]:
    """To be damaged."""
    shutil.copytree(written["onnx"].parent, tmp_path / "copied")
    return {kind: tmp_path / "copied" / path.name for kind, path in written.items()}


def test_each_ending_of_an_exported_file_has_a_library():
    assert set(EXPORTED) <= OPENERS.keys() and set(LIBRARY.values()) == set(EXPORTED)


# --- what they return ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIBRARY)
def test_candidates_are_torchs_with_a_last_part_that_is_smaller_than_the_files_batch(kind, written, network):
    images = torch.rand(3, 3, 64, 64)
    found = load_exported(written[kind]).candidates(images, confidence=-1.0)
    assert max(differences(found, expected_of(network, images), PLAN)) < 1e-4


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize(("outputs", "batch"), [("heads", 2), ("decoded", None)])
def test_candidates_of_other_outputs_are_the_same(kind, outputs, batch, network, tmp_path):
    metadata = metadata_of(PLAN, outputs=outputs, batch=batch)
    predictor = load_exported(write_file(kind, fold(network), metadata, tmp_path / "pico")[0])
    assert predictor.metadata == metadata
    images = torch.rand(3, 3, 64, 64)
    assert max(differences(predictor.candidates(images, confidence=-1.0), expected_of(network, images), PLAN)) < 1e-4
    if batch is None:
        with pytest.raises(UserError, match="70x64 pixels are not multiples of the network's 32"):
            predictor.candidates(torch.rand(1, 3, 70, 64), confidence=0.5)
        larger = PLAN.with_input_hw((96, 128))
        images = torch.rand(1, 3, 96, 128)
        found = predictor.candidates(images, confidence=-1.0)
        assert max(differences(found, expected_of(network, images), larger)) < 1e-4


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("batch", [2, None])
def test_suppression_in_the_graph_keeps_what_torchs_keeps(kind, batch, network, tmp_path):
    metadata = metadata_of(PLAN, outputs="nms", batch=batch)
    predictor = load_exported(write_file(kind, fold(network), metadata, tmp_path / "pico")[0])
    images, rule = torch.rand(3, 3, 64, 64), NmsRule(kind="default", iou=0.6)
    for found, all_of_them in zip(
        predictor.candidates(images, confidence=0.05), expected_of(network, images), strict=True
    ):
        likely = all_of_them.where(all_of_them.scores > 0.05)
        kept = likely.where(classwise_nms(likely.boxes, likely.scores, likely.labels, rule))
        assert 0 < len(kept) < len(likely)
        assert len(found) == len(kept)  # in whatever order: scores that are nearly equal may change places
        ours, theirs = (torch.column_stack((each.boxes, each.scores, each.labels)) for each in (found, kept))
        distance = torch.cdist(ours.double(), theirs, p=float("inf"))
        distance /= theirs[:, :4].abs().amax(1).clamp(min=64)  # float32's rounding is relative: some are 5000 px high
        assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-4
        again = found.where(classwise_nms(found.boxes, found.scores, found.labels, rule))
        assert len(again) == len(found)  # the same rule leaves them as they are


@pytest.mark.parametrize("kind", LIBRARY)
def test_float16_stays_near(kind, network, tmp_path):
    metadata = metadata_of(PLAN, precision="float16")
    path = write_file(kind, fold(network), metadata, tmp_path / "pico")[0]
    images = torch.rand(1, 3, 64, 64)
    found = load_exported(path).candidates(images, confidence=-1.0)
    assert 0 < max(differences(found, expected_of(network, images), PLAN)) < 0.05


def test_int8_is_smaller_and_stays_near(network, written, tmp_path):
    images = torch.rand(4, 3, 64, 64)
    metadata = metadata_of(PLAN, precision="int8")
    path = write_file("onnx", fold(network), metadata, tmp_path / "pico", list(images.split(1)))[0]
    assert path.stat().st_size < written["onnx"].stat().st_size / 2
    found = load_exported(path).candidates(images, confidence=-1.0)
    assert 1e-4 < max(differences(found, expected_of(network, images), PLAN)) < 0.3


def test_a_detector_loads_an_exported_file(written, network):
    detector = Detector.load(written["onnx"])
    assert detector.class_names == ("class 0", "class 1", "class 2") and detector.input_hw == (64, 64)
    (found,) = detector.detect([np.full((50, 40, 3), 99, np.uint8)])
    assert found.boxes.shape[1] == 4


def test_an_image_is_laid_into_the_input_as_the_files_network_was_trained(network, tmp_path):
    """A file of a letterboxed network that was exported with darknet's resize, by itself and from a command line."""
    metadata = metadata_of(PLAN, letterbox=True, resize="darknet")
    path = write_file("torchscript", fold(network), metadata, tmp_path / "pico")[0]
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    expected, placement = as_input(image, (64, 64), letterbox=True, how="darknet")
    for options in (None, DetectionOptions()):
        laid, where = Detector.load(path, options=options).lay(image)
        assert np.array_equal(laid, expected) and where == placement
    opencv = write_file("torchscript", fold(network), metadata_of(PLAN), tmp_path / "other")[0]
    assert Detector.load(opencv).options.resize == "opencv"
    assert Detector.load(opencv, options=DetectionOptions(resize="darknet")).options.resize == "darknet"


@pytest.mark.parametrize("ending", ["json", "param", "bin"])
def test_files_of_ncnn_are_said_to_be_for_other_programs(ending, tmp_path):
    path = tmp_path / f"best.ncnn.{ending}"
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match="for other programs: give the checkpoint"):
        Detector.load(path)


@pytest.mark.parametrize("kind", LIBRARY)
def test_another_size_than_the_files_is_refused(kind, written):
    with pytest.raises(UserError, match="takes 64x64 pixels only; export with --dynamic"):
        load_exported(written[kind], input_hw=(96, 96))
    with pytest.raises(UserError, match="takes 64x64 pixels only"):
        load_exported(written[kind]).candidates(torch.rand(1, 3, 96, 64), confidence=0.5)


# --- damaged and foreign ---------------------------------------------------------------------------------------


def check_refused(path: Path, why: str) -> None:
    """One sentence that names the file."""
    with pytest.raises(UserError, match=why) as caught:
        load_exported(path).candidates(torch.rand(1, 3, 64, 64), confidence=0.5)
    assert str(path.with_suffix("")) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LIBRARY)
def test_a_missing_file_is_refused(kind, tmp_path):
    check_refused(tmp_path / f"x{LIBRARY[kind]}", "no such file")


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 500, b"<net></net>", b"PK\x03\x04" + b"\x00" * 100])
def test_a_file_of_something_else_is_refused(kind, content, tmp_path):
    path = tmp_path / f"x{LIBRARY[kind]}"
    path.write_bytes(content)
    check_refused(path, "is no|export.py")


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_refused(kind, share, copied):
    path = copied[kind]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    check_refused(path, "damaged|is no")


def test_weights_of_openvino_that_are_missing_or_cut_short_are_refused(copied):
    binary = copied["openvino"].with_suffix(".bin")
    content = binary.read_bytes()
    binary.write_bytes(content[: len(content) // 2])
    check_refused(copied["openvino"], "OpenVINO cannot open it, damaged")
    binary.unlink()
    check_refused(copied["openvino"], "needs it beside it")


def test_a_changed_byte_of_torchscript_is_refused(copied):
    content = bytearray(copied["torchscript"].read_bytes())
    content[len(content) // 2] ^= 0xFF
    copied["torchscript"].write_bytes(content)
    check_refused(copied["torchscript"], "checksum")


# --- lying -----------------------------------------------------------------------------------------------------


def with_metadata(path: Path, text: str | None) -> None:
    model = onnx.load_model(str(path))
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {KEY: text})
    path.write_bytes(model.SerializeToString())


LIES = {
    "no object": "[1]",
    "no json": "{",
    "deep": "[" * 100_000,
    "long": " " * 20_000_000,
}


@pytest.mark.parametrize("text", LIES.values(), ids=LIES.keys())
def test_metadata_that_are_none_are_refused(text, copied):
    with_metadata(copied["onnx"], text)
    check_refused(copied["onnx"], "its metadata 'yolov4_norms' cannot be used")


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"format": "1"},
        {"class_names": []},
        {"class_names": 3},
        {"class_names": [1, 2, 3]},
        {"input_hw": [64]},
        {"input_hw": [-64, 64]},
        {"input_hw": ["64", 64]},
        {"batch": 0},
        {"batch": True},
        {"outputs": "boxes"},
        {"outputs": "nms"},
        {"precision": "int3"},
        {"resize": "bicubic"},
        {"letterbox": "no"},
        {"suppression": {"iou": 0.5}},
        {"thresholds": {"confidence": 2, "precision": 1, "recall": 1, "f1": 1, "classes": {}}},
        {"outputs": "nms", "suppression": {"iou": "0.5", "confidence": 0.1, "max_per_class": 9}},
        {"outputs": "nms", "suppression": {"iou": 0.5, "confidence": None, "max_per_class": 9}},
        {"outputs": "nms", "suppression": {"iou": 0.5, "confidence": 0.1, "max_per_class": 0}},
        {"outputs": "nms", "suppression": {"iou": float("nan"), "confidence": 0.1, "max_per_class": 9}},
        {"batch": 10**9},
        {"batch": 10**30},
    ],
    ids=str,
)
def test_metadata_with_a_value_that_cannot_be_are_refused(changed, copied):
    with_metadata(copied["onnx"], json.dumps({**json.loads(metadata_of(PLAN).to_json()), **changed}))
    check_refused(copied["onnx"], "its metadata 'yolov4_norms' cannot be used")


@pytest.mark.parametrize("name", [name for name in Metadata.__dataclass_fields__ if name != "thresholds"])
def test_metadata_without_a_value_are_refused(name, copied):
    content = json.loads(metadata_of(PLAN).to_json())
    del content[name]
    with_metadata(copied["onnx"], json.dumps(content))
    check_refused(copied["onnx"], f"'{name}' is missing")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"class_names": ("a", "b")}, "are not those of its metadata"),
        ({"outputs": "heads"}, "are not those of its metadata"),
        ({"input_hw": (96, 96)}, "takes 96x96 pixels only"),
        ({"batch": 2}, "cannot be run"),
        ({"cfg_text": "[net]\nwidth=64\nheight=64\n[route]\nlayers=7\n"}, "has a cfg that cannot be read"),
        ({"cfg_text": "[net]\nwidth=64\nheight=64\n[convolutional]\nfilters=3\n"}, "has a cfg without"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_metadata_that_lie_about_the_graph_are_refused(changed, why, copied):
    with_metadata(copied["onnx"], replace(metadata_of(PLAN), **changed).to_json())
    check_refused(copied["onnx"], why)


@pytest.mark.parametrize("label", [-1.0, 3.0, float("nan")])
def test_labels_that_no_class_has_are_refused(label, written, monkeypatch):
    predictor = load_exported(written["onnx"])
    predictor.metadata = metadata_of(PLAN, outputs="nms")
    monkeypatch.setattr(predictor, "_run", lambda _: [np.array([[0, 1, 1, 9, 9, 0.9, label]], np.float32)])
    with pytest.raises(UserError, match="are not those of its metadata"):
        predictor.candidates(torch.rand(1, 3, 64, 64), confidence=0.5)


@pytest.mark.parametrize("kind", LIBRARY)
def test_a_file_that_others_wrote_is_refused(kind, copied):
    path = copied[kind]
    match kind:
        case "onnx":
            with_metadata(path, None)
        case "openvino":
            path.write_text(path.read_text().replace(KEY, "model_info"))
        case _:
            torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)).save(str(path))
    check_refused(path, "is not a file that export.py wrote")


# --- malicious -------------------------------------------------------------------------------------------------


def with_node(path: Path, *nodes, domain: str = "") -> None:
    """Put nodes before the others."""
    model = onnx.load_model(str(path))
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    path.write_bytes(model.SerializeToString())


def test_onnx_weights_in_another_file_are_refused(copied):
    model = onnx.load_model(str(copied["onnx"]))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../../etc/passwd", "offset": "0", "length": "100"}.items():
        tensor.external_data.add(key=key, value=value)
    copied["onnx"].write_bytes(model.SerializeToString())
    check_refused(copied["onnx"], "refers to data in another file")


def test_onnx_operators_of_others_are_refused(copied):
    with_node(copied["onnx"], onnx.helper.make_node("Run", ["images"], ["x"], domain="com.evil"), domain="com.evil")
    check_refused(copied["onnx"], "operator 'Run' of 'com.evil'")


def test_onnx_graphs_in_graphs_are_refused(copied):
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["y"])], "body", [], [value])
    with_node(copied["onnx"], onnx.helper.make_node("If", ["images"], ["x"], then_branch=body, else_branch=body))
    check_refused(copied["onnx"], "operator 'If', which runs a graph of its own")


def test_onnx_tensors_that_take_all_memory_are_refused(copied):
    shape = onnx.numpy_helper.from_array(np.array([2**20, 2**20], np.int64))
    constant = onnx.helper.make_node("Constant", [], ["shape"], value=shape)
    with_node(copied["onnx"], constant, onnx.helper.make_node("ConstantOfShape", ["shape"], ["x"]))
    check_refused(copied["onnx"], "is a tensor of 1048576 x 1048576")


def test_onnx_weights_of_another_shape_are_refused(copied):
    model = onnx.load_model(str(copied["onnx"]))
    model.graph.initializer[0].dims[0] = 2**40
    copied["onnx"].write_bytes(model.SerializeToString())
    check_refused(copied["onnx"], "shapes do not fit|cannot open it")


def test_openvino_layers_of_extensions_are_refused(copied):
    text = copied["openvino"].read_text()
    copied["openvino"].write_text(text.replace('type="Convolution" version="opset1"', 'type="Run" version="evil"', 1))
    check_refused(copied["openvino"], "layer 'Run' of 'evil'")


def test_openvino_xml_with_entities_is_refused(copied):
    text = copied["openvino"].read_text()
    head, _, rest = text.partition("?>")
    entities = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>'
    copied["openvino"].write_text(f"{head}?>{entities}{rest}")
    check_refused(copied["openvino"], "is no xml of OpenVINO")


def rewritten(path: Path, change) -> None:
    """Apply change(name, content) to every entry of a zip archive; code is compressed, as torch does it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            kind = zipfile.ZIP_DEFLATED if "/code/" in name else zipfile.ZIP_STORED
            archive.writestr(name, change(name, content), compress_type=kind)


@pytest.mark.parametrize(
    "line",
    [
        b'    torch.save(images, "/tmp/owned")\n',
        b'    x = torch.from_file("/etc/passwd")\n',
        b"    ops.evil.run(images)\n",
        b"    while True:\n      pass\n",
        b"  def __setstate__(self, state: int) -> None:\n    pass\n",
    ],
    ids=["save", "from_file", "operator", "loop", "setstate"],
)
def test_torchscript_code_that_reaches_beyond_tensors_is_refused(line, copied):
    rewritten(copied["torchscript"], lambda name, content: content + line if name.endswith(".py") else content)
    check_refused(copied["torchscript"], "its code has '.*', which export.py does not write")


def test_torchscript_that_unfolds_to_more_than_code_can_be_is_refused(copied):
    with zipfile.ZipFile(copied["torchscript"], "a") as archive:
        archive.writestr("archive/data/0", bytes(20 * 2**20), compress_type=zipfile.ZIP_DEFLATED)
    assert copied["torchscript"].stat().st_size < 8 * 2**20
    check_refused(copied["torchscript"], "its code would unfold to")
