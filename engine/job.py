"""Parse a command line to a Job: settings, network plan and data set of a training."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfg.plan import Plan, load_plan, parse_plan
from cfg.settings import cfg_settings
from data.annotation_formats import BUILT_IN, open_image_set, splits_of
from data.domains import Domain, joined, unique_names
from data.image_set import ImageSet
from engine.amp import as_it_ran, choose_precision
from engine.auto_subdivisions import resolve_subdivisions
from engine.build import keeps_apart
from engine.recipe import LENGTHS, adamw_recipe, choose_optimizer, has_fixed_statistics, planned_steps
from models.norms.auto import choose_norm
from models.norms.old_spelling import respelled
from models.norms.options import norm_of_weights
from models.weights.start import knows_all, read_start
from options import FOREIGN_FLAGS, TrainOptions
from utils import ranks
from utils.checkpoint import RESUMABLE_FROM, Checkpoint
from utils.console import warn
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import current_names, parse_flags, resolve
from utils.run_folder import folder_of_job, free_folder, mark_folder, newest_run, writable_folder

# What may be typed beside --resume: where to compute and for how long, and where the data set is, which the numbers do
# not depend on, and what helps a training over a crisis.
RESUMABLE = {
    *("resume", "trust", "data", "val_data", "epochs", "time_budget", "patience", "save_minutes"),
    *("subdivisions", "learning_rate", "clip_norm", "amp", "albumentations"),
    *("device", "workers", "cache", "eval_backend"),
    *("checkpoint_activations", "offload_activations", "profile"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A training with every setting decided.

    domains: the data sets, of which train_set and val_set have all images. checkpoint: what it resumes from, None for a
    new run. origins: by name of a setting, where its value comes from: "typed", "cfg", "data", "weights" (to start
    from), "optimizer" (its recipe) or "run" (resumed); the others have their defaults. reasons: why `auto` chose what
    it did, by setting; none for what was typed.
    """

    options: TrainOptions
    plan: Plan
    domains: tuple[Domain, ...]
    train_set: ImageSet
    val_set: ImageSet
    checkpoint: Checkpoint | None
    origins: Mapping[str, str]
    reasons: Mapping[str, str]

    @property
    def mini_batch(self) -> int:
        """Images of one forward on one rank."""
        return images_per_forward(self.options, self.train_set)

    @property
    def forwards(self) -> int:
        """Mini-batches of one batch on one rank."""
        return min(int(self.options.optim.subdivisions), images_per_rank(self.options, self.train_set))


def parse_job(argv: Sequence[str] | None = None) -> Job:
    """Parse `sys.argv`, or `argv`. Raises UserError or CfgError for what is wrong."""
    return job_of(parse_flags(TrainOptions, argv, foreign=FOREIGN_FLAGS))


