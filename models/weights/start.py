"""Starting a training from trained weights: every layer of them that fits its network is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from models.blocks import merge_conv_norm
from models.network import Network
from models.norms.table import stored_norm
from models.norms.weight_centralization import CentralizedConv2d
from models.weights.class_names import made_up_names
from models.weights.class_rows import by_class_name
from models.weights.layout import EPS
from models.weights.trained import is_darknet, read_darknet
from utils.checkpoint import Checkpoint
from utils.errors import UserError


def read_start(path: str, cfg: str | None) -> Checkpoint:
    """Read a checkpoint or a .weights file, which may hold the first layers only."""
    return read_darknet(path, cfg, whole=False)[0] if is_darknet(Path(path)) else Checkpoint.from_file(Path(path))


def start_from(path: str, cfg: str | None, network: Network, class_names: Sequence[str] | None = None) -> str:
    """Load matching weights into `network`; its heads may have other classes. Returns a summary.

    class_names: of the network's classes; rows of heads are matched by name with those of a checkpoint.
    Raises UserError if no layer fits.
    """
    if is_darknet(Path(path)):
        start, report, _ = read_darknet(path, cfg, whole=False)
        loaded, exceptions = _load_darknet(network, start.weights)
    else:
        start = Checkpoint.from_file(Path(path))
        weights, exceptions = _for_classes(start, network, class_names)
        loaded, fresh = load_matching(network, weights)
        report = f"{loaded} layers from {path}, {len(fresh)} re-initialized {' '.join(fresh[:4])}".rstrip()
    if loaded == 0:
        raise UserError(f"{path}: none of its layers fits this network")
    return "; ".join([report, *exceptions, *_change_of_filters(start, network)])


def load_matching(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[int, list[str]]:
    """Load every layer that fits as a whole. Returns how many, and the names of those that did not.

    For fine-tuning: another number of classes changes the heads' shapes, and they are re-initialized.
    """
    own = model.state_dict()
    layers = {name.rpartition(".")[0] for name in own}
    unfit = {n.rpartition(".")[0] for n, t in own.items() if n not in state or state[n].shape != t.shape}
    fitting = {n: t for n, t in state.items() if n in own and n.rpartition(".")[0] not in unfit}
    model.load_state_dict(fitting, strict=False)
    return len(layers - unfit), sorted(unfit)


def _for_classes(
    start: Checkpoint, network: Network, class_names: Sequence[str] | None
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the start's weights with heads for `class_names`, and a note if these differ from the start's own."""
    before = start.class_names
    if class_names is None or before in (tuple(class_names), made_up_names(len(before))):
        return start.weights, []
    weights, known = by_class_name(start.weights, before, network, class_names)
    if known is None:
        return weights, []
    rest = "" if known == len(class_names) else ", the heads' rows of the others are re-initialized"
    return weights, [f"{known} of {len(class_names)} classes are known by name{rest}"]


def _change_of_filters(start: Checkpoint, network: Network) -> list[str]:
    """Return a note if only one of the two uses centralized filters (models/norms/weight_centralization.py)."""
    before = stored_norm(start.norm).weight_centralization
    now = any(isinstance(module, CentralizedConv2d) for module in network.modules())
    if before == now:
        return []
    return [f"filters are {'' if now else 'no longer '}centralized from here on: the network computes something else"]


def _load_darknet(network: Network, state: Mapping[str, Tensor]) -> tuple[int, list[str]]:
    """Load matching layers. Returns how many fit, and notes about what did not.

    Where the network has a bias in place of a norm, batch norm is merged into convolution and bias.
    """
    own = network.state_dict()
    normalized = [name.removesuffix(".norm.running_var") for name in state if name.endswith(".norm.running_var")]
    biased = [layer for layer in normalized if f"{layer}.conv.bias" in own]
    for layer in biased:
        state = {**state, **_merged(state, layer)}
    loaded, fresh = load_matching(network, state)
    exceptions = []
    if other_size := [name for name in fresh if f"{name}.weight" in state]:
        exceptions.append(f"of another size in this network, so re-initialized: {' '.join(other_size)}")
    if biased:
        exceptions.append("batch norm is merged into weights and biases")
    if any(f"{layer}.norm.weight" in own and f"{layer}.norm.running_var" not in own for layer in normalized):
        exceptions.append("this norm has no running means and variances to load")
    return loaded, exceptions


def _merged(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return the merged weight and bias, in float32."""
    names = ("running_mean", "running_var", "weight", "bias")
    norm = {name: state[f"{layer}.norm.{name}"] for name in names}
    weight, bias = merge_conv_norm(state[f"{layer}.conv.weight"], norm, EPS)
    return {f"{layer}.conv.weight": weight.float(), f"{layer}.conv.bias": bias.float()}
