"""Training as darknet: a recorded one weight by weight, and train.py --loss darknet.

golden/darknet_training.npz holds the first of the three recorded nets; all are in the reference files beside the
checkout. Their darknet was patched to do on the CPU what its GPU code does.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from cfg.plan import parse_plan
from cfg.settings import cfg_settings
from engine import build
from models.blocks import ConvNormAct
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.yolo.criterion import make_criterion
from models.yolo.loss import LossOptions
from options import TrainOptions
from tests.models.yolo.recorded import GOLDEN, targets_of, truths_of
from utils.clock import BatchClock
from utils.errors import UserError
from utils.flags import resolve
from utils.structures import Batch

STEPS = 3


def arrays_of(network: Network) -> Iterator[Tensor]:
    """In the order of a .weights file: bias or beta, gamma, running mean and variance, weight."""
    for block in network.layers:
        if not isinstance(block, ConvNormAct):
            continue
        if block.norm is None:
            yield block.conv.bias
        else:
            yield from (block.norm.bias, block.norm.weight, block.norm.running_mean, block.norm.running_var)
        yield block.conv.weight


def cut_as(network: Network, flat: np.ndarray) -> list[Tensor]:
    sizes = [array.numel() for array in arrays_of(network)]
    return list(torch.from_numpy(flat).split(sizes))


def train_as_recorded(cfg: str, recorded: Mapping[str, np.ndarray]) -> tuple[Network, list[float], list[float]]:
    """Three steps with the project's own parts: the network, the rate of each step, the cost of each mini-batch."""
    plan = parse_plan(cfg, path="recorded.cfg")
    options = resolve(TrainOptions, {"norm_momentum": 0.01, "loss": "darknet"}, cfg_settings(plan))
    schedule = build.make_schedule(options, plan, total_steps=plan.net.max_batches)
    network = Network(plan, norm_factory(options.norm)).train()
    with torch.no_grad():
        for array, values in zip(arrays_of(network), cut_as(network, recorded["weights0"]), strict=True):
            array.copy_(values.view_as(array))
    truths = [truths_of(rows) for rows in recorded["T"]]
    batch = Batch(
        images=torch.from_numpy(recorded["X"]),
        targets=targets_of(truths, plan.net.input_hw, torch.float32),
        image_ids=(0,) * 4,
        paths=("",) * 4,
        placements=(None,) * 4,
    )
    groups = parameter_groups(network, weight_decay=options.optim.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=options.optim.momentum)
    criterion, clock = make_criterion(options.loss), BatchClock(network)
    rates, costs = [], []
    while clock.step < STEPS:
        rates.append(schedule.rate(clock.step))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        for part in clock.minibatches(batch.split(options.optim.subdivisions)):
            loss = criterion(network(part.pixels()), part.targets)
            (loss.total / len(batch)).backward()
            costs.append(loss.total.item())
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    return network, rates, costs


def assert_trained_as_darknet(cfg: str, log: list[str], recorded: Mapping[str, np.ndarray]) -> None:
    network, rates, costs = train_as_recorded(cfg, recorded)
    assert rates == pytest.approx([5e-5, 8e-4, 8e-4], rel=1e-12)
    assert costs == pytest.approx([float(re.search(r"cost (\S+)", line)[1]) for line in log], rel=1e-6)
    before, after = cut_as(network, recorded["weights0"]), cut_as(network, recorded[f"weights{STEPS}"])
    for array, start, expected in zip(arrays_of(network), before, after, strict=True):
        error = (array.detach().flatten() - expected).norm()
        assert error < 1e-6 * expected.norm()
        assert error < 1e-3 * (expected - start).norm()  # of the little that three steps move it


def test_three_steps_are_darknets():
    with np.load(GOLDEN) as arrays:
        case = json.loads(str(arrays["meta"]))["train_step"]
        recorded = {name: arrays[f"train_step/{name}"] for name in ("X", "T", "weights0", f"weights{STEPS}")}
    assert_trained_as_darknet(case["cfg"], case["log"], recorded)


@pytest.mark.parametrize("name", ["bn_leaky", "nobn_mish", "nobn_swish"])
def test_three_steps_of_each_recorded_net_are_darknets(shared: Path, name: str):
    folder = shared / "darknet" / "fixtures"
    case: dict[str, Any] = json.loads((folder / "train_step.json").read_text())[name]
    with np.load(folder / "train_step.npz") as arrays:
        recorded = {part: arrays[f"{name}/{part}"] for part in ("X", "T", "weights0", f"weights{STEPS}")}
    assert_trained_as_darknet(case["cfg"], case["log"], recorded)


def test_the_true_gradient_is_another():
    """Else the tests above would see nothing."""
    with np.load(GOLDEN) as arrays:
        case = json.loads(str(arrays["meta"]))["train_step"]
        truths, images = [truths_of(rows) for rows in arrays["train_step/T"]], arrays["train_step/X"]
    plan = parse_plan(case["cfg"], path="recorded.cfg")
    network = Network(plan, norm_factory(NormOptions()))
    gradients = []
    for loss in ("darknet", "autograd"):
        network.zero_grad()
        targets = targets_of(truths, plan.net.input_hw, torch.float32)
        make_criterion(LossOptions(loss=loss))(network(torch.from_numpy(images)), targets).total.backward()
        gradients.append(network.layers[0].conv.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[0].norm()


def test_train_py_trains_with_darknets_loss(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--loss", "darknet", "--workers", "0", "--evals", "1"]
    train.main([*flags, "--epochs", "8", "--out", str(tmp_path / "run")])
    with (tmp_path / "run" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert len(losses) == 8 and all(np.isfinite(losses))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["loss"] == "darknet"


def test_the_gain_of_the_other_loss_is_refused_before_training(scenes: Path, toy_cfg: str, tmp_path: Path) -> None:
    flags = ["--data", str(scenes), "--cfg", toy_cfg, "--workers", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--box-gain is read by --loss autograd"):
        train.main([*flags, "--loss", "darknet", "--box-gain", "8"])