def job_of(given: dict[str, Any], sets: tuple[ImageSet, ImageSet] | None = None) -> Job:
    """Return the job of these settings, by name. Raises as `parse_job`.

    sets: the training and validation split, in place of those that the settings name.
    """
    if len(lengths := ["--" + name.replace("_", "-") for name in LENGTHS if name in given]) > 1:
        raise UserError(f"{' and '.join(lengths)} both set the length of the training: give one of them")
    if "data" in given:
        given = {**given, "data": paths_of(given["data"])}
    given = restore_after_restart(given)
    typed = given.keys()
    checkpoint, given = load_resume(given) if "resume" in given else (None, given)
    start = read_start(given["weights"], given.get("cfg")) if checkpoint is None and "weights" in given else None
    domains = open_domains(given) if sets is None else (Domain(name=sets[0].name, train_set=sets[0], val_set=sets[1]),)
    train_set, val_set = (joined([getattr(domain, name) for domain in domains]) for name in ("train_set", "val_set"))
    if checkpoint is not None and checkpoint.class_names != tuple(train_set.class_names):
        raise UserError(f"{given['resume']}: {_other_classes(checkpoint.class_names, train_set.class_names)}")
    plan = choose_plan(given, checkpoint or start, train_set.class_names)
    sources: dict[str, Mapping[str, Any]] = {"cfg": cfg_settings(plan, given.get("mosaic_geometry", "content"))}
    if not train_set.mirror_safe:
        sources["data"] = {"flip": False}
    if start is not None:
        norms = norm_of_weights(start.norm, given.get("norm"), given.get("norm_heads"))
        sources["weights"] = {**norms, "letterbox": start.letterbox}
        # What was typed, with what the weights fix of it, such as their groups.
        given = {**given, **{name: norms.get(name) for name in ("norm", "norm_heads") if name in given}}
    from_files = {name: value for source in sources.values() for name, value in source.items()}
    options = resolve(TrainOptions, given, from_files)
    optimizer, optimizer_reason = choose_optimizer(options, given, len(train_set))
    if optimizer == "adamw" and checkpoint is None:
        is_known = start is not None and plan.name == start.cfg_name and knows_all(start, train_set.class_names)
        start_of = {"knows_classes": is_known, "fixed_statistics": has_fixed_statistics(options.norm, plan)}
        recipe = adamw_recipe(options, given, plan.net, len(train_set), **start_of)
        sources["cfg"] = {name: value for name, value in sources["cfg"].items() if name not in recipe}
        sources["optimizer"] = recipe
        if is_known and optimizer_reason and "learning_rate" not in given:
            optimizer_reason += "; at a tenth of its rate, because the weights know all classes"
        from_files = {**from_files, **recipe}
    options = resolve(TrainOptions, {**given, "optimizer": optimizer}, from_files)
    check_batch(options, len(train_set))
    check_domains(options)
    check_shuffle(options, is_resumed=checkpoint is not None)
    options, precision_reason = choose_precision(options, plan)
    options = resolve_subdivisions(options, plan)
    forwards = min(int(options.optim.subdivisions), images_per_rank(options, train_set))
    mini_batch = images_per_statistic(options, train_set)
    norm, norm_reason = choose_norm(options.norm, mini_batch=mini_batch, forwards=forwards, plan=plan)
    if checkpoint is None and options.optim.time_budget is None:
        norm = norm.for_training(planned_steps(options.optim, len(train_set)))
    reasons = {"optimizer": optimizer_reason, "amp": precision_reason, "norm": norm_reason}
    sources |= {"run": given, "typed": {name: given[name] for name in typed}}
    return Job(
        options=replace(options, norm=norm),
        plan=plan,
        domains=domains,
        train_set=train_set,
        val_set=val_set,
        checkpoint=checkpoint,
        origins={name: origin for origin, source in sources.items() for name in source},
        reasons={name: reason for name, reason in reasons.items() if reason},
    )


