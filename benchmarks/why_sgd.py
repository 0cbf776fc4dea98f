"""Why SGD with a cfg's numbers fails in short trainings: one thing is changed at a time, in train.py's own step.

    python -m benchmarks.why_sgd --data PATH --cfg CFG --weights FILE [--epochs 6] [--seeds 1] [--only NAME ...]

The first table is of the start, before any update: how large the gradient of the heads (convolutions before a [yolo])
and of all other layers is, and how sharp the loss is in their directions, which limits SGD's rate. The second has AP on
val after fine-tunings on PATH, which all see the same batches, and after trainings from scratch on crowded images that
are made here. Rows go to benchmarks/results/why_sgd.jsonl, a line each: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.measured import RESULTS, Row, circumstances
from engine.job import job_of
from engine.loss_watch import TrainingLost
from engine.trainer import Trainer, make_val_evaluator
from models.network import Network
from models.yolo.criterion import Criterion
from models.yolo.head import RawHead
from models.yolo.loss import LossTerms
from options import OptimOptions
from study.rows import RowFile, read_rows
from utils.errors import exit_on_error
from utils.stop import Stop
from utils.structures import Batch, Targets

PARTS = ("heads", "rest")
CROWDS = (14, 5, 2)  # objects of a crowded image in a row, and rows
CROWD_STEPS = 60
FINE_TUNING = "fine-tuning"
ADAMW_RATE = 0.003
AVERAGED = {"momentum": 0.9, "dampening": 0.9}  # SGD's momentum as the moving average that Adam has


class SharedScaleAdam(torch.optim.SGD):
    """SGD that divides gradients by a running RMS, as Adam does, which a set of weights may share.

    Each parameter group has a `shared`: "weight" (nothing is shared: Adam, but that a gradient is divided before it
    enters the momentum), "filter" (the weights of an output), "channel" (of an input), "tensor", or "" for plain SGD.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, lr=0.0)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"] if group["shared"] else ():
                if p.grad is not None:
                    state = self.state[p]
                    now = shared_mean(p.grad.square(), group["shared"])
                    square = state.setdefault("square", torch.zeros_like(now)).lerp_(now, 0.001)
                    p.grad.div_((square / (1 - 0.999**self.steps)).sqrt() + 1e-8)
        return super().step(closure)


def shared_mean(squares: Tensor, shared: str) -> Tensor:
    """Return the mean of squares over each set, in a shape that broadcasts to theirs."""
    if shared == "weight" or (shared == "filter" and squares.ndim == 1):
        return squares
    if shared == "filter":
        return squares.mean(tuple(range(1, squares.ndim)), keepdim=True)
    if shared == "channel" and squares.ndim > 1:
        return squares.mean((0, *range(2, squares.ndim)), keepdim=True)
    return squares.mean()


class TwoOptimizers:
    """Two optimizers that step together, each with its parameter groups."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@dataclass(frozen=True, slots=True)
class PerObject:
    """A criterion that is divided by the objects of the mini-batch, in place of its images."""

    criterion: Criterion

    def __call__(self, heads: Sequence[RawHead], targets: Targets) -> LossTerms:
        terms, share = self.criterion(heads, targets), len(heads[0].logits) / max(1, len(targets.boxes))
        return LossTerms(box=terms.box * share, objectness=terms.objectness * share, classes=terms.classes * share)


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from `--optimizer sgd` with the cfg's numbers. typed: settings.

    adamw_on: the part, heads or rest, that AdamW trains at its own rate, and SGD the other.
    shared: for the parts, heads or rest, that Adam trains with AdamW's rate, what shares a scale (SharedScaleAdam).
    heads_first: share of the steps in which only the heads train.
    """

    name: str
    typed: Mapping[str, Any] = field(default_factory=dict)
    adamw_on: str = ""
    shared: Mapping[str, str] = field(default_factory=dict)
    per_object: bool = False
    heads_first: float = 0


def rate(value: float, **typed: Any) -> dict[str, Any]:
    return {"learning_rate": value, **typed}


