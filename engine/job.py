"""What a training needs before its first step: from what was typed to a Job, or to one sentence that says why not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfg.plan import Plan, load_plan, parse_plan
from cfg.settings import cfg_settings, unread_settings
from data.doctor.checkup import quick_findings
from data.image_set import ImageSet
from data.source import BUILT_IN, open_image_set
from models.detector import Detector
from models.network import Network
from models.norms.auto import ENOUGH, choose_norm
from models.norms.effective_batch import FEW, describe_norm, norm_warnings
from models.norms.old_spelling import respelled
from models.norms.table import norm_of_weights
from models.weights.start import read_start
from options import FOREIGN_FLAGS, EvaluateOptions, TrainOptions
from utils import ranks
from utils.atomic_file import warn_on_disk_error
from utils.checkpoint import RESUMABLE_FROM, read_checkpoint
from utils.environment import describe, pick_device
from utils.errors import UserError
from utils.flags import current_names, flatten, parse_flags, resolve
from utils.run_folder import folder_of_job, free_folder, mark_folder, newest_run, writable_folder
from utils.schedule import Schedule

# What may be typed beside --resume: where to compute and for how long, and where the data set is, which the numbers do
# not depend on, and what helps a training over a crisis.
RESUMABLE = {
    *("resume", "data", "epochs", "save_minutes"),
    *("subdivisions", "learning_rate", "clip_norm", "amp"),
    *("device", "workers", "cache", "eval_backend", "checkpoint_activations", "profile"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A training as it was asked for. checkpoint: what it goes on from, None for a new run."""

    options: TrainOptions
    plan: Plan
    train_set: ImageSet
    val_set: ImageSet
    folder: Path
    checkpoint: dict[str, Any] | None = None

    @property
    def mini_batch(self) -> int:
        """Images of one forward on one rank; a data set smaller than a batch makes a smaller one."""
        optim = self.options.optim
        share = max(1, min(optim.batch_size, len(self.train_set)) // ranks.world_size())
        return share // min(int(optim.subdivisions), share)


def parse_job(argv: Sequence[str] | None = None) -> Job:
    """All that was typed, with what the data set and the cfg say. UserError, CfgError for what is wrong.

    `auto` is still to be chosen, the folder of a new run to be made: `open_run`.
    """
    return job_of(parse_flags(TrainOptions, argv, foreign=FOREIGN_FLAGS[TrainOptions]))


def job_of(given: dict[str, Any]) -> Job:
    """`parse_job` of settings by name. Raises the same."""
    if given.keys() >= {"epochs", "max_steps"}:
        raise UserError("--epochs and --max-steps both say how long to train: give one of them")
    given = restore_after_restart(given)
    checkpoint, given = load_resume(given) if "resume" in given else (None, given)
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
    options = resolve(TrainOptions, given, said_by_files)
    check_batch(options)
    return Job(options=options, plan=plan, train_set=train_set, val_set=val_set, folder=Path(), checkpoint=checkpoint)


def open_run(job: Job) -> Job:
    """The job with the norm for its mini-batches and a folder; what is about to happen is said."""
    norm, why = choose_norm(job.options.norm, mini_batch=job.mini_batch)
    job = with_options(job, **flatten(norm))
    if job.options.resume is not None:
        folder = Path(job.options.resume)
        folder = folder if folder.is_dir() else folder.parent
        if ranks.is_rank_zero():
            writable_folder(folder)
    else:
        default = f"{job.train_set.name}-{job.plan.name}-{norm.norm}"
        name, job_name = job.options.out, ranks.job_id()
        folder = Path()
        if ranks.is_rank_zero():
            # Started anew, it may have died before its first last.pt.
            is_own = ranks.restarts() > 0 and folder_of_job(job_name, name) is not None
            folder = free_folder(name, default=default, may_hold_files=is_own)
            mark_folder(folder, job_name)
        folder = ranks.broadcast(folder)
    job = replace(job, folder=folder)
    if ranks.is_rank_zero():
        announce(job, why)
    return job


def with_options(job: Job, **changed: Any) -> Job:
    """The same job with other settings."""
    return replace(job, options=resolve(TrainOptions, {**flatten(job.options), **changed}))


def restore_after_restart(given: dict[str, Any]) -> dict[str, Any]:
    """A job that `torchrun --max-restarts` has started again goes on in its folder: same command, nothing lost."""
    if not ranks.restarts() or "resume" in given:
        return given
    job = ranks.job_id()
    folder = ranks.broadcast(folder_of_job(job, given.get("out")) if ranks.is_rank_zero() else None)
    if folder is None or not ranks.broadcast((folder / "last.pt").exists()):
        return given
    return {name: value for name, value in given.items() if name in RESUMABLE} | {"resume": str(folder)}


def load_resume(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint to go on from, and its settings under what was typed now."""
    extra = set(given) - RESUMABLE
    if extra:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        raise UserError(f"--resume goes on with the run's own settings: {flags} cannot be changed")
    path = Path(given["resume"]) if given["resume"] else newest_run()
    checkpoint = read_checkpoint(path / "last.pt" if path.is_dir() else path)
    if "training" not in checkpoint:
        raise UserError(f"{path}: holds weights only; a run goes on from its last.pt")
    if checkpoint["format"] < RESUMABLE_FROM:
        raise UserError(
            f"{path}: its training was saved by an earlier version (format {checkpoint['format']}) and cannot go on; "
            "start a new run from its weights with --weights"
        )
    # Memory may have run out since the settings were made.
    settings = respelled(current_names(TrainOptions, checkpoint["settings"]))
    settings["subdivisions"] = checkpoint["subdivisions"]
    data = settings["data"]
    if "data" not in given and data != BUILT_IN and not os.path.exists(os.path.expanduser(data)):
        raise UserError(
            f"{path}: its data set {data} is not to be found from {Path.cwd()}; --data may name where it is now"
        )
    return checkpoint, {**settings, **given, "resume": str(path)}


def choose_plan(given: dict[str, Any], checkpoint: dict[str, Any] | None, class_names: Sequence[str]) -> Plan:
    """The network's plan, its heads sized for the data: of the checkpoint, unless a new run names a cfg."""
    if checkpoint is not None and ("resume" in given or given.get("cfg") is None):
        name = checkpoint["cfg_name"] + ".cfg"
        input_hw = tuple(checkpoint["input_hw"])
        plan = parse_plan(checkpoint["cfg_text"], path=name, classes=len(class_names), input_hw=input_hw)
    else:
        plan = load_plan(given.get("cfg") or "yolov4-pico", classes=len(class_names))
    if not plan.heads or plan.net.channels != 3:
        raise UserError(f"{plan.path}: training needs [yolo] layers and channels=3")
    height, width = given.get("image_size") or plan.net.input_hw
    if height % max(plan.strides) or width % max(plan.strides):
        raise UserError(f"an input of {height}x{width} does not fit: sides must be multiples of {max(plan.strides)}")
    return plan.with_input_hw((height, width))


def check_batch(options: TrainOptions) -> None:
    batch = options.optim.batch_size
    parts = 1 if options.optim.subdivisions == "auto" else int(options.optim.subdivisions)
    if batch % parts:
        raise UserError(
            f"--batch-size {batch} is not divisible by --subdivisions {parts} (what is not typed is the cfg's)"
        )
    if batch % (parts * ranks.world_size()):
        raise UserError(
            f"--batch-size {batch}, which all processes share, is not divisible by {ranks.world_size()} processes with "
            f"--subdivisions {parts} each"
        )


def open_sets(given: dict[str, Any]) -> tuple[ImageSet, ImageSet]:
    """Training and validation split of the data set; the first rank makes what is made on first use."""
    data = given.get("data", "digits")
    if ranks.world_size() > 1:
        if ranks.is_rank_zero():
            open_image_set(data, given.get("train_split", "train"))
        ranks.broadcast(None)
    train_set = open_image_set(data, given.get("train_split", "train"))
    val_set = open_image_set(data, given.get("val_split", "val"))
    if len(train_set.labels) == 0:
        nothing = f"{data}: none of the {len(train_set)} images of '{train_set.split}' has an object"
        more = f"python -m data.doctor {data} says more"
        raise UserError("; ".join((nothing, *train_set.problems.summary(), more)))
    return train_set, val_set


def make_schedule(options: TrainOptions, plan: Plan, *, total_steps: int) -> Schedule:
    """A cfg's steps and burn-in are meant for its max_batches: a run of another length keeps their proportion, where
    none are typed.

    But of a run that is much shorter, burn-in may take a tenth: it is there for the random start, whatever follows.
    UserError where the policy misses a key in the cfg.
    """
    optim, net = options.optim, plan.net
    steps, burn_in_steps = optim.lr_steps, optim.burn_in_steps
    cfg_steps = net.max_batches or total_steps
    if steps is None:
        steps = tuple(step * total_steps // cfg_steps for step in net.steps)
    if burn_in_steps is None:
        in_proportion = net.burn_in_steps * total_steps // cfg_steps
        burn_in_steps = min(net.burn_in_steps, max(in_proportion, total_steps // 10))
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


def make_detector(options: TrainOptions, network: Network, class_names: tuple[str, ...]) -> Detector:
    """The network as evaluate.py uses it by default."""
    default = EvaluateOptions(weights="")
    return Detector(
        network=network,
        class_names=class_names,
        letterbox=options.augment.letterbox,
        confidence=default.confidence,
        nms_iou=default.nms_iou,
        max_detections=default.max_detections,
    )


def announce(job: Job, why_norm: str = "") -> None:
    """What is about to happen, in a few lines; and in the run's folder, all that is wrong with the data."""
    options, optim, plan = job.options, job.options.optim, job.plan
    written = parse_plan(plan.source_text, path=plan.path).classes
    if written != plan.classes:
        print(f"classes   {plan.classes} in the data, {written} in {plan.path}: the heads are re-sized")
    for warning in (*plan.warnings, *unread_settings(plan, options.loss.loss)):
        print(f"warning: {warning}")
    for image_set in (job.train_set, job.val_set):
        size = f"{len(image_set)} images, {len(image_set.labels)} objects"
        print(f"data      {image_set.name} {image_set.split}: {size}")
    images = (job.checkpoint or {}).get("train_images", len(job.train_set))
    if images != len(job.train_set):
        print(f"warning: there were {images} training images before: the epochs done are counted anew, by steps")
    if findings := quick_findings(job.train_set, job.val_set):
        for line in findings:
            print(f"warning: {line}")
        print(f"          python -m data.doctor {options.data}  says more, and what to do")
    if problems := [line for image_set in (job.train_set, job.val_set) for line in image_set.problems.lines()]:
        with warn_on_disk_error(job.folder / "data_problems.txt"):
            text = "\n".join(problems) + "\n"
            (job.folder / "data_problems.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    height, width = plan.net.input_hw
    parameters = f"{plan.parameter_count() / 1e6:.2f} M parameters"
    print(f"network   {plan.name} {height}x{width}, {plan.classes} classes, {parameters}")
    cut = {"mini_batch": job.mini_batch, "subdivisions": optim.subdivisions}
    print(f"norm      {describe_norm(options.norm, **cut)}")
    if why_norm:
        print(f"auto      {why_norm}")
    from_scratch = options.weights is None and options.resume is None
    if optim.freeze and from_scratch:
        print(f"warning: without --weights the {optim.freeze} frozen layers stay as random as they start")
    few = ENOUGH if why_norm else FEW  # auto has looked at that
    for warning in norm_warnings(options.norm, **cut, from_scratch=from_scratch, few=few):
        print(f"warning: {warning}")
    print(f"device    {describe(pick_device(options.device))['device']}")
    if ranks.world_size() > 1:
        share = optim.batch_size // ranks.world_size()
        print(f"processes {ranks.world_size()}, with {share} images of each batch on each")
    print(f"run       {job.folder}")
    changed = {name: value for name, value in flatten(options).items() if value is not None}
    print("settings  " + "  ".join(f"{name}={value}" for name, value in sorted(changed.items())))
