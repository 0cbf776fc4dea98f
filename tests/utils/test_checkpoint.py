"""Checkpoints: what goes in comes out, nothing runs on the way, and training goes on as if never stopped."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from engine.training_state import TrainingState, load_norm_histories, norm_histories
from models.blocks import ConvNormAct
from models.norms.table import NormOptions, norm_factory
from tests.toy_checkpoint import toy_checkpoint
from utils.checkpoint import FORMAT, Checkpoint, ResumeState, load_matching
from utils.clock import BatchClock
from utils.errors import UserError
from utils.seed import random_state, set_random_state

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
    assert read.is_darknet and read.is_resumable == (training is not None)
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
    assert (two.format, two.is_resumable, two.step, two.train_images) == (2, False, 3, None)
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


# --- norms and their histories -------------------------------------------------------------------------------


def model_with(norm: NormOptions) -> nn.Module:
    torch.manual_seed(5)
    factory = norm_factory(norm)
    return nn.Sequential(
        ConvNormAct.make(3, 4, 3, padding=1, norm=factory, activation=nn.LeakyReLU(0.1)),
        ConvNormAct.make(4, 4, 3, padding=1, groups=2, norm=factory, activation=nn.Identity()),
    )


NORMS = {
    "cbn": NormOptions(norm="cbn:window=3,burn_in_steps=1"),
    "cmbn": NormOptions(norm="cmbn"),
    "bn": NormOptions(norm="bn"),
    "mabn": NormOptions(norm="mabn"),
}


def state_of(norm: str) -> TrainingState:
    network = model_with(NORMS[norm])
    return TrainingState(
        network=network,
        average=WeightAverage(network, decay=0.9, warm_up_steps=2),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
        precision=MixedPrecision("off", torch.device("cpu")),
        clock=BatchClock(network),
    )


def train(state: TrainingState, batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        for part in state.clock.minibatches(batch.split(2)):
            loss = (state.network(part) - 1).square().mean()
            losses.append(loss.item())
            state.precision.backward(loss)
        state.precision.step(state.optimizer, state.network.parameters(), clip_norm=None)
        state.clock.stepped()
        state.average.update(state.network, step=state.clock.step)
    return losses


@pytest.mark.parametrize("norm", NORMS)
def test_training_goes_on_as_if_never_stopped(tmp_path: Path, norm):
    batches = list(torch.randn(8, 4, 3, 5, 5))
    straight = state_of(norm)
    expected = train(straight, batches)

    first = state_of(norm)
    train(first, batches[:5])
    path = tmp_path / "last.pt"
    training = ResumeState(state=first.state_dict(), log={}, subdivisions=1)
    toy_checkpoint(weights=first.average.model.state_dict(), training=training).to_file(path)

    second = state_of(norm)
    read = Checkpoint.from_file(path)
    second.load_state_dict(read.training.state, weights=read.weights)
    assert second.clock.step == 5
    assert train(second, batches[5:]) == expected[10:]  # bit for bit
    for a, b in zip(second.average.model.parameters(), straight.average.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scales", [(1024.0, 1.0), (1.0, 1024.0), (1024.0, 1024.0)])
def test_averaged_gradients_follow_the_loss_scale(scales: tuple[float, float]):
    """--resume may be told another --amp; what mabn remembers of its gradients is as large as the losses were."""

    def state_at(scale: float) -> TrainingState:
        state = state_of("mabn")
        state.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        return state

    batches = list(torch.randn(6, 4, 3, 5, 5))
    straight, before, after = state_at(1.0), state_at(scales[0]), state_at(scales[1])
    expected = train(straight, batches)
    train(before, batches[:4])
    after.load_state_dict(before.state_dict(), weights=before.average.model.state_dict())
    assert train(after, batches[4:]) == pytest.approx(expected[8:], rel=1e-6)
    for a, b in zip(after.network.parameters(), straight.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_random_numbers_go_on_too(tmp_path: Path):
    draws = []
    toy_checkpoint(settings={"random": random_state()}).to_file(tmp_path / "x.pt")
    for _ in range(2):
        set_random_state(Checkpoint.from_file(tmp_path / "x.pt").settings["random"])
        draws.append((random.random(), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist()))
    assert draws[0] == draws[1]


def test_without_its_histories_cbn_would_go_on_differently():
    """Else the test above would see nothing."""
    batches = list(torch.randn(6, 4, 3, 5, 5))
    first = state_of("cbn")
    train(first, batches[:5])
    whole = first.state_dict()
    (own,) = whole["ranks"]
    partial = {**whole, "ranks": [{**own, "norm_histories": {}}]}
    goes_on = []
    for saved in (whole, partial):
        state = state_of("cbn")
        state.load_state_dict(saved, weights=first.average.model.state_dict())
        goes_on.append(train(state, batches[5:]))
    assert goes_on[0] != goes_on[1]


def test_histories_are_what_state_dicts_leave_out():
    state = state_of("cbn")
    train(state, list(torch.randn(3, 4, 3, 5, 5)))
    histories = norm_histories(state.network)
    assert {"0.norm.ring_cov", "1.norm.ring_patch", "0.norm.slot"} <= set(histories)
    assert not set(histories) & set(state.network.state_dict())
    assert histories["0.norm.ring_cov"].shape == (3, 4, 27) and histories["0.norm.ring_cov"].abs().sum() > 0

    fresh = model_with(NORMS["cbn"])
    load_norm_histories(fresh, histories)
    again = norm_histories(fresh)
    assert set(again) == set(histories)
    assert all(torch.equal(again[name], histories[name]) for name in histories)


def test_stock_norms_have_no_history():
    assert norm_histories(model_with(NORMS["bn"])) == {}


# --- fine-tuning ---------------------------------------------------------------------------------------------


def test_what_fits_is_loaded_and_the_rest_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = model[1].weight.detach().clone()
    fresh_bias = model[1].bias.detach().clone()
    state = {
        "0.weight": torch.ones(4, 3),
        "0.bias": torch.full((4,), 2.0),
        "1.weight": torch.ones(5, 4),  # another class count
        "1.bias": torch.ones(2),  # would fit, but a layer is taken over as a whole or not at all
        "2.weight": torch.ones(1),  # unknown here
    }
    assert load_matching(model, state) == (1, ["1"])
    assert model[0].weight.detach().eq(1).all() and model[0].bias.detach().eq(2).all()
    assert torch.equal(model[1].weight.detach(), before)
    assert torch.equal(model[1].bias.detach(), fresh_bias)


def test_everything_and_nothing_may_fit():
    model = nn.Sequential(nn.Linear(3, 4))
    assert load_matching(model, nn.Sequential(nn.Linear(3, 4)).state_dict()) == (1, [])
    assert load_matching(model, {}) == (0, ["0"])
