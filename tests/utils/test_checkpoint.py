"""Checkpoints: what is written is read back, damage is found, and no code in a file is run."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import FORMAT, Checkpoint, ResumeState
from utils.errors import UserError

TENSORS = {
    "wide": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "half": torch.randn(2).bfloat16(),
    "count": torch.tensor(7),
}
SETTINGS = {"rate": 0.1, "none": None, "flag": True}
RESUMABLE = ResumeState(state={"step": 3, "ranks": [{}]}, log={"count": 1}, subdivisions=2)


def fields_of(checkpoint: Checkpoint, *left_out: str) -> dict[str, object]:
    return {each.name: getattr(checkpoint, each.name) for each in fields(checkpoint) if each.name not in left_out}


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("training", [None, RESUMABLE])
def test_what_is_written_is_read(tmp_path: Path, training: ResumeState | None):
    written = toy_checkpoint(weights=TENSORS, settings=SETTINGS, step=3, seen=2**40, training=training)
    written.to_file(tmp_path / "x.pt")
    read = Checkpoint.from_file(tmp_path / "x.pt")
    assert_same_tensors(read.weights, TENSORS)
    assert fields_of(read, "weights") == fields_of(written, "weights")
    assert read.is_darknet and read.training == training
    assert os.listdir(tmp_path) == ["x.pt"]


def test_weights_are_read_back_from_safetensors_and_training_is_left_out(tmp_path: Path):
    written = toy_checkpoint(weights=TENSORS, settings=SETTINGS, best_ap=0.25, training=RESUMABLE)
    written.to_safetensors(tmp_path / "x.safetensors")
    read = Checkpoint.from_file(tmp_path / "x.safetensors")
    assert_same_tensors(read.weights, TENSORS)
    assert fields_of(read, "weights") == fields_of(replace(written, training=None), "weights")
    assert not read.is_darknet


def test_files_of_earlier_formats_are_read(tmp_path: Path):
    """Format 3 can be resumed; before it, fields were missing and trainings cannot go on."""
    network = {"cfg_name": "toy", "cfg_text": "[net]", "input_hw": [64, 32], "letterbox": True}
    network |= {"class_names": ["a", "b"], "norm": {"norm": "bn"}, "weights": TENSORS}
    run = {"step": 3, "epochs_done": 1, "settings": SETTINGS, "best_ap": 0.5}
    resumable = {"training": {"step": 3}, "log": {"count": 1}, "subdivisions": 2}
    torch.save({"format": 3, **network, **run, **resumable, "train_pictures": 16, "mini_batch": 4}, tmp_path / "3.pt")
    torch.save({"format": 2, **network, **run, **resumable}, tmp_path / "2.pt")
    torch.save({"format": 1, **network, "odd": 1}, tmp_path / "1.pt")
    three, two, one = (Checkpoint.from_file(tmp_path / f"{number}.pt") for number in (3, 2, 1))
    assert three.training == ResumeState(state={"step": 3}, log={"count": 1}, subdivisions=2)
    assert (three.input_hw, three.class_names, three.train_images, three.mini_batch) == ((64, 32), ("a", "b"), 16, 4)
    assert (two.format, two.training, two.step, two.train_images) == (2, None, 3, None)
    assert (one.step, one.best_ap, one.settings, one.seen) == (0, float("-inf"), {}, None)
    for each in (one, two, three):
        assert_same_tensors(each.weights, TENSORS)


NETWORK_FIELDS = ("cfg_name", "cfg_text", "input_hw", "letterbox", "class_names", "norm", "weights")


@pytest.mark.parametrize("name", NETWORK_FIELDS)
def test_a_checkpoint_without_its_network_is_the_users_error(tmp_path: Path, name: str):
    content = fields_of(toy_checkpoint(), name)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x\.pt: the checkpoint does not describe its network \('{name}' is missing"):
        Checkpoint.from_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("cfg_name", 1), ("cfg_text", None), ("input_hw", 32), ("input_hw", (1, 2, 3)), ("input_hw", ("1", "2"))),
        *(("input_hw", (0, 32)), ("letterbox", "yes"), ("class_names", 5), ("class_names", [1, 2]), ("norm", "bn")),
        *(("weights", [1]), ("weights", {"a": 1}), ("seen", "7"), ("step", "3"), ("step", -1), ("epochs_done", -1)),
        *(("train_images", 1.5), ("best_ap", None), ("mini_batch", "1"), ("settings", 3), ("is_precise", 1)),
        *(("training", 3), ("training", {"state": {}}), ("training", {"state": 1, "log": {}, "subdivisions": 1})),
        ("training", {"state": {}, "log": {}, "subdivisions": 1, "more": 1}),
    ],
)
def test_a_field_of_another_type_is_the_users_error(tmp_path: Path, name: str, value: object):
    torch.save({**fields_of(toy_checkpoint()), name: value}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: the checkpoint does not describe its network \("):
        Checkpoint.from_file(tmp_path / "x.pt")


@pytest.mark.parametrize("missing", ["log", "subdivisions"])
def test_a_training_of_format_three_that_lacks_something_is_the_users_error(tmp_path: Path, missing: str):
    resumable = {"training": {}, "log": {}, "subdivisions": 1}
    del resumable[missing]
    torch.save({**fields_of(toy_checkpoint()), "format": 3, **resumable}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"'{missing}' is missing"):
        Checkpoint.from_file(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"junk" * 9, (5).to_bytes(8, "little") + b"{}   ", b"\xff" * 64])
def test_another_safetensors_file_is_the_users_error(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: not a checkpoint of this project"):
        Checkpoint.from_file(tmp_path / "x.safetensors")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.pt"
    toy_checkpoint(step=1).to_file(path)
    with pytest.raises(Exception, match="pickle"):
        toy_checkpoint(step=2, settings={"value": lambda: 2}).to_file(path)
    assert Checkpoint.from_file(path).step == 1


def test_a_crash_before_the_renaming_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.pt"
    toy_checkpoint(step=1).to_file(path)

    def crash(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        toy_checkpoint(step=2).to_file(path)
    assert Checkpoint.from_file(path).step == 1


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path: Path):
    path = tmp_path / "x.pt"
    toy_checkpoint(step=1).to_file(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            toy_checkpoint(step=2, weights={"a": torch.zeros(100_000)}).to_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Checkpoint.from_file(path).step == 1 and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda descriptor: os.pwrite(descriptor, b"garbage", 3000),
        lambda descriptor: os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2),
    ],
)
def test_what_does_not_read_back_does_not_replace_the_old_file(tmp_path: Path, monkeypatch, corrupt):
    """A disk that reports success and stores something else."""
    path = tmp_path / "x.pt"
    toy_checkpoint(step=1).to_file(path)
    fsync = os.fsync

    def corrupting(descriptor: int) -> None:
        corrupt(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(OSError, match="not read back"):
        toy_checkpoint(step=2, weights={"a": torch.zeros(10_000)}).to_file(path)
    assert Checkpoint.from_file(path).step == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_a_missing_file_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint"):
        Checkpoint.from_file(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        Checkpoint.from_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[net]\nwidth=3\n", b"\x80\x02 half a pickle", b"PK\x03\x04 half a zip"])
def test_another_kind_of_file_is_the_users_error(tmp_path: Path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: not a checkpoint of this project"):
        Checkpoint.from_file(path)


def test_a_truncated_checkpoint_is_the_users_error(tmp_path: Path):
    path = tmp_path / "x.pt"
    toy_checkpoint(weights={"a": torch.randn(1000)}).to_file(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a checkpoint of this project, or damaged"):
        Checkpoint.from_file(path)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_single_flipped_bit_is_found(tmp_path: Path, kind: str):
    """Wherever it is, the file is refused, or reads as what was written."""
    path, weights = tmp_path / f"x.{kind}", {"a": torch.randn(100), "b": torch.randn(2, 3).bfloat16()}
    write = toy_checkpoint(weights=weights).to_file if kind == "pt" else toy_checkpoint(weights=weights).to_safetensors
    write(path)
    written, refused = path.read_bytes(), 0
    for place in range(0, len(written), 7):
        flipped = bytearray(written)
        flipped[place] ^= 0x40
        path.write_bytes(flipped)
        try:
            read = Checkpoint.from_file(path)
        except UserError:
            refused += 1
        else:
            assert_same_tensors(read.weights, weights)
            assert fields_of(read, "weights") == fields_of(toy_checkpoint(), "weights")
    assert refused > len(written) / 7 / 4


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_damaged_tensor_is_told(tmp_path: Path, kind: str):
    path, weights = tmp_path / f"x.{kind}", {"a": torch.full((100,), 1.5)}
    write = toy_checkpoint(weights=weights).to_file if kind == "pt" else toy_checkpoint(weights=weights).to_safetensors
    write(path)
    path.write_bytes(path.read_bytes().replace(torch.full((2,), 1.5).numpy().tobytes(), b"\0" * 8, 1))
    with pytest.raises(UserError, match=rf"x\.{kind}: is damaged \(.*checksum"):
        Checkpoint.from_file(path)


def test_a_record_that_is_marked_as_a_folder_is_told(tmp_path: Path):
    """torch reads nothing of it, and returns whatever is in the memory; its checksum is right."""
    path = tmp_path / "x.pt"
    toy_checkpoint(weights={"a": torch.randn(100)}).to_file(path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"data/0", 0, len(content)) - len("archive/") - 8] |= 0x10  # of its external attributes
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: is damaged \(the entry of \w+/data/0 in its directory is wrong\)"):
        Checkpoint.from_file(path)


def test_safetensors_of_earlier_formats_have_no_checksum_and_are_read(tmp_path: Path):
    text = json.dumps(fields_of(toy_checkpoint(), "weights") | {"format": 3})
    header = {"format": "pt", "checkpoint": text}
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(2)}, header))
    assert Checkpoint.from_file(tmp_path / "x.safetensors").weights["a"].tolist() == [1, 1]


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"format": "1"}, torch.zeros(2)])
def test_a_stranger_among_torchs_files_is_the_users_error(tmp_path: Path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        Checkpoint.from_file(tmp_path / "x.pt")


def test_a_newer_format_is_told_apart(tmp_path: Path):
    torch.save({"format": FORMAT + 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"newer version .format {FORMAT + 1}, known {FORMAT}"):
        Checkpoint.from_file(tmp_path / "x.pt")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, save):
    path, sprung = tmp_path / "x.pt", tmp_path / "sprung"
    content = {**fields_of(toy_checkpoint()), "weights": Trap(sprung)}
    save(content, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        Checkpoint.from_file(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(content))  # the trap does work
    assert sprung.exists()
