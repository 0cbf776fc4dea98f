"""The lines that a training prints before its first step."""

from __future__ import annotations

from typing import Any

from cfg.plan import parse_plan
from cfg.settings import unread_settings
from data.balance import balance_in_words
from data.doctor.checkup import quick_findings
from data.user_pipeline import transform_names
from engine.amp import precision_in_words
from engine.build import keeps_apart
from engine.forecast import TIMED_STEPS, WARM_UP_STEPS
from engine.job import Job, images_per_rank, images_per_statistic
from engine.trainer import Trainer
from models.norms.auto import enough_images
from models.norms.effective_batch import FEW, burn_in_warnings, describe_norm, norm_warnings
from models.norms.parts import norm_parts, parts_in_words
from options import TrainOptions
from utils import ranks
from utils.atomic_file import warn_on_disk_error, write_text
from utils.console import counted, say, warn
from utils.environment import describe
from utils.flags import flag_of, flatten


def announce(run: Trainer) -> None:
    """Print norm, data, network, weights, optimizer, device, folder, and the settings that are not defaults.

    Write what is wrong with the data into the run's folder.
    """
    if not ranks.is_rank_zero():
        return
    job, options = run.job, run.job.options
    _announce_norm(job)  # first, because it is what this project is about, and by default chosen for the user
    _announce_data(run)
    _announce_network(job)
    if run.weights_loaded:
        say("weights", run.weights_loaded)
    if run.layers_frozen:
        say("freeze", run.layers_frozen)
        if options.weights is None and options.resume is None:
            warn(f"without --weights the {options.optim.freeze} frozen layers keep their random weights")
    say("optimizer", optimizer_in_words(job))
    if "optimizer" in job.reasons:
        say("", f"auto: {job.reasons['optimizer']}")
    if run.is_length_known:
        say("schedule", run.schedule.words())
        say("", epochs_in_words(run))
        for warning in (*burn_in_warnings(options.norm, job.plan, run.length.total_steps), *idle_settings(run)):
            warn(warning)
    else:
        say("schedule", f"the pace of the first steps decides how many fit into {options.optim.time_budget}")
    if run.patience.is_exhausted:
        warn(run.patience.words())
    elif job.checkpoint is not None and run.is_over:
        warn(f"the run has {run.steps_done} steps: nothing is left to train; --epochs with a larger number goes on")
    say("device", describe(run.device)["device"])
    if options.speed.offload_activations and run.device.type != "cuda":
        warn("--offload-activations has no effect without a CUDA GPU: activations are in host memory already")
    say("precision", precision_in_words(options) + (f": {job.reasons['amp']}" if "amp" in job.reasons else ""))
    say("run", str(run.folder))
    for number, line in enumerate(settings_lines(job)):
        say("" if number else "settings", line)


