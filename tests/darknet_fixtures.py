"""Outputs of darknet itself, and the networks they are of, in the folder `shared` beside the checkout."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfg.plan import load_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.weights.reader import read_weights


def write_weights(fixtures: Path, cfg: Path, weights: Path, facts: Mapping[str, Any]) -> None:
    """The .weights file that darknet had, by the fixtures' own recipe. facts: of a fixture's json."""
    spec = importlib.util.spec_from_file_location("recipe", fixtures / "recipe.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    gains = {name: facts[name] for name in ("seed", "gain", "res_gain", "out_gain")}
    sha256, _ = recipe.make_weights(str(cfg), str(weights), **gains)
    assert sha256 == facts["weights_sha256"]


def network_of(cfg: Path, weights: Path, input_hw: tuple[int, int]) -> Network:
    network = Network(load_plan(str(cfg), input_hw=input_hw), norm_factory(NormOptions(norm="bn"))).eval()
    network.load_state_dict(read_weights(weights, network.plan).state)
    return network


def dog(fixtures: Path) -> torch.Tensor:
    """(1, 3, 96, 128)"""
    return torch.from_numpy(np.load(fixtures / "input_dog.npz")["dog_128x96_chw"])[None]
