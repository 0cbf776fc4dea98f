"""Writing a network as a darknet .weights file: what darknet computes with it is what the network computes.

Source: darknet `parser.c`, save_weights_upto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cfg.convolution import ConvSpec
from cfg.plan import Plan
from models.blocks import ConvNormAct
from models.network import Network
from models.norms.running_stats import has_running_statistics, is_batch_norm
from models.norms.used_weight import used_weight
from models.weights.layout import EPS, StoredLayer, place, stored_layers
from models.weights.reader import Header
from utils.atomic_file import atomic_write
from utils.errors import UserError


def write_weights(path: Path, network: Network, *, seen: int) -> None:
    """Write all layers, with darknet's header 0.2.5; `seen` counts images.

    Raises UserError, and writes nothing, for a norm that is not batch norm in inference, and for values that no reader
    accepts.
    """
    plan = network.plan
    write_state(path, plan, stored_layers(plan), darknet_state(network), seen=seen)


def write_state(
    path: Path, plan: Plan, layers: Sequence[StoredLayer], state: Mapping[str, Tensor], *, seen: int
) -> None:
    """Write some of the plan's layers. state: of `darknet_state` or a reader."""
    blobs = [Header(seen=seen).to_bytes()]
    for layer in layers:
        for array in layer.arrays:
            if array.name not in state:
                raise UserError(f"{path}: cannot be written, there are no {array.word} for {place(plan, layer.node)}")
            values = state[array.name].numpy().astype("<f4", copy=False)
            assert values.shape == array.shape
            if fault := array.fault_of(values):
                raise UserError(f"{path}: cannot be written, in {place(plan, layer.node)} {fault}")
            blobs.append(values.tobytes())
    with atomic_write(path) as file:
        file.writelines(blobs)


@torch.no_grad()
def darknet_state(network: Network) -> dict[str, Tensor]:
    """Return the state dict of a Network with batch norm and eps 1e-5 that computes the same; on the CPU."""
    state = {name: tensor.detach().cpu().float() for name, tensor in network.state_dict().items()}
    for node in network.plan.nodes:
        if not isinstance(node.spec, ConvSpec):
            continue
        where, block = place(network.plan, node), network.layers[node.index]
        assert isinstance(block, ConvNormAct)
        # Centralized and standardized filters are stored as they are used.
        state[f"layers.{node.index}.conv.weight"] = used_weight(block.conv).detach().cpu().float()
        if node.spec.batch_normalize:
            state[f"layers.{node.index}.norm.running_var"] = _variance_for_darknet(block.norm, where)
    return state


def _variance_for_darknet(norm: nn.Module | None, where: str) -> Tensor:
    """Return the variance that with darknet's eps of 1e-5 equals the norm's with its own eps."""
    if norm is None:
        raise UserError(f"{where}: has a bias in place of the cfg's batch norm (--norm none)")
    if not is_batch_norm(norm):
        fault = "is not batch norm in inference" if has_running_statistics(norm) else "has no running statistics"
        raise UserError(f"{where}: {type(norm).__name__} {fault}; darknet has batch norm only")
    assert isinstance(norm.running_var, Tensor) and isinstance(norm.eps, float)
    variance = norm.running_var.detach().cpu()
    if norm.eps == EPS:
        return variance.float()
    moved = variance.double() + (norm.eps - EPS)
    if moved.min() < 0:
        raise UserError(
            f"{where}: a variance of {variance.min():g} with eps {norm.eps:g} is less than darknet's eps of {EPS:g}"
        )
    return moved.float()
