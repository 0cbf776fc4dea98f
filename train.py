"""Train a YOLOv4-family detector: `python train.py --norm cmbn --data PATH --cfg yolov4-tiny`.

`main` settles what is asked for, `train` is the loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

# First, because it checks that torchvision fits torch before anything else imports it.
from options import (
    EvaluateOptions,
    TrainOptions,
    cfg_settings,
    flatten,
    given_flags,
    run_page,
    settle,
    unread_settings,
)

# isort: split
import torch

from cfg.plan import Plan, load_plan, parse_plan
from data.image_set import ImageSet
from data.loader import make_train_loader
from data.source import open_image_set
from examination import make_examiner, recalibrate_on
from models.detector import Detector, describe_network
from models.network import Network, parameter_groups
from models.norms.auto import choose_norm
from models.norms.effective import check_values, describe_norm, norm_warnings
from models.norms.regime import NormRegime
from models.norms.table import norm_factory, norm_of_weights
from models.weights.start import read_start, start_from
from models.yolo.criterion import make_criterion
from models.yolo.loss import LossOptions
from utils.amp import MixedPrecision
from utils.checkpoint import TrainingState, read_checkpoint, write_checkpoint
from utils.clock import BatchClock
from utils.coco_map import CocoTable
from utils.draw import draw_batch, write_png
from utils.ema import WeightAverage
from utils.environment import describe, leave_a_core_to_loaders, pick_device
from utils.errors import UserError
from utils.plots import plot_results
from utils.runlog import RunLog, free_folder
from utils.schedule import Schedule
from utils.seed import seed_everything

RESUMABLE = {"resume", "device", "workers", "epochs"}
SAVE_EVERY_S = 60  # seconds between two last.pt, where epochs are shorter: a large network takes its time to write


def train(
    options: TrainOptions,
    plan: Plan,
    train_set: ImageSet,
    val_set: ImageSet,
    folder: Path,
    checkpoint: dict[str, Any] | None = None,
) -> CocoTable:
    """From options to a trained network in `folder`, going on from `checkpoint` where there is one.

    Returns the table of the best weights on the validation split.
    """
    optim, device = options.optim, pick_device(options.device)
    leave_a_core_to_loaders(device, options.workers)
    seed_everything(options.seed)
    network = Network(plan, norm_factory(options.norm)).to(device)
    if options.weights is not None and checkpoint is None:
        print(start_from(options.weights, options.cfg, network))
    criterion = make_criterion(options.loss)
    optimizer = torch.optim.SGD(
        parameter_groups(network, weight_decay=optim.weight_decay), lr=0.0, momentum=optim.momentum
    )
    precision = MixedPrecision(optim.amp, device)
    loader = make_train_loader(
        train_set,
        batch_size=optim.batch_size,
        input_hw=plan.net.input_hw,
        multi_scale=options.multi_scale,
        augment=options.augment,
        seed=options.seed,
        workers=options.workers,
    )
    smallest = plan.with_input_hw(loader.smallest_hw)
    check_values(smallest, options.norm, mini_batch=loader.batch_size // min(optim.subdivisions, loader.batch_size))
    total_steps = optim.epochs * len(loader) if optim.epochs else optim.max_steps
    epochs = -(-total_steps // len(loader))
    schedule = make_schedule(options, plan, total_steps=total_steps)
    decay = schedule.average_decay() if optim.ema_decay is None else optim.ema_decay
    average = WeightAverage(network, decay=decay, warm_up_steps=100)
    detector = make_detector(options, average, train_set.class_names)
    # What fits in training fits here.
    eval_loading = {"batch_size": optim.batch_size // optim.subdivisions, "workers": options.workers}
    examiner = make_examiner(detector, val_set, **eval_loading)
    clock = BatchClock(network)
    regime = NormRegime(network, options.norm, total_steps)
    state = TrainingState(network=network, average=average, optimizer=optimizer, precision=precision, clock=clock)
    best_ap = float("-inf")
    if checkpoint is not None:
        state.load_state_dict(checkpoint["training"], weights=checkpoint["weights"])
        best_ap = checkpoint["best_ap"]
    log = RunLog(folder, total_steps=total_steps, first_step=clock.step)
    resolved = {"cfg": plan.path, "image_size": plan.net.input_hw, "amp": precision.kind, "ema_decay": decay}
    log.settings({**flatten(options), **resolved, "total_steps": total_steps, "environment": describe(device)})

    first_epoch, batches_done = divmod(clock.step, len(loader))
    saved_at = time.monotonic()
    for epoch in range(first_epoch, epochs):
        network.train()
        loader.set_epoch(epoch, batches_done if epoch == first_epoch else 0)
        begun = time.monotonic()
        for batch in islice(loader, total_steps - clock.step):
            if clock.step == 0:
                write_png(folder / "first_batch.png", draw_batch(batch, train_set.class_names))
            rate = schedule.rate(clock.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = torch.zeros(3, device=device)
            regime.prepare(clock.step)
            for part in clock.minibatches(batch.to(device, non_blocking=True).split(optim.subdivisions)):
                with precision.autocast():
                    heads = network(part.pixels())
                loss = criterion(heads, part.targets)
                # Divided by the images of the whole batch: the gradient does not depend on how it was cut.
                precision.backward(loss.total / len(batch))
                terms += loss.detached() / len(batch)
            check_finite(terms, clock.step, batch.paths)
            precision.step(optimizer, network.parameters(), clip_norm=optim.clip_norm)
            clock.stepped()
            average.update(network, step=clock.step)
            log.losses(clock.step, terms, rate=rate, epoch=f"{epoch + 1}/{epochs}")

        row = {"step": clock.step, "epoch": epoch + 1, "lr": rate, **log.take_mean_losses()}
        row["seconds"] = time.monotonic() - begun
        due, is_best = is_due(epoch, epochs, options.evals), False
        if due:
            table = examiner.measure()
            is_best, best_ap = best_ap < table.AP, max(table.AP, best_ap)
            row |= {"AP": table.AP, "AP50": table.AP50}
            log.say(f"epoch {epoch + 1}: AP {table.AP:.3f}  AP50 {table.AP50:.3f}")
        log.epoch(row)
        content = {
            **describe_network(plan, options.norm, train_set.class_names, options.augment.letterbox),
            "weights": average.model.state_dict(),
            "step": clock.step,
            "best_ap": best_ap,
            "settings": flatten(options),
        }
        if is_best:
            write_checkpoint(folder / "best.pt", content)
        if due or time.monotonic() - saved_at > SAVE_EVERY_S:
            write_checkpoint(folder / "last.pt", {**content, "training": state.state_dict()})
            saved_at = time.monotonic()

    log.close()
    best = read_checkpoint(folder / "best.pt")
    average.model.load_state_dict(best["weights"])
    if not options.norm.precise_bn:
        return examiner.report(folder)
    before = examiner.measure()
    source = recalibrate_on(train_set, detector, pictures=options.norm.precise_bn, **eval_loading)
    after = examiner.report(folder)
    write_checkpoint(folder / "best.pt", {**best, "weights": average.model.state_dict(), "best_ap": after.AP})
    print(f"AP {before.AP:.3f} with running averages, {after.AP:.3f} with {source}, which best.pt now has")
    return after


def is_due(epoch: int, epochs: int, evals: int) -> bool:
    """Whether to evaluate after this epoch: about `evals` times over the run, and after the last."""
    return epoch + 1 == epochs or (epoch + 1) * evals // epochs > epoch * evals // epochs


def check_finite(terms: torch.Tensor, step: int, paths: Sequence[str]) -> None:
    if not torch.isfinite(terms).all():
        raise UserError(
            f"the loss is not finite at step {step + 1} (pictures {', '.join(paths[:4])} ...): lower "
            "--learning-rate or set --clip-norm; last.pt, if there is one, holds weights from before"
        )


def make_schedule(options: TrainOptions, plan: Plan, *, total_steps: int) -> Schedule:
    """A cfg's steps and burn-in are meant for its max_batches: a run of another length keeps their proportion.

    UserError where the policy misses a key in the cfg.
    """
    optim, net = options.optim, plan.net
    steps, burn_in_steps = optim.lr_steps, optim.burn_in_steps
    if steps and steps == net.steps and net.max_batches:
        steps = tuple(step * total_steps // net.max_batches for step in steps)
    if burn_in_steps == net.burn_in_steps:
        burn_in_steps = min(burn_in_steps, total_steps // 10)
    try:
        return Schedule(
            policy=optim.lr_policy,
            base_rate=optim.learning_rate,
            final_rate=optim.final_learning_rate,
            total_steps=total_steps,
            burn_in_steps=burn_in_steps,
            power=net.power,
            steps=steps,
            scales=optim.lr_scales,
            cfg_steps=net.max_batches,
            step=net.step,
            scale=net.scale,
            gamma=net.gamma,
            cycle_steps=net.sgdr_cycle,
            cycle_mult=net.sgdr_mult,
        )
    except UserError as error:
        raise UserError(f"{plan.path}: {error}") from error


def make_detector(options: TrainOptions, average: WeightAverage, class_names: tuple[str, ...]) -> Detector:
    """The averaged weights, as evaluate.py uses them by default."""
    default = EvaluateOptions(weights="")
    return Detector(
        network=average.model,
        class_names=class_names,
        letterbox=options.augment.letterbox,
        confidence=default.confidence,
        nms_iou=default.nms_iou,
        max_detections=default.max_detections,
    )


def resumed(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint to go on from, and its settings under what was typed now."""
    extra = set(given) - RESUMABLE
    if extra:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        raise UserError(f"--resume goes on with the run's own settings: {flags} cannot be changed")
    path = Path(given["resume"])
    checkpoint = read_checkpoint(path / "last.pt" if path.is_dir() else path)
    if "training" not in checkpoint:
        raise UserError(f"{path}: holds weights only; a run goes on from its last.pt")
    return checkpoint, {**checkpoint["settings"], **given}


