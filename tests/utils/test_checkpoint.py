"""Checkpoints: what goes in comes out, nothing runs on the way, and training goes on as if never stopped."""

from __future__ import annotations

import os
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.amp import MixedPrecision
from engine.ema import WeightAverage
from engine.training_state import TrainingState, load_norm_histories, norm_histories
from models.blocks import ConvNormAct
from models.norms.table import NormOptions, norm_factory
from utils.checkpoint import FORMAT, load_matching, read_checkpoint, write_checkpoint, write_weights
from utils.clock import BatchClock
from utils.errors import UserError
from utils.seed import random_state, set_random_state


def test_what_is_written_is_read(tmp_path: Path):
    content = {
        "weights": {"a": torch.randn(3, 4), "half": torch.randn(2).bfloat16(), "count": torch.tensor(7)},
        "names": ["a", "b"],
        "settings": {"rate": 0.1, "hw": (3, 4), "none": None, "flag": True},
    }
    write_checkpoint(tmp_path / "x.pt", content)
    read = read_checkpoint(tmp_path / "x.pt")
    assert read["format"] == FORMAT
    for name, tensor in content["weights"].items():
        assert torch.equal(read["weights"][name], tensor) and read["weights"][name].dtype == tensor.dtype
    assert {key: read[key] for key in ("names", "settings")} == {key: content[key] for key in ("names", "settings")}
    assert os.listdir(tmp_path) == ["x.pt"]


def test_weights_are_read_back_from_safetensors_and_training_is_left_out(tmp_path: Path):
    weights = {"a": torch.randn(3, 4), "wide": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    weights |= {"half": torch.randn(2).bfloat16(), "count": torch.tensor(7)}
    content = {"weights": weights, "training": {"x": 1}, "log": {}, "class_names": ["a", "ü"], "best_ap": 0.25}
    write_weights(tmp_path / "x.safetensors", content)
    read = read_checkpoint(tmp_path / "x.safetensors")
    assert read.keys() == {"format", "weights", "class_names", "best_ap"}
    assert (read["class_names"], read["best_ap"]) == (["a", "ü"], 0.25)
    for name, tensor in weights.items():
        assert torch.equal(read["weights"][name], tensor) and read["weights"][name].dtype == tensor.dtype


@pytest.mark.parametrize("content", [b"", b"junk" * 9, (5).to_bytes(8, "little") + b"{}   ", b"\xff" * 64])
def test_another_safetensors_file_is_the_users_error(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: not a checkpoint of this project"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"value": 1})
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"weights": torch.zeros(1000), "value": lambda: 2})
    assert read_checkpoint(path)["value"] == 1


def test_a_crash_before_the_renaming_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"value": 1})

    def crash(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, {"value": 2})
    assert read_checkpoint(path)["value"] == 1


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path: Path):
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"value": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(path, {"value": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)["value"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_what_does_not_read_back_does_not_replace_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"value": 1})
    fsync = os.fsync

    def corrupt(descriptor: int) -> None:
        """A disk that says yes and writes something else."""
        os.pwrite(descriptor, b"garbage", 3000)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", corrupt)
    with pytest.raises(OSError, match="was not written as it should be"):
        write_checkpoint(path, {"value": 2, "weights": torch.zeros(10_000)})
    assert read_checkpoint(path)["value"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_a_missing_file_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint"):
        read_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[net]\nwidth=3\n", b"\x80\x02 half a pickle", b"PK\x03\x04 half a zip"])
def test_another_kind_of_file_is_the_users_error(tmp_path: Path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: not a checkpoint of this project"):
        read_checkpoint(path)


def test_a_damaged_checkpoint_is_the_users_error(tmp_path: Path):
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a checkpoint of this project, or damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"format": "1"}, torch.zeros(2)])
def test_a_stranger_among_torchs_files_is_the_users_error(tmp_path: Path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_newer_format_is_told_apart(tmp_path: Path):
    torch.save({"format": FORMAT + 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"newer version .format {FORMAT + 1}, known {FORMAT}"):
        read_checkpoint(tmp_path / "x.pt")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, save):
    path, sprung = tmp_path / "x.pt", tmp_path / "sprung"
    content = {"format": FORMAT, "weights": Trap(sprung)}
    save(content, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(path)
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
    write_checkpoint(path, {"weights": first.average.model.state_dict(), "training": first.state_dict()})

    second = state_of(norm)
    read = read_checkpoint(path)
    second.load_state_dict(read["training"], weights=read["weights"])
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
    write_checkpoint(tmp_path / "x.pt", {"random": random_state()})
    for _ in range(2):
        set_random_state(read_checkpoint(tmp_path / "x.pt")["random"])
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
