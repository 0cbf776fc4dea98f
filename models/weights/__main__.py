"""python -m models.weights: conversion between checkpoints of this project and darknet's .weights files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cfg.parse import CfgError
from cfg.plan import Plan, load_plan
from models.norms.own import trust
from models.weights.convert import write_darknet
from models.weights.layout import stored_layers
from models.weights.published import PUBLISHED, find_weights
from models.weights.reader import read_weights
from models.weights.trained import is_darknet, read_trained
from models.weights.writer import write_state
from utils.console import say
from utils.errors import UserError, exit_on_error


def list_published() -> None:
    """List the weights that --weights knows by name, and which of them are on this machine."""
    print(f"{'--weights':<20}{'network':<26}{'size':>9}")
    for name, weights in PUBLISHED.items():
        file, network = weights.file, weights.network + (" (--cfg FILE)" if weights.needs_cfg else "")
        state = "in the cache" if file.place.is_file() else ""
        print(f"{name:<20}{network:<26}{file.size_bytes / 1e6:>6.1f} MB  {state}".rstrip())
    print(f"\n--weights NAME downloads what is not in the cache, which is {file.place.parent}")


def convert(source: Path, target: Path, cfg: str | None, names: str | None, domain: str | None) -> None:
    """Convert a .weights file with --cfg to a checkpoint, or a checkpoint to .weights with .cfg and .names."""
    _check_target(target)
    source, cfg = _found(source, cfg)
    is_weights = is_darknet(source)
    if is_weights and cfg is None and source.with_suffix(".cfg").is_file():
        cfg = str(source.with_suffix(".cfg"))
    if target.suffix == (".weights" if is_weights else ".pt"):
        result = "a checkpoint: call it .pt" if is_weights else "darknet's: call it .weights"
        raise UserError(f"{target}: what is made of {source} is {result}")
    checkpoint, origin = read_trained(str(source), cfg=cfg, names=names, domain=domain)
    if is_weights:
        checkpoint.to_file(target)
        print(*origin, sep="\n")
        say("written", f"{target}; next: python detect.py --weights {target} IMAGES")
    else:
        weights, cfg_file, names_file = write_darknet(target, checkpoint, source=str(source))
        say("written", f"{weights}, {cfg_file} and {names_file}: what darknet needs")


def partial(source: Path, target: Path, cfg: str | None, layers: int) -> None:
    """Copy the first layers of a .weights file, to start a training from."""
    _check_target(target)
    source, plan = _darknets(source, cfg)
    if not 1 <= layers <= len(plan.nodes):
        raise UserError(f"--layers {layers}: {plan.path} has 1 to {len(plan.nodes)} layers")
    first = [layer for layer in stored_layers(plan) if layer.node.index < layers]
    if not first:
        raise UserError(f"--layers {layers}: none of these layers of {plan.path} has weights")
    # 0 images seen, as `darknet partial` writes it.
    write_state(target, plan, first, read_weights(source, plan).state, seen=0)
    say("written", f"{target}: layers 0 to {layers - 1}, {target.stat().st_size:,} bytes")


def info(source: Path, cfg: str | None) -> None:
    """Print what a .weights file holds."""
    source, plan = _darknets(source, cfg)
    weights = read_weights(source, plan)
    header = weights.header
    say("version", f"{header.major}.{header.minor}.{header.revision}, {header.seen:,} images seen")
    say("weights", weights.report)


def main(argv: Sequence[str] | None = None) -> None:
    given = vars(_parser().parse_args(argv))
    for module in (given.pop("trust", None) or "").split(","):
        if module:
            trust(module)
    given.pop("command")(**given)


def _check_target(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: already exists")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")


def _found(source: Path, cfg: str | None) -> tuple[Path, str | None]:
    found, cfg = find_weights(str(source), cfg)
    return Path(found), cfg


def _darknets(source: Path, cfg: str | None) -> tuple[Path, Plan]:
    """Return the path of a .weights file, and its network."""
    source, cfg = _found(source, cfg)
    if not is_darknet(source):
        raise UserError(f"{source}: is a checkpoint: convert it first")
    if cfg is None:
        raise UserError(f"{source}: darknet's weights do not describe their network: name its cfg with --cfg")
    return source, load_plan(cfg)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.weights", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cfg: dict[str, Any] = {"metavar": "CFG", "help": "the network: a darknet .cfg, or the name of one in cfg/"}

    def command(run: Callable[..., None], *files: str) -> argparse.ArgumentParser:
        """Add the command that `run` is; its docstring is the help. files: how its help names them."""
        added = commands.add_parser(run.__name__.partition("_")[0], help=run.__doc__, description=run.__doc__)
        added.set_defaults(command=run)
        for name, metavar in zip(("source", "target"), files, strict=False):
            added.add_argument(name, type=Path, metavar=metavar)
        return added

    command(list_published)
    converting = command(convert, "FROM", "TO")
    converting.add_argument("--cfg", **cfg)
    converting.add_argument("--names", metavar="FILE", help="names of the classes, one a line (default: COCO's 80)")
    converting.add_argument("--trust", metavar="MODULES", help="import these modules of yours, whose norms it may have")
    converting.add_argument("--domain", metavar="NAME", help="of a checkpoint that has several: whose norms to take")
    cutting = command(partial, "FROM", "TO")
    cutting.add_argument("--cfg", **cfg)
    cutting.add_argument("--layers", type=int, required=True, metavar="N", help="how many, counted as in the cfg")
    command(info, "FILE").add_argument("--cfg", **cfg)
    return parser


if __name__ == "__main__":
    # A write that fails (no space, no rights) is for the user to fix, too.
    exit_on_error(lambda: main(sys.argv[1:]), (UserError, CfgError, OSError))