def choose_plan(given: dict[str, Any], checkpoint: dict[str, Any] | None, class_names: Sequence[str]) -> Plan:
    """The network's plan, its heads sized for the data: of the checkpoint, unless a new run names a cfg."""
    if checkpoint is not None and ("resume" in given or given.get("cfg") is None):
        name = checkpoint["cfg_name"] + ".cfg"
        plan = parse_plan(checkpoint["cfg_text"], path=name, classes=len(class_names))
        plan = plan.with_input_hw(tuple(checkpoint["input_hw"]))
    else:
        plan = load_plan(given.get("cfg") or "yolov4-pico", classes=len(class_names))
    if not plan.heads or plan.net.channels != 3:
        raise UserError(f"{plan.path}: training needs [yolo] layers and channels=3")
    height, width = given.get("image_size") or plan.net.input_hw
    if height % max(plan.strides) or width % max(plan.strides):
        raise UserError(f"an input of {height}x{width} does not fit: sides must be multiples of {max(plan.strides)}")
    written = parse_plan(plan.source_text, path=plan.path).classes
    if written != plan.classes:
        print(f"classes   {plan.classes} in the data, {written} in {plan.path}: the heads are re-sized")
    for warning in (*plan.warnings, *unread_settings(plan, given.get("loss", LossOptions().loss))):
        print(f"warning: {warning}")
    return plan.with_input_hw((height, width))


