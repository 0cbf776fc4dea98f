"""Parse a command line to a Job: settings, network plan and data sets of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfg.plan import Plan, load_plan, parse_plan
from cfg.settings import cfg_settings
from data.domains import Domain, joined
from data.image_set import ImageSet
from engine.amp import choose_precision
from engine.auto_subdivisions import resolve_subdivisions
from engine.build import check_network, check_pipeline, keeps_apart
from engine.data_sets import open_domains, paths_of
from engine.loggers import check_loggers
from engine.recipe import LENGTHS, adamw_recipe, choose_optimizer, has_fixed_statistics, planned_steps
from engine.resuming import check_order, load_resume, other_classes, restore_after_restart
from models.norms.auto import choose_norm
from models.norms.options import norm_of_weights, stored_norm
from models.norms.table import AUTO
from models.weights.published import find_weights
from models.weights.start import knows_all, read_start
from options import FOREIGN_FLAGS, TrainOptions
from utils import ranks
from utils.checkpoint import Checkpoint
from utils.console import warn
from utils.errors import UserError
from utils.flags import flag_of, parse_flags, resolve
from utils.run_folder import folder_of_job, free_folder, mark_folder


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
    if len(lengths := [flag_of(name) for name in LENGTHS if name in given]) > 1:
        raise UserError(f"{' and '.join(lengths)} both set the length of the training: give one of them")
    if "data" in given:
        given = {**given, "data": paths_of(given["data"])}
    given = restore_after_restart(given)
    if "weights" in given and "resume" not in given:  # a name stands for a path and a cfg
        found = zip(("weights", "cfg"), find_weights(given["weights"], given.get("cfg")), strict=True)
        given = {**given, **{name: value for name, value in found if value is not None}}
    typed = given.keys()
    checkpoint, given = load_resume(given) if "resume" in given else (None, given)
    start = read_start(given["weights"], given.get("cfg")) if checkpoint is None and "weights" in given else None
    domains = open_domains(given) if sets is None else (Domain(name=sets[0].name, train_set=sets[0], val_set=sets[1]),)
    train_set, val_set = (joined([getattr(domain, name) for domain in domains]) for name in ("train_set", "val_set"))
    if checkpoint is not None and checkpoint.class_names != tuple(train_set.class_names):
        raise UserError(f"{given['resume']}: {other_classes(checkpoint.class_names, train_set.class_names)}")
    if checkpoint is not None:
        check_order(checkpoint, [domain.name for domain in domains])
    plan = choose_plan(given, checkpoint or start, train_set.class_names)
    sources: dict[str, Mapping[str, Any]] = {"cfg": cfg_settings(plan, given.get("mosaic_geometry", "content"))}
    if not train_set.mirror_safe:
        sources["data"] = {"flip": False}
    default = {"norm": AUTO} if is_norm_open(given, sources["cfg"], start) else {}
    if start is not None:
        norms = norm_of_weights(start.norm, default.get("norm", given.get("norm")), given.get("norm_heads"))
        sources["weights"] = {**norms, "letterbox": start.letterbox}
        # What was typed, with what the weights fix of it, such as their groups.
        given = {**given, **{name: norms.get(name) for name in ("norm", "norm_heads") if name in given}}
    from_files = default | {name: value for source in sources.values() for name, value in source.items()}
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
    check_loggers(options.logger, is_typed="logger" in typed)
    check_shuffle(options, is_resumed=checkpoint is not None)
    options, precision_reason = choose_precision(options, plan)
    options = resolve_subdivisions(options, plan)
    forwards = min(int(options.optim.subdivisions), images_per_rank(options, train_set))
    mini_batch = images_per_statistic(options, train_set)
    norm, norm_reason = choose_norm(
        options.norm, mini_batch=mini_batch, forwards=forwards, from_weights=start is not None, plan=plan
    )
    if checkpoint is None and options.optim.time_budget is None:
        norm = norm.for_training(planned_steps(options.optim, len(train_set)))
    check_network(replace(options, norm=norm), plan)
    check_pipeline(options, plan, train_set)
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


def is_norm_open(given: Mapping[str, Any], cfg: Mapping[str, Any], start: Checkpoint | None) -> bool:
    """Return whether `--norm auto` chooses: neither what was typed, nor the cfg, nor weights ask for a norm.

    Weights of batch norm ask for none: any norm of statistics goes on with them. `--loss darknet` is as darknet is.
    """
    if given.keys() & {"norm", "norm_heads", "norm_eval"} or "norm" in cfg or given.get("loss") == "darknet":
        return False
    return start is None or ((stored := stored_norm(start.norm)).norm == "bn" and stored.norm_heads is None)


def images_per_rank(options: TrainOptions, train_set: ImageSet) -> int:
    """Return one rank's images of a batch; a data set smaller than a batch makes a smaller one."""
    return max(1, min(options.optim.batch_size, len(train_set)) // ranks.world_size())


def images_per_statistic(options: TrainOptions, train_set: ImageSet) -> int:
    """Return the images of one forward on one rank that a norm sees together, of domains of equal size."""
    images = images_per_forward(options, train_set)
    if options.domain_batches == "one":
        return max(1, min(images, images_per_rank(options, train_set) // len(options.data)))
    return max(1, images // len(options.data)) if options.norm.domain_statistics == "own" else images


def images_per_forward(options: TrainOptions, train_set: ImageSet) -> int:
    """Return the images of one forward on one rank."""
    share = images_per_rank(options, train_set)
    return share // min(int(options.optim.subdivisions), share)


def open_run(job: Job) -> Path:
    """Return the folder of the run: that of the resumed one, or a new one. Raises UserError if it is not writable."""
    if job.options.resume is not None:
        path = Path(job.options.resume)
        return path if path.is_dir() else path.parent
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


def check_domains(options: TrainOptions) -> None:
    """Raise UserError for settings of domains without several data sets, and for what does not go with them."""
    norm = options.norm
    own = {"domain_batches": options.domain_batches != "mixed", "domain_statistics": norm.domain_statistics == "own"}
    own["domain_affine"] = norm.domain_affine == "own"
    typed = [flag_of(name) for name, is_typed in own.items() if is_typed]
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
