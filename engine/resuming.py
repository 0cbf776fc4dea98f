"""The settings of a training that goes on: those it had, and what may be typed beside `--resume`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from data.annotation_formats import BUILT_IN
from data.user_pipeline import transform_names
from engine.amp import as_it_ran
from engine.data_sets import paths_of
from engine.recipe import LENGTHS
from models.norms.old_spelling import respelled
from models.norms.table import parse_norm
from options import TrainOptions
from utils import ranks
from utils.checkpoint import RESUMABLE_FROM, Checkpoint
from utils.console import warn
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import current_names, flag_of, resolve
from utils.knob import check_limits
from utils.printable import printable
from utils.run_folder import folder_of_job, newest_run, own_folder

# What may be typed beside --resume: where to compute and for how long, and where the data set is, which the numbers do
# not depend on, and what helps a training over a crisis.
RESUMABLE = {
    *("resume", "trust", "data", "val_data", "epochs", "time_budget", "patience", "save_minutes"),
    *("subdivisions", "learning_rate", "clip_norm", "amp", "albumentations"),
    *("device", "workers", "cache", "eval_backend", "logger"),
    *("checkpoint_activations", "offload_activations", "profile"),
}


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
        flags = ", ".join(map(flag_of, sorted(extra)))
        raise UserError(f"--resume continues with the run's own settings: {flags} cannot be changed")
    if given.get("learning_rate") == "auto":
        raise UserError("--learning-rate auto is found before the first step; --resume can be told a number")
    path = Path(given["resume"]) if given["resume"] else newest_run()
    file = path / "last.pt" if path.is_dir() else path
    if ranks.is_rank_zero() and file.is_file():
        own_folder(file.parent)  # before it is read: another process may still be writing it
    checkpoint = Checkpoint.from_file(file)
    if ranks.is_rank_zero():
        check_run(checkpoint, file)
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
    settings = {"optimizer": "sgd", "val_fraction": 0, **current_names(TrainOptions, checkpoint.settings)}
    settings |= {"data": paths_of(settings.get("data", BUILT_IN)), "subdivisions": checkpoint.training.subdivisions}
    settings = checked(settings, path, device=given.get("device"))
    if given.keys() & set(LENGTHS):  # in place of what set it before
        settings = {name: value for name, value in settings.items() if name not in LENGTHS}
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


def checked(settings: dict[str, Any], path: Path, device: str | None) -> dict[str, Any]:
    """Return settings that were read from `path` in today's spelling. Raises UserError for one that cannot be.

    device: what was typed, in place of the settings' own.
    """
    try:
        settings = as_it_ran(respelled(settings), pick_device(device or settings.get("device", "auto")))
        options = resolve(TrainOptions, settings)
        for part in (options, *(getattr(options, each.name) for each in fields(options))):
            if is_dataclass(part):
                check_limits(part)
        parse_norm(options.norm.norm)
        if pipeline := options.augment.albumentations:
            transform_names(pipeline)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # whatever strange values trigger
        reason = printable(str(error).partition("\n")[0])
        raise UserError(f"{path}: its settings cannot be used ({reason})") from error
    return settings


def check_run(checkpoint: Checkpoint, file: Path) -> None:
    """Raise UserError if the settings.json or the best.pt beside the file are of another run than its checkpoint."""
    others = {}
    with suppress(OSError, ValueError, AttributeError):  # not there, or edited
        others["settings.json"] = json.loads((file.parent / "settings.json").read_text(encoding="utf-8")).get("run_id")
    if (best := file.with_name("best.pt")).is_file():
        others["best.pt"] = Checkpoint.from_file(best).run_id
    for name, run_id in others.items():
        if run_id and checkpoint.run_id and run_id != checkpoint.run_id:
            raise UserError(
                f"{file}: is of another run than {name} beside it; move what is not of this run out of the folder"
            )


def check_order(checkpoint: Checkpoint, domains: Sequence[str]) -> None:
    """Raise UserError if the data sets are those of the run in another order: their norms go by it."""
    before = list(checkpoint.domains)
    if before != list(domains) and set(before) == set(domains):
        raise UserError(f"--data: the run has the data sets in the order {', '.join(before)}; name them in this order")


def other_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """Return in words how the classes of the data have changed."""
    if set(before) == set(now):
        return f"the data lists its classes in another order than it was trained with, {', '.join(before)}"
    gone, new = ([name for name in a if name not in b] for a, b in ((before, now), (now, before)))
    parts = [f"{kind} {', '.join(names[:5])}" for kind, names in (("without", gone), ("with", new)) if names]
    return f"was trained on other classes than the data has now ({' and '.join(parts)})"