def epochs_in_words(run: Trainer) -> str:
    """40 epochs of 50 steps; the first AP comes after step 100; step 9 tells how long it takes"""
    length, step = run.length, run.steps_done
    text = f"{counted(length.epochs, 'epoch')} of {counted(length.epoch_steps, 'step')}"
    if step >= length.total_steps:
        return text
    first = "next" if length.evaluations(step // length.epoch_steps) else "first"
    text += f"; the {first} AP comes after step {length.next_evaluation(step):,}"
    told_at = step + WARM_UP_STEPS + TIMED_STEPS
    return f"{text}; step {told_at:,} tells how long it takes" if told_at < length.total_steps else text


def idle_settings(run: Trainer) -> list[str]:
    """Return a line for each setting that cannot do what it is there for, beside the others."""
    options, schedule = run.job.options, run.schedule
    augment, evaluations = options.augment, run.length.evaluations(run.length.epochs)
    rate = f"{schedule.base_rate:g}"
    idle = {
        "--close-mosaic has nothing to end: mosaic, mixup and cutmix are off": (
            augment.close_mosaic and not (augment.mosaic or augment.mixup or augment.cutmix)
        ),
        f"--patience {options.patience} cannot end the training early: it has {counted(evaluations, 'evaluation')}": (
            options.patience is not None and options.patience >= evaluations
        ),
        "the policy steps without --lr-steps is a constant rate": schedule.policy == "steps" and not schedule.steps,
        f"a burn-in of {counted(schedule.burn_in_steps, 'step')} is the whole training: the rate stays under {rate}": (
            schedule.burn_in_steps >= run.length.total_steps
        ),
        f"the learning rate grows from {rate} to --final-learning-rate {schedule.final_rate:g}": (
            schedule.policy in ("cosine", "sgdr") and schedule.final_rate > schedule.base_rate
        ),
    }
    return [line for line, is_so in idle.items() if is_so]


def optimizer_in_words(job: Job) -> str:
    """SGD, momentum 0.9, weight decay 0.0005; batch 16 = 8 forwards of 2"""
    optim, world_size = job.options.optim, ranks.world_size()
    share = images_per_rank(job.options, job.train_set)
    sizes = f"{job.mini_batch}" if share % job.forwards == 0 else f"{job.mini_batch} or {job.mini_batch + 1}"
    cut = f"{counted(job.forwards, 'forward')} of {sizes}"
    processes = f"{world_size} processes x " if world_size > 1 else ""
    rule = "AdamW" if optim.optimizer == "adamw" else f"SGD, momentum {optim.momentum:g}"
    return f"{rule}, weight decay {optim.weight_decay:g}; batch {share * world_size} = {processes}{cut}"


def settings_lines(job: Job) -> list[str]:
    """Return the settings that differ from the defaults, as flags one could type, in a line for each origin."""
    default = flatten(TrainOptions())
    flags: dict[str, list[str]] = {origin: [] for origin in ("typed", "cfg", "data", "weights", "optimizer", "run")}
    settings, optim = flatten(job.options), job.options.optim
    if optim.epochs or optim.time_budget:
        del settings["max_steps"]  # not in force
    for name, value in settings.items():
        if value is not None and value != default[name] and name in job.origins:
            flags[job.origins[name]].append(flag(name, value))
    lines = {origin: "  ".join(shown) for origin, shown in flags.items() if shown}
    return [line if origin == "typed" else f"from the {origin}: {line}" for origin, line in lines.items()]


def flag(name: str, value: Any) -> str:
    """Return a setting as typed on the command line: `--batch-size 8`, `--no-flip`, `--image-size 96x128`."""
    typed = flag_of(name)
    if isinstance(value, bool):
        return typed if value else typed.replace("--", "--no-", 1)
    if name == "albumentations":
        value = f"({transform_names(value)})"
    if isinstance(value, tuple):
        return f"{typed} {('x' if name == 'image_size' else ' ').join(map(str, value))}"
    return f"{typed} {value}"


def domains_in_words(job: Job) -> str:
    """digits, bccd: mini-batches of all of them, statistics own, affine part shared; mosaics within a domain"""
    options = job.options
    names, norm = ", ".join(domain.name for domain in job.domains), options.norm
    batches = "each mini-batch of one" if options.domain_batches == "one" else "mini-batches of all of them"
    joins = "; mosaics within a domain" if keeps_apart(options) else ""
    return f"{names}: {batches}, statistics {norm.domain_statistics}, affine part {norm.domain_affine}{joins}"


def _announce_data(run: Trainer) -> None:
    job, shares = run.job, run.loader.keys.shares
    pairs = [(domain, image_set) for domain in job.domains for image_set in (domain.train_set, domain.val_set)]
    sets = [image_set for _, image_set in pairs]
    for domain, image_set in pairs:
        name = domain.name if len(job.domains) > 1 else image_set.name
        size = f"{counted(len(image_set), 'image')}, {counted(len(image_set.labels), 'object')}"
        say("data", f"{name} {image_set.split}: {size}")
    if len(job.domains) > 1:
        say("domains", domains_in_words(job))
    if shares is not None:
        say("balance", balance_in_words(job.train_set, shares))
    before = None if job.checkpoint is None else job.checkpoint.train_images
    if before not in (None, len(job.train_set)):
        warn(f"the run had {before} training images before: the epochs done are recounted from its steps")
    for domain, data in zip(job.domains, job.options.data, strict=True):
        if findings := quick_findings(domain.train_set, domain.val_set):
            for finding in findings:
                warn(finding)
            say("", f"python -m data.doctor {data}  has details and remedies")
    for note in (f"{image_set.split}: {note}" for image_set in sets for note in image_set.problems.notes()):
        say("", note)
    if problems := [problem for image_set in sets for problem in image_set.problems.lines()]:
        path = run.folder / "data_problems.txt"
        with warn_on_disk_error(path):
            write_text(path, "\n".join(problems) + "\n")


def _announce_network(job: Job) -> None:
    plan, (height, width) = job.plan, job.plan.net.input_hw
    parameters = f"{plan.parameter_count() / 1e6:.2f} M parameters"
    say("network", f"{plan.name} {height}x{width}, {counted(plan.classes, 'class')}, {parameters}")
    classes_in_cfg = parse_plan(plan.source_text, path=plan.path).classes
    has_own_heads = job.checkpoint is not None or (job.options.weights is not None and job.options.cfg is None)
    if classes_in_cfg != plan.classes and not has_own_heads:
        say("", f"{counted(plan.classes, 'class')} in the data, {classes_in_cfg} in {plan.path}: the heads are resized")
    for warning in (*plan.warnings, *unread_settings(plan, job.options.loss.loss)):
        warn(warning)


def _announce_norm(job: Job) -> None:
    options, norm = job.options, job.options.norm
    cut = {"mini_batch": images_per_statistic(options, job.train_set), "subdivisions": job.forwards}
    parts = norm_parts(norm, job.plan)
    lines = [f"auto: {job.reasons['norm']}"] if "norm" in job.reasons else []
    lines += [parts_in_words(parts)] if len(parts) > 1 else []
    lines += [describe_norm(part.options, **cut) for part in parts]
    for number, line in enumerate(lines):
        say("" if number else "norm", line)
    from_scratch = options.weights is None and options.resume is None
    few = enough_images(from_weights=options.weights is not None) if "norm" in job.reasons else FEW
    warnings = [norm_warnings(part.options, **cut, from_scratch=from_scratch, few=few) for part in parts]
    for warning in dict.fromkeys(line for lines in warnings for line in lines):
        warn(warning)