WHICH_WEIGHTS = (  # need what Adam does, and which may share a scale
    Variant("sgd"),
    Variant("adamw", {"optimizer": "adamw", "learning_rate": ADAMW_RATE}),
    Variant("adamw on heads, sgd on rest", adamw_on="heads"),
    Variant("sgd on heads, adamw on rest", adamw_on="rest"),
    Variant("adam on heads, a scale per tensor", shared={"heads": "tensor"}),
    Variant("adam on heads, a scale per filter", shared={"heads": "filter"}),
    Variant("adam, a scale per tensor", shared={"heads": "tensor", "rest": "tensor"}),
    Variant("adam on heads, a scale per input channel", shared={"heads": "channel"}),
    Variant("adam, a scale per filter", shared={"heads": "filter", "rest": "filter"}),
)
ONE_CHANGE = (
    Variant("sgd .0003", rate(0.0003)),
    Variant("sgd, box gain 128", {"box_gain": 128.0}),
    Variant("sgd, box gain 8", {"box_gain": 8.0}),
    Variant("sgd .003, clip 10", rate(0.003, clip_norm=10.0)),
    Variant("sgd, heads first", heads_first=0.25),
    Variant("sgd .0003, rest x 30", rate(0.0003, backbone_rate=30.0)),
    Variant("sgd .003", rate(0.003)),
    Variant("sgd .016, per object", rate(0.016), per_object=True),
    Variant("sgd, burn-in of half", {"burn_in_steps": 36}),
    Variant("sgd .02, momentum 0", rate(0.02, momentum=0.0)),
    Variant("sgd, decay 0", {"weight_decay": 0.0}),
)
CROWDED = (
    Variant("sgd"),
    Variant("sgd, per object", per_object=True),
    Variant("adamw", {"optimizer": "adamw", "learning_rate": ADAMW_RATE}),
)


def main() -> None:
    args = parse()
    path = RESULTS / "why_sgd.jsonl"
    if not args.report_only:
        with RowFile(path) as file, tempfile.TemporaryDirectory() as scratch:
            done = {key(row) for row in file.rows}
            for cell in cells(args, Path(scratch)):
                if cell.key not in done and (not args.only or cell.variant.name in args.only):
                    file.append({**cell.run(), **circumstances(torch.device("cpu"))})
                    print(file.rows[-1], flush=True)
    print(report(read_rows(path)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="with splits train and val")
    parser.add_argument("--cfg", metavar="CFG")
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--image-size", type=int, default=160, metavar="PX")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants to run (default: all)")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Cell:
    """A training of a variant, or with table "start" a look at the start of it. batches: seen before, by seed."""

    table: str
    setting: str
    variant: Variant
    seed: int
    typed: Mapping[str, Any]
    batches: dict[int, list[Batch]]

    @property
    def key(self) -> tuple[object, ...]:
        return self.table, self.setting, self.variant.name, self.seed

    def run(self) -> Row:
        start = time.process_time()
        fixed = {
            "optimizer": "sgd",
            "amp": "off",
            "subdivisions": 1,
            "norm": "bn",
            "seed": self.seed,
            "device": "cpu",
            "workers": 0,
        }
        job = job_of({**fixed, **self.typed, **self.variant.typed})
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(job, Path(folder), Stop())
            if self.seed not in self.batches:
                self.batches[self.seed] = drawn(trainer)
            if self.table == "start":
                found = start_of(trainer, self.batches[self.seed][0])
            else:
                found = train(trainer, self.batches[self.seed], self.variant)
        names = dict(zip(("table", "setting", "variant", "seed"), self.key, strict=True))
        return {**names, **found, "cpu_seconds": round(time.process_time() - start, 1)}


def key(row: Row) -> tuple[object, ...]:
    return row["table"], row["setting"], row["variant"], row["seed"]


def cells(args: argparse.Namespace, scratch: Path) -> Iterator[Cell]:
    files = {"data": args.data, "cfg": args.cfg, "weights": args.weights}
    tuned = {**files, "image_size": (args.image_size,) * 2, "epochs": args.epochs, "batch_size": 16, "mosaic": 0.5}
    tuned |= {"lr_policy": "cosine", "channels_last": "on"}
    name = f"{FINE_TUNING}, {args.epochs} epochs"
    batches: dict[int, list[Batch]] = {}
    crowds: dict[str, tuple[Row, dict[int, list[Batch]]]] = {}
    for side in CROWDS:
        crowded_set(scratch / str(side), side)
        typed = {"data": str(scratch / str(side)), "image_size": (320, 320), "max_steps": CROWD_STEPS, "batch_size": 8}
        crowds[f"{side * side} objects"] = (typed, {})
    for variant in WHICH_WEIGHTS:
        yield Cell("training", name, variant, 0, tuned, batches)
    for setting, (typed, drawn_batches) in crowds.items():
        for variant in CROWDED:
            yield Cell("training", setting, variant, 0, typed, drawn_batches)
    yield Cell("start", name, Variant("sgd"), 0, tuned, batches)
    for setting, (typed, drawn_batches) in crowds.items():
        yield Cell("start", setting, Variant("sgd"), 0, typed, drawn_batches)
    for variant in ONE_CHANGE:
        yield Cell("training", name, variant, 0, tuned, batches)
    for seed in range(1, args.seeds):
        for variant in WHICH_WEIGHTS:
            yield Cell("training", name, variant, seed, tuned, batches)