def images_per_rank(options: TrainOptions, train_set: ImageSet) -> int:
    """Return one rank's images of a batch; a data set smaller than a batch makes a smaller one."""
    return max(1, min(options.optim.batch_size, len(train_set)) // ranks.world_size())


def images_per_statistic(options: TrainOptions, train_set: ImageSet) -> int:
    """Return the images of one forward on one rank that a norm sees together, of domains of equal size."""
    images = images_per_forward(options, train_set)
    is_split = options.norm.domain_statistics == "own" and options.domain_batches == "mixed"
    return max(1, images // len(options.data)) if is_split else images


def images_per_forward(options: TrainOptions, train_set: ImageSet) -> int:
    """Return the images of one forward on one rank."""
    share = images_per_rank(options, train_set)
    return share // min(int(options.optim.subdivisions), share)


def open_run(job: Job) -> Path:
    """Return the folder of the run: that of the resumed one, or a new one. Raises UserError if it is not writable."""
    if job.options.resume is not None:
        path = Path(job.options.resume)
        folder = path if path.is_dir() else path.parent
        if ranks.is_rank_zero():
            writable_folder(folder)
        return folder
    name, job_id = job.options.out, ranks.job_id()
    folder = Path()
    if ranks.is_rank_zero():
        # A job that torchrun restarted may have died before its first last.pt.
        is_own = ranks.restarts() > 0 and folder_of_job(job_id, name) is not None
        norms = [job.options.norm.norm, job.options.norm.norm_heads or ""]
        norm = re.sub(r",?burn_in_steps=\d+", "", ":".join(filter(None, norms)))
        norm = "-".join(re.findall(r"[^:,]+", norm))  # names with a colon are trouble on other systems
        default = f"{job.train_set.name}-{job.plan.name}-{norm}"
        folder = free_folder(name, default=default, may_hold_files=is_own)
        mark_folder(folder, job_id)
    return ranks.broadcast(folder)


def restore_after_restart(given: dict[str, Any]) -> dict[str, Any]:
    """Make a job that `torchrun --max-restarts` has restarted with the same command resume in its folder."""
    if not ranks.restarts() or "resume" in given:
        return given
    job_id = ranks.job_id()
    folder = ranks.broadcast(folder_of_job(job_id, given.get("out")) if ranks.is_rank_zero() else None)
    if folder is None or not ranks.broadcast((folder / "last.pt").exists()):
        return given
    kept = {name: value for name, value in given.items() if name in RESUMABLE} | {"resume": str(folder)}
    if kept.get("learning_rate") == "auto":  # last.pt has what was found
        del kept["learning_rate"]
    return kept


def load_resume(given: dict[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint to resume from, and its settings updated with what was typed now."""
    extra = set(given) - RESUMABLE
    if extra:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        raise UserError(f"--resume continues with the run's own settings: {flags} cannot be changed")
    if given.get("learning_rate") == "auto":
        raise UserError("--learning-rate auto is found before the first step; --resume can be told a number")
    path = Path(given["resume"]) if given["resume"] else newest_run()
    checkpoint = Checkpoint.from_file(path / "last.pt" if path.is_dir() else path)
    if checkpoint.format < RESUMABLE_FROM:
        raise UserError(
            f"{path}: its training was saved by an earlier version (format {checkpoint.format}) and cannot be "
            "resumed; start a new run from its weights with --weights"
        )
    if checkpoint.training is None:
        raise UserError(f"{path}: holds weights only; a run is resumed from its last.pt")
    if checkpoint.settings.get("norm_growth_steps"):
        raise UserError(f"{path}: --norm-growth-steps does not exist any more; start a new run with --weights")
    # Memory may have run out since the settings were made.
    settings = {"optimizer": "sgd", "val_fraction": 0, **respelled(current_names(TrainOptions, checkpoint.settings))}
    settings["subdivisions"] = checkpoint.training.subdivisions
    settings = as_it_ran(settings, pick_device({**settings, **given}.get("device", "auto")))
    if given.keys() & set(LENGTHS):  # in place of what set it before
        settings = {name: value for name, value in settings.items() if name not in LENGTHS}
    settings["data"] = paths_of(settings.get("data", BUILT_IN))
    for data in () if "data" in given else settings["data"]:
        if data != BUILT_IN and not os.path.exists(os.path.expanduser(data)):
            raise UserError(
                f"{path}: its data set {data} is not found from {Path.cwd()}; --data may name where it is now"
            )
    if len(paths_of(given.get("data", settings["data"]))) != len(settings["data"]):
        raise UserError(f"--data: the run has {len(settings['data'])} data sets; name as many, in their order")
    if given.get("albumentations", settings.get("albumentations")) != settings.get("albumentations"):
        warn("--albumentations names another pipeline than the run had: it is the new one from here on")
    return checkpoint, {**settings, **given, "resume": str(path)}


def choose_plan(given: dict[str, Any], checkpoint: Checkpoint | None, class_names: Sequence[str]) -> Plan:
    """Return the network's plan with heads for the data's classes: the checkpoint's, unless a new run names a cfg."""
    if checkpoint is not None and ("resume" in given or given.get("cfg") is None):
        name = checkpoint.cfg_name + ".cfg"
        plan = parse_plan(checkpoint.cfg_text, path=name, classes=len(class_names), input_hw=checkpoint.input_hw)
    else:
        plan = load_plan(given.get("cfg") or "yolov4-pico", classes=len(class_names))
    if not plan.heads or plan.net.channels not in (1, 3):
        raise UserError(f"{plan.path}: training needs [yolo] layers, and channels=3 or 1")
    height, width = given.get("image_size") or plan.net.input_hw
    if height % max(plan.strides) or width % max(plan.strides):
        raise UserError(f"an input of {height}x{width} does not fit: sides must be multiples of {max(plan.strides)}")
    return plan.with_input_hw((height, width))


def check_batch(options: TrainOptions, images: int) -> None:
    """Raise UserError if the batch cannot be divided among ranks and mini-batches.

    A data set smaller than a batch makes smaller ones: dividing those is enough, as after running out of memory.
    """
    batch, world_size = options.optim.batch_size, ranks.world_size()
    parts = 1 if options.optim.subdivisions == "auto" else int(options.optim.subdivisions)
    if batch % (parts * world_size) and min(batch, images) % (parts * world_size):
        by = (
            f"--subdivisions {parts}" if world_size == 1 else f"{world_size} processes with --subdivisions {parts} each"
        )
        raise UserError(f"--batch-size {batch} is not divisible by {by} (what is not typed comes from the cfg)")


def _other_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """Return in words how the classes of the data have changed."""
    if set(before) == set(now):
        return f"the data lists its classes in another order than it was trained with, {', '.join(before)}"
    gone, new = ([name for name in a if name not in b] for a, b in ((before, now), (now, before)))
    parts = [f"{kind} {', '.join(names[:5])}" for kind, names in (("without", gone), ("with", new)) if names]
    return f"was trained on other classes than the data has now ({' and '.join(parts)})"


def paths_of(data: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of the data sets; earlier checkpoints have a string."""
    return (data,) if isinstance(data, str) else data


def check_domains(options: TrainOptions) -> None:
    """Raise UserError for settings of domains without several data sets, and for what does not go with them."""
    norm = options.norm
    own = {"domain_batches": options.domain_batches != "mixed", "domain_statistics": norm.domain_statistics == "own"}
    own["domain_affine"] = norm.domain_affine == "own"
    typed = ["--" + name.replace("_", "-") for name, is_typed in own.items() if is_typed]
    if len(options.data) == 1:
        if typed:
            raise UserError(f"{typed[0]} is about several data sets: name them after --data")
        return
    if options.speed.compile and typed and not own["domain_batches"]:
        raise UserError("--compile would compile anew for each mixture of domains: take --domain-batches one with it")
    if norm.precise_bn and own["domain_affine"] and not own["domain_statistics"]:
        raise UserError(
            "--precise-bn needs --domain-statistics own if --domain-affine is: it measures one domain at a time"
        )


def check_shuffle(options: TrainOptions, *, is_resumed: bool) -> None:
    """Raise UserError for --shuffle-bn in a single process; only warn where a run of several goes on in one.

    And with domains that are kept apart: images would meet the norms of others, or ranks have unequal mini-batches.
    """
    if options.norm.shuffle_bn and keeps_apart(options):
        raise UserError(
            "--shuffle-bn goes with neither --domain-batches one nor --domain-statistics or --domain-affine own: "
            "images change places"
        )
    if not options.norm.shuffle_bn or ranks.world_size() > 1:
        return
    alone = "--shuffle-bn shuffles images among the processes that torchrun starts, and there is one"
    if not is_resumed:
        raise UserError(f"{alone}: leave it out")
    warn(f"{alone}: from here on nothing is shuffled")


def open_domains(given: dict[str, Any]) -> tuple[Domain, ...]:
    """Return the data sets, named apart. Raises UserError if a set is named twice, or another for validation."""
    paths = paths_of(given.get("data", BUILT_IN))
    if len(set(paths)) < len(paths):
        raise UserError("--data names a data set twice")
    if len(paths) > 1 and given.get("val_data"):
        raise UserError("--val-data is for a single --data: several are validated on their own splits")
    pairs = [open_sets({**given, "data": path}, takes_all=len(paths) == 1) for path in paths]
    known = {name for train_set, _ in pairs for name in train_set.class_names}
    if absent := [name for name in given.get("classes", ()) if name not in known]:
        raise UserError(f"--classes: no data set has a class '{absent[0]}'")
    names = unique_names([train_set.name for train_set, _ in pairs])
    return tuple(
        Domain(name=name, train_set=train_set, val_set=val_set)
        for name, (train_set, val_set) in zip(names, pairs, strict=True)
    )


def open_sets(given: dict[str, Any], *, takes_all: bool = True) -> tuple[ImageSet, ImageSet]:
    """Return the training and validation split of one data set; rank 0 makes what is made on first use.

    takes_all: whether it must have each of the classes that were asked for.
    """
    data = given.get("data", "digits")
    fraction = 0 if given.get("val_data") else given.get("val_fraction", TrainOptions().val_fraction)
    if ranks.world_size() > 1:
        if ranks.is_rank_zero():
            open_image_set(data, given.get("train_split", "train"), val_fraction=fraction)
        ranks.broadcast(None)
    train_set = open_image_set(data, given.get("train_split", "train"), val_fraction=fraction)
    if "val_fraction" in given and "resume" not in given and (given.get("val_data") or "val" in splits_of(data)):
        of = given.get("val_data") or f"the split 'val' of {data}"
        warn(f"--val-fraction is not used: {of} is what is evaluated")
    val_set = open_image_set(given.get("val_data") or data, given.get("val_split", "val"), val_fraction=fraction)
    if classes := given.get("classes"):
        known = [name for name in classes if takes_all or name in train_set.class_names]
        train_set = train_set.of_classes(known or classes)
        val_set = val_set.of_classes([name for name in classes if name in val_set.class_names] or classes)
    train_set.require_objects(data)
    val_set.require_objects(given.get("val_data") or data)
    return train_set, val_set
