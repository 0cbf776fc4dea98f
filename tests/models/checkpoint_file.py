"""A checkpoint file of a tiny network that finds many things, for tests of what is done with detectors."""

from __future__ import annotations

from pathlib import Path

from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.stored_network import make_checkpoint
from tests.e2e.conftest import TOY_CFG
from utils.checkpoint import Checkpoint


def write_checkpoint(
    path: Path, *, class_names: tuple[str, ...] = ("person", "dog", "cat"), norm: str = "bn", letterbox: bool = True
) -> Checkpoint:
    """Write one with random weights and statistics."""
    plan, options = parse_plan(TOY_CFG, path="toy.cfg", classes=len(class_names)), NormOptions(norm=norm)
    network = Network(plan, norm_factory(options))
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    checkpoint = make_checkpoint(plan, options, state, class_names=class_names, letterbox=letterbox)
    checkpoint.to_safetensors(path) if path.suffix == ".safetensors" else checkpoint.to_file(path)
    return checkpoint