def crowded_set(folder: Path, side: int) -> None:
    """Write a COCO data set: 12 + 3 noise images of 400 px, with side x side red boxes of 14 to 21 px each."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 3)):
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        images: list[Row] = []
        boxes: list[Row] = []
        for image_id in range(1, count + 1):
            pixels = rng.integers(90, 140, (400, 400, 3)).astype(np.uint8)
            for x, y in np.ndindex(side, side):
                left, top, (width, height) = 4 + 28 * x, 4 + 28 * y, rng.integers(14, 22, 2).tolist()
                pixels[top : top + height, left : left + width] = (20, 20, 230)
                box = {"id": len(boxes) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
                boxes.append({**box, "bbox": [left, top, width, height], "area": width * height})
            cv2.imwrite(str(folder / split / f"{split}{image_id}.png"), pixels)
            images.append({"id": image_id, "file_name": f"{split}{image_id}.png", "width": 400, "height": 400})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "red box"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def drawn(trainer: Trainer) -> list[Batch]:
    """Return the training's batches, which do not depend on the variant."""
    batches: list[Batch] = []
    for epoch in range(trainer.length.epochs):
        trainer.loader.set_epoch(epoch, 0)
        batches += trainer.loader
    return batches[: trainer.length.total_steps]


def parts_of(network: Network) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of the convolutions before a [yolo], and the others, by part."""
    heads = [p for index in network.head_inputs for p in network.layers[index].parameters()]
    known = set(map(id, heads))
    return {"heads": heads, "rest": [p for p in network.parameters() if id(p) not in known]}


def start_of(trainer: Trainer, batch: Batch) -> Row:
    """Return of each part the RMS of weights and gradient, its share of the squared gradient, and its sharpness."""
    parts = parts_of(trainer.network.train())
    gradients(trainer, batch, [])
    square = {
        name: sum(float(p.grad.square().sum()) for p in part if p.grad is not None) for name, part in parts.items()
    }
    row: Row = {"objects": round(len(batch.targets.boxes) / len(batch), 1)}
    for name, part in parts.items():
        count = sum(p.numel() for p in part)
        row[name] = {
            "weights": count,
            "rms_weight": significant(math.sqrt(mean_square([p.detach() for p in part]))),
            "rms_gradient": significant(math.sqrt(square[name] / count)),
            "share": significant(square[name] / sum(square.values())),
        }
        row[name]["sharpness"] = significant(sharpness(trainer, batch, part))
    optim = trainer.job.options.optim
    row |= {"rate": optim.learning_rate, "momentum": optim.momentum}
    return row


def sharpness(trainer: Trainer, batch: Batch, part: Sequence[nn.Parameter]) -> float:
    """Return the largest eigenvalue of the loss's Hessian within these parameters, to some per cent.

    Products with the Hessian are differences of gradients. SGD with momentum m diverges along the eigenvector if its
    rate exceeds 2 (1 + m) / sharpness.
    """
    sizes = [p.numel() for p in part]
    step = 3e-4 * max(1.0, math.sqrt(sum(float(p.detach().square().sum()) for p in part)))

    def product(vector: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(vector))
        pieces = torch.split(torch.from_numpy(vector.ravel() / length).float(), sizes)
        direction = [piece.view_as(p) for piece, p in zip(pieces, part, strict=True)]
        ahead = gradients(trainer, batch, part, direction, step)
        behind = gradients(trainer, batch, part, direction, -step)
        curved = [(a - b).flatten() * (length / (2 * step)) for a, b in zip(ahead, behind, strict=True)]
        return torch.cat(curved).numpy()

    hessian = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32)
    return float(eigsh(hessian, k=1, which="LA", ncv=10, tol=0.03, v0=start, return_eigenvectors=False)[0])


def gradients(
    trainer: Trainer, batch: Batch, part: Sequence[nn.Parameter], direction: Sequence[Tensor] = (), step: float = 0.0
) -> list[Tensor]:
    """Return the gradient of the loss per image, with respect to `part`, after a step from where the weights are."""
    before = [p.detach().clone() for p in part]
    with torch.no_grad():
        for p, d in zip(part, direction, strict=True):
            p.add_(d, alpha=step)
    trainer.network.zero_grad()
    terms = trainer.step.criterion(trainer.network(batch.pixels()), batch.targets)
    torch.autograd.backward(terms.total / len(batch))
    with torch.no_grad():
        for p, old in zip(part, before, strict=True):
            p.copy_(old)
    return [p.grad.clone() for p in part if p.grad is not None]


def train(trainer: Trainer, batches: Sequence[Batch], variant: Variant) -> Row:
    """Train as train.py's loop does, without evaluating on the way. Returns loss terms and AP; a lost one has AP 0."""
    network, step = trainer.network.train(), trainer.step
    parts = parts_of(network)
    if variant.adamw_on:
        step.optimizer = adamw_on(variant.adamw_on, step.optimizer, parts, trainer.job.options.optim)
    if variant.shared:
        step.optimizer = partly_adam(step.optimizer, parts, variant.shared, trainer.job.options.optim)
    if variant.per_object:
        step.criterion = PerObject(step.criterion)
    losses: list[Tensor] = []
    row: Row = {"steps": len(batches), "lost_at": None, "AP": 0.0, "AP50": 0.0, "raw_AP": 0.0}
    try:
        for number, batch in enumerate(batches):
            for part in parts["rest"]:
                part.requires_grad_(number >= variant.heads_first * len(batches))
            step.set_rate(trainer.schedule.rate(number))
            losses.append(step(batch))
            trainer.loss_watch(number + 1, float(losses[-1].sum()))
            trainer.ema.update(network, step=number + 1)
    except TrainingLost:
        row["lost_at"] = len(losses) + 1
    else:
        table, raw = trainer.evaluator.measure(), make_val_evaluator(trainer.job, network.eval(), None).measure()
        row |= {"AP": round(table.AP, 4), "AP50": round(table.AP50, 4), "raw_AP": round(raw.AP, 4)}
    ends = {"first": torch.stack(losses[:4]), "last": torch.stack(losses[-12:])}
    return row | {name: [significant(value) for value in loss.mean(0).tolist()] for name, loss in ends.items()}


