"""python -m models.weights: between checkpoints of this project and darknet's .weights files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cfg.parse import CfgError
from cfg.plan import load_plan
from models.weights.convert import write_darknet
from models.weights.layout import stored_layers
from models.weights.reader import read_weights
from models.weights.trained import is_darknet, read_trained
from models.weights.writer import write_state
from utils.errors import UserError, exit_on_error


def convert(source: Path, target: Path, cfg: str | None, names: str | None) -> None:
    """What `source` is decides the direction."""
    _check_target(target)
    is_darknets = is_darknet(source)
    if target.suffix == (".weights" if is_darknets else ".pt"):
        made = "a checkpoint: call it .pt" if is_darknets else "darknet's: call it .weights"
        raise UserError(f"{target}: what is made of {source} is {made}")
    checkpoint, origin = read_trained(str(source), cfg=cfg, names=names)
    if is_darknets:
        checkpoint.to_file(target)
        print(*origin, f"written   {target}; next: python detect.py --weights {target} IMAGES", sep="\n")
    else:
        weights, cfg_file, names_file = write_darknet(target, checkpoint, source=str(source))
        print(f"written   {weights}, {cfg_file} and {names_file}: what darknet needs")


def partial(source: Path, target: Path, cfg: str, layers: int) -> None:
    """As `darknet partial`: the first layers of a network, and nothing seen."""
    _check_target(target)
    _check_darknets(source)
    plan = load_plan(cfg)
    if not 1 <= layers <= len(plan.nodes):
        raise UserError(f"--layers {layers}: {plan.path} has 1 to {len(plan.nodes)} layers")
    first = [layer for layer in stored_layers(plan) if layer.node.index < layers]
    if not first:
        raise UserError(f"--layers {layers}: none of these layers of {plan.path} has weights")
    write_state(target, plan, first, read_weights(source, plan).state, seen=0)
    print(f"written   {target}: layers 0 to {layers - 1}, {target.stat().st_size:,} bytes")


def info(source: Path, cfg: str) -> None:
    _check_darknets(source)
    weights = read_weights(source, load_plan(cfg))
    header = weights.header
    print(f"version   {header.major}.{header.minor}.{header.revision}, {header.seen:,} images seen")
    print(f"weights   {weights.report}")


def main(argv: Sequence[str] | None = None) -> None:
    given = vars(_parser().parse_args(argv))
    given.pop("command")(**given)


def _check_target(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: is there already")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")


def _check_darknets(source: Path) -> None:
    if not is_darknet(source):
        raise UserError(f"{source}: is a checkpoint: convert it first")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.weights", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cfg = {"metavar": "CFG", "help": "the network: a darknet .cfg, or the name of one in cfg/"}

    text = "a .weights file with --cfg into a checkpoint; a checkpoint into a .weights file with its .cfg and .names"
    command = commands.add_parser("convert", help=text, description=text)
    command.set_defaults(command=convert)
    command.add_argument("source", type=Path, metavar="FROM")
    command.add_argument("target", type=Path, metavar="TO")
    command.add_argument("--cfg", **cfg)
    command.add_argument("--names", metavar="FILE", help="names of the classes, one a line (default: COCO's 80)")

    text = "the first layers of a .weights file, to start a training from"
    command = commands.add_parser("partial", help=text, description=text)
    command.set_defaults(command=partial)
    command.add_argument("source", type=Path, metavar="FROM")
    command.add_argument("target", type=Path, metavar="TO")
    command.add_argument("--cfg", required=True, **cfg)
    command.add_argument("--layers", type=int, required=True, metavar="N", help="how many, counted as in the cfg")

    text = "what a .weights file holds"
    command = commands.add_parser("info", help=text, description=text)
    command.set_defaults(command=info)
    command.add_argument("source", type=Path, metavar="FILE")
    command.add_argument("--cfg", required=True, **cfg)
    return parser


if __name__ == "__main__":
    # A write that fails (no space, no rights) is the user's to mend, too.
    exit_on_error(lambda: main(sys.argv[1:]), (UserError, CfgError, OSError))
