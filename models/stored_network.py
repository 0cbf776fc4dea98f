"""A network in a checkpoint: made into one, and built from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from cfg.plan import Plan, parse_plan
from models.network import Network
from models.norms.factory import NormFactory
from models.norms.options import NormOptions, stored_norm
from utils.checkpoint import Checkpoint
from utils.errors import UserError


def make_checkpoint(
    plan: Plan, norm: NormOptions, weights: Mapping[str, Tensor], *, class_names: tuple[str, ...], letterbox: bool
) -> Checkpoint:
    """Return the checkpoint from which `build_network` makes the same network again."""
    return Checkpoint(
        cfg_name=plan.name,
        cfg_text=plan.source_text,
        input_hw=plan.net.input_hw,
        letterbox=letterbox,
        class_names=class_names,
        norm=asdict(norm),
        weights=weights,
    )


def build_network(
    checkpoint: Checkpoint, *, path: str = "checkpoint", input_hw: tuple[int, int] | None = None
) -> Network:
    """Return the network that a checkpoint describes, with its averaged weights, in eval mode.

    Raises UserError, which names `path`, if the parts of the checkpoint do not fit each other.
    """
    try:
        plan = parse_plan(
            checkpoint.cfg_text,
            path=checkpoint.cfg_name + ".cfg",
            classes=len(checkpoint.class_names),
            input_hw=input_hw or checkpoint.input_hw,
        )
        options, domains = stored_norm(checkpoint.norm, plan), max(1, len(checkpoint.domains))
        network = Network(plan, NormFactory(options=options, domains=domains))
        network.load_state_dict(checkpoint.weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint does not describe its network ({error})") from error
    return network.eval()
