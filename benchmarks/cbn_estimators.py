"""Accuracy of CBN's estimators, which compensate a past mini-batch's statistics for the current weights.

    python -m benchmarks.cbn_estimators [--data PATH] [--lag 3] [--steps 100]

A network is trained for some steps with stock BN. Then CBN's norm layers record a mini-batch of two images, `lag` more
optimizer steps follow, and the estimates are compared with the exact statistics: of the recorded inputs of each
layer, convolved with its new weights. Printed: root mean square and 99th percentile of the relative error of sigma^2
over layers, channels and repeats; the share of negative estimates, which the norm leaves out of its window and which
are left out here; and the root mean square error of the mean in units of sigma.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.main_job import page
from benchmarks.measured import RESULTS, Row, circumstances, write
from cfg.settings import cfg_settings
from data.annotation_formats import open_image_set
from data.augment_options import AugmentOptions
from data.loader import InputSizes, TrainLoader, make_train_loader
from models.blocks import ConvNormAct
from models.network import Network, parameter_groups
from models.norms.cbn import CrossIterationBatchNorm
from models.norms.contract import ConvView
from models.stored_network import build_network
from models.yolo.loss import LossOptions, YoloLoss
from utils.checkpoint import Checkpoint
from utils.clock import Tick
from utils.structures import Batch

ESTIMATES: dict[str, dict[str, Any]] = {
    "none": {"estimator": "none", "positions": 0},
    "taylor, all positions": {"estimator": "taylor", "positions": 0},
    "taylor, 256 positions": {"estimator": "taylor", "positions": 256},
    "std, all positions": {"estimator": "std", "positions": 0},
    "std, 256 positions": {"estimator": "std", "positions": 256},
}
RATES = (0.001, 0.005, 0.01)  # 0.005 is what the network is trained with


class Layer:
    """One convolution with a norm: its input, and a norm per estimator that records it."""

    def __init__(self, block: ConvNormAct) -> None:
        self.block = block
        self.x = torch.empty(0)
        self.norms: dict[str, CrossIterationBatchNorm] = {}
        block.conv.register_forward_pre_hook(self._see)

    def _see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.x = inputs[0].detach()

    @torch.no_grad()
    def record(self) -> None:
        conv, self.recorded = self.block.conv, self.x
        for name, settings in ESTIMATES.items():
            self.norms[name] = CrossIterationBatchNorm(
                conv.out_channels,
                patch_shape=(conv.groups, conv.weight[0].numel()),
                window=2,
                burn_in_steps=0,
                eps=1e-5,
                momentum=0.1,
                **settings,
            )
            self._show(name, self.recorded, step=0)

    @torch.no_grad()
    def errors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by estimator the relative error of sigma^2 and the error of the mean in sigmas, (C,) each."""
        now = self.x  # read before the hook replaces it
        y = self.block.conv(self.recorded)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        found = {}
        for name, norm in self.norms.items():
            self._show(name, now, step=1)
            found[name] = (norm.now_var[0] / var - 1, (norm.now_mean[0] - mean) / var.sqrt())
        return found

    def _show(self, name: str, x: Tensor, *, step: int) -> None:
        norm, conv = self.norms[name], self.block.conv
        norm.announce(Tick(step=step, index=0, count=1))
        norm(conv(x), ConvView(conv, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--lag", type=int, default=3, help="optimizer steps between recording and use (default 3)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of training before that (default 100)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "cbn_estimators.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page("train.py", "--data", args.data, "--norm", "bn", "--max-steps", str(args.steps), "--evals", "1",
             "--out", f"{folder}/run")  # fmt: skip
        checkpoint = Checkpoint.from_file(Path(folder) / "run" / "last.pt")
    train_set = open_image_set(args.data, "train")
    network = build_network(checkpoint).train()
    loader = make_train_loader(
        train_set,
        InputSizes(network.plan.net.input_hw),
        batch_size=16,
        augment=AugmentOptions(),
        seed=1,
        workers=0,
    )
    rows = [row | {"learning_rate": rate} for rate in RATES for row in measure(network, checkpoint, loader, rate, args)]
    print(f"\nrelative error of sigma^2 after {args.lag} steps, and error of the mean in sigmas")
    print(f"{'estimator':<24}{'rate':>6}{'rms':>10}{'p99':>10}{'negative':>10}{'mean rms':>11}")
    for row in rows:
        figures = f"{row['rms']:>10.1e}{row['p99']:>10.1e}{row['negative']:>10.2%}{row['mean_rms']:>11.1e}"
        print(f"{row['estimator']:<24}{row['learning_rate']:>6}{figures}")
    setting = {"data": Path(args.data).name, "lag": args.lag, "trained_steps": args.steps}
    write(args.out, {"rows": rows}, circumstances(torch.device("cpu"), **setting))


def measure(
    network: Network, checkpoint: Checkpoint, loader: TrainLoader, rate: float, args: argparse.Namespace
) -> list[Row]:
    network.load_state_dict(checkpoint.weights)
    criterion = YoloLoss(LossOptions())
    decay = cfg_settings(network.plan).get("weight_decay", 5e-4)
    assert isinstance(decay, int | float)
    optimizer = torch.optim.SGD(parameter_groups(network, weight_decay=decay), lr=rate, momentum=0.9)
    layers = [Layer(m) for m in network.modules() if isinstance(m, ConvNormAct) and m.norm is not None]
    errors: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ESTIMATES}

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(criterion(network(batch.pixels()), batch.targets).total / len(batch))
        optimizer.step()

    batches = iter(loader)
    for _ in range(3):  # momentum builds up
        step(next(batches))
    for repeat in range(args.repeats):
        loader.set_epoch(repeat + 1)
        batches = iter(loader)
        with torch.no_grad():
            network(next(iter(next(batches).split(8))).pixels())
        for layer in layers:
            layer.record()
        for _ in range(args.lag):
            step(next(batches))
        with torch.no_grad():
            network(next(iter(next(batches).split(8))).pixels())
        for layer in layers:
            for name, error in layer.errors().items():
                errors[name].append(error)
    rows = []
    for name, found in errors.items():
        var, mean = torch.cat([v for v, _ in found]), torch.cat([m for _, m in found])
        # A constant channel has no relative error.
        var, mean = var[torch.isfinite(var)], mean[torch.isfinite(mean)]
        is_negative = var < -1
        var = var[~is_negative]
        rows.append(
            {
                "estimator": name,
                "negative": float(is_negative.float().mean()),
                "rms": float(var.square().mean().sqrt()),
                "p99": float(var.abs().quantile(0.99)),
                "mean_rms": float(mean.square().mean().sqrt()),
            }
        )
    return rows


if __name__ == "__main__":
    main()