def adamw_on(
    name: str, sgd: torch.optim.Optimizer, parts: Mapping[str, Sequence[nn.Parameter]], options: OptimOptions
) -> Any:
    """Return an optimizer that trains the part `name` with AdamW at its own rate, and the other as `sgd` does."""
    inside = groups_of(parts[name], sgd, lr_scale=ADAMW_RATE / float(options.learning_rate))
    (other,) = parts.keys() - {name}
    outside = groups_of(parts[other], sgd)
    return TwoOptimizers(torch.optim.AdamW(inside, lr=0.0), torch.optim.SGD(outside, lr=0.0, momentum=options.momentum))


def partly_adam(
    sgd: torch.optim.Optimizer,
    parts: Mapping[str, Sequence[nn.Parameter]],
    shared: Mapping[str, str],
    options: OptimOptions,
) -> SharedScaleAdam:
    """Return an optimizer that trains the parts in `shared` as Adam with AdamW's rate, and the others as `sgd` does."""
    adam = {**AVERAGED, "lr_scale": ADAMW_RATE / float(options.learning_rate), "weight_decay": 0.0}
    groups = []
    for name, part in parts.items():
        how = {"shared": shared[name], **adam} if name in shared else {"shared": "", "momentum": options.momentum}
        groups += groups_of(part, sgd, **how)
    return SharedScaleAdam(groups)


def groups_of(part: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, **changed: Any) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer without what is not in `part`."""
    known, groups = set(map(id, part)), []
    for group in optimizer.param_groups:
        common = {"weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]}
        if inside := [p for p in group["params"] if id(p) in known]:
            groups.append({**common, **changed, "params": inside})
    return groups


def mean_square(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors) / max(1, sum(t.numel() for t in tensors))


def significant(value: float) -> float:
    return float(f"{value:.3g}")


def report(rows: Sequence[Row]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "| start | objects an image | part | weights | RMS gradient / RMS weight | share of the squared gradient | "
        "sharpness | largest stable rate | the cfg's |",
        "|---" * 9 + "|",
    ]
    for row in (row for row in rows if row["table"] == "start"):
        for part in PARTS:
            of, stable = row[part], 2 * (1 + row["momentum"]) / row[part]["sharpness"]
            ratio = of["rms_gradient"] / of["rms_weight"]
            lines.append(
                f"| {row['setting']} | {row['objects']} | {part} | {of['weights']:,} | {ratio:.2g} | {of['share']:.3f} "
                f"| {of['sharpness']:g} | {stable:.2g} | {row['rate']:g} |"
            )
    lines += [
        "",
        "| training | variant | seeds | AP | AP50 | AP, not averaged | lost at step | box, objectness, classes |",
    ]
    lines += ["|---" * 8 + "|"]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in (row for row in rows if row["table"] == "training"):
        groups.setdefault((row["setting"], row["variant"]), []).append(row)
    for (setting, variant), group in groups.items():
        means = [f"{statistics.mean(row[name] for row in group):.3f}" for name in ("AP", "AP50", "raw_AP")]
        lost = ", ".join(str(row["lost_at"]) for row in group if row["lost_at"])
        last = ", ".join(
            f"{statistics.mean(values):.3g}" for values in zip(*(row["last"] for row in group), strict=True)
        )
        lines.append(f"| {setting} | {variant} | {len(group)} | {' | '.join(means)} | {lost} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_error(main)