def check_batch(options: TrainOptions) -> None:
    batch, parts = options.optim.batch_size, options.optim.subdivisions
    if batch % parts:
        raise UserError(
            f"--batch-size {batch} is not divisible by --subdivisions {parts} (what is not typed is the cfg's)"
        )


def open_sets(given: dict[str, Any]) -> tuple[ImageSet, ImageSet]:
    """Training and validation split of the data set."""
    data = given.get("data", "digits")
    train_set = open_image_set(data, given.get("train_split", "train"))
    val_set = open_image_set(data, given.get("val_split", "val"))
    if len(train_set.labels) == 0:
        raise UserError(f"{data}: none of the {len(train_set)} pictures of '{train_set.split}' has an object")
    if common := train_set.shares_pictures_with(val_set):
        print(f"warning: {common} pictures are in both '{train_set.split}' and '{val_set.split}': AP will flatter")
    return train_set, val_set


def main(argv: Sequence[str] | None = None) -> None:
    given = given_flags(TrainOptions, argv)
    checkpoint, given = resumed(given) if "resume" in given else (None, given)
    start = read_start(given["weights"], given.get("cfg")) if checkpoint is None and "weights" in given else None
    train_set, val_set = open_sets(given)
    if checkpoint is not None and checkpoint["class_names"] != list(train_set.class_names):
        raise UserError(f"{given['resume']}: was trained on other classes than {given['data']} has now")
    plan = choose_plan(given, checkpoint or start, train_set.class_names)
    said_by_files = cfg_settings(plan, given.get("mosaic_geometry", "content"))
    if not train_set.mirror_safe:
        said_by_files["flip"] = False
    if start is not None:
        said_by_files |= {**norm_of_weights(start["norm"], given.get("norm")), "letterbox": start["letterbox"]}
    options = settle(TrainOptions, given, said_by_files)
    check_batch(options)
    norm, why = choose_norm(options.norm, mini_batch=options.optim.batch_size // options.optim.subdivisions)
    options = replace(options, norm=norm)
    if checkpoint is not None:
        folder = Path(given["resume"])
        folder = folder if folder.is_dir() else folder.parent
    else:
        folder = free_folder(options.run, default=f"{train_set.name}-{plan.name}-{options.norm.norm}")
    announce(options, plan, train_set, val_set, folder)
    if why:
        print(f"auto      {why}")
    table = train(options, plan, train_set, val_set, folder, checkpoint)
    plot_results(folder / "results.csv", folder / "results.png")
    print(f"\n{folder / 'best.pt'} on {val_set.name} {val_set.split}:")
    print(table.summary(), table.class_table(), sep="\n\n")
    print(f"\nall of it is in {folder}; next: python detect.py --weights {folder / 'best.pt'} PICTURES")


def announce(options: TrainOptions, plan: Plan, train_set: ImageSet, val_set: ImageSet, folder: Path) -> None:
    """What is about to happen, in a few lines; and in the run's folder, all that is wrong with the data."""
    optim = options.optim
    for image_set in (train_set, val_set):
        size = f"{len(image_set)} pictures, {len(image_set.labels)} objects"
        print(f"data      {image_set.name} {image_set.split}: {size}")
        for line in image_set.problems.summary():
            print(f"          {line}")
    if problems := [line for image_set in (train_set, val_set) for line in image_set.problems.lines()]:
        (folder / "data_problems.txt").write_text("\n".join(problems) + "\n")
    height, width = plan.net.input_hw
    parameters = f"{plan.parameter_count() / 1e6:.2f} M parameters"
    print(f"network   {plan.name} {height}x{width}, {plan.classes} classes, {parameters}")
    cut = {"mini_batch": optim.batch_size // optim.subdivisions, "subdivisions": optim.subdivisions}
    print(f"norm      {describe_norm(options.norm, **cut)}")
    from_scratch = options.weights is None and options.resume is None
    for warning in norm_warnings(options.norm, **cut, from_scratch=from_scratch):
        print(f"warning: {warning}")
    print(f"device    {describe(pick_device(options.device))['device']}")
    print(f"run       {folder}")
    changed = {name: value for name, value in flatten(options).items() if value is not None}
    print("settings  " + "  ".join(f"{name}={value}" for name, value in sorted(changed.items())))


if __name__ == "__main__":
    run_page(main)
