"""Starting a training from trained weights: every layer of them that fits its network is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from cfg.plan import parse_plan
from models.blocks import merge_conv_norm
from models.network import Network
from models.norms.domains import for_all_domains, has_domains, plain_state
from models.norms.factory import NormFactory
from models.norms.options import stored_norm
from models.norms.parts import norm_parts
from models.norms.used_weight import ReparametrizedConv2d, filters_of
from models.weights.layout import EPS
from models.weights.trained import is_darknet, made_up_names, read_darknet
from utils.checkpoint import Checkpoint
from utils.errors import UserError

_BOX = range(5)  # x, y, w, h and objectness, which come before an anchor's classes


def read_start(path: str, cfg: str | None) -> Checkpoint:
    """Read a checkpoint or a .weights file, which may hold the first layers only."""
    return read_darknet(path, cfg, whole=False)[0] if is_darknet(Path(path)) else Checkpoint.from_file(Path(path))


def knows_all(start: Checkpoint, class_names: Sequence[str]) -> bool:
    """Return whether the start has heads for all of these classes, so that in its network none begins at random."""
    plan = parse_plan(start.cfg_text, path=start.cfg_name + ".cfg")
    heads = [f"layers.{plan.nodes[index].inputs[0]}.conv.weight" for index in plan.heads]
    names_fit = set(class_names) <= set(start.class_names) or start.class_names == made_up_names(len(class_names))
    return names_fit and all(head in start.weights for head in heads)


def start_from(
    path: str,
    cfg: str | None,
    network: Network,
    class_names: Sequence[str] | None = None,
    domains: Sequence[str] = (),
) -> str:
    """Load matching weights into `network`; its heads may have other classes. Returns a summary.

    class_names, domains: of the network; rows of heads, and the norms of domains, are matched by name with those of a
    checkpoint. A domain that it lacks begins with the norms of its first.
    Raises UserError if no layer fits.
    """
    if is_darknet(Path(path)):
        start, report, _ = read_darknet(path, cfg, whole=False)
        loaded, exceptions = _load_darknet(network, for_all_domains([start.weights], network))
    else:
        start = Checkpoint.from_file(Path(path))
        weights, exceptions = _for_classes(start, network, class_names)
        states = [weights]
        if has_domains(weights):
            sources = {name: name if name in start.domains else start.domains[0] for name in domains or start.domains}
            states = [plain_state(weights, start.domains.index(source)) for source in sources.values()]
            exceptions += [f"{name} begins with the norms of {source}" for name, source in sources.items()]
        weights = for_all_domains(states, network)
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


def by_class_name(
    state: Mapping[str, Tensor], before: Sequence[str], network: Network, now: Sequence[str]
) -> tuple[Mapping[str, Tensor], int | None]:
    """Convert a state for the classes `before` to one for the classes `now` of `network`.

    Returns it, and how many classes `now` were found; None if no head could be converted.

    The convolution before a [yolo] has anchors * (5 + classes) filters. Rows of new classes are those of `network`.
    Heads that differ in more than their classes are not changed.
    """
    rows = {name: len(_BOX) + row for row, name in enumerate(before)}
    known = {len(_BOX) + row: rows[name] for row, name in enumerate(now) if name in rows}
    to_rows, from_rows = [*_BOX, *known], [*_BOX, *known.values()]
    own, heads = network.state_dict(), {}
    for source, spec in zip(network.head_inputs, network.plan.head_specs, strict=True):
        layer, anchors = f"layers.{source}.", len(spec.mask)
        for name in (name for name in own if name.startswith(layer) and name in state):
            filter_shape = own[name].shape[1:]
            if state[name].shape == (anchors * (len(_BOX) + len(before)), *filter_shape):
                weight = own[name].reshape(anchors, -1, *filter_shape).clone()
                stored = state[name].to(weight).reshape(anchors, -1, *filter_shape)
                weight[:, to_rows] = stored[:, from_rows]
                heads[name] = weight.flatten(0, 1)
    return {**state, **heads}, len(known) if heads else None


def _change_of_filters(start: Checkpoint, network: Network) -> list[str]:
    """Return a note if the two use their filters in different ways (models/norms/used_weight.py)."""
    plan = parse_plan(start.cfg_text, path=start.cfg_name + ".cfg")
    kinds = [NormFactory(options=part.options).conv_class for part in norm_parts(stored_norm(start.norm, plan), plan)]
    before = next((kind.adjective for kind in kinds if issubclass(kind, ReparametrizedConv2d)), "")
    now = filters_of(network)
    if before == now:
        return []
    return [f"filters are {now or f'no longer {before}'} from here on: the network computes something else"]


def _load_darknet(network: Network, state: Mapping[str, Tensor]) -> tuple[int, list[str]]:
    """Load matching layers. Returns how many fit, and notes about what did not.

    Where the network has a bias in place of a norm, batch norm is merged into convolution and bias.
    """
    own = network.state_dict()
    normalized = [name.removesuffix(".norm.running_var") for name in state if name.endswith(".norm.running_var")]
    biased = [layer for layer in normalized if f"{layer}.conv.bias" in own]
    for layer in biased:
        norm = {n: state[f"{layer}.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")}
        weight, bias = merge_conv_norm(state[f"{layer}.conv.weight"], norm, EPS)
        state = {**state, f"{layer}.conv.weight": weight.float(), f"{layer}.conv.bias": bias.float()}
    loaded, fresh = load_matching(network, state)
    exceptions = []
    known = [name for name in fresh if f"{name}.weight" in state]
    other_size = [name for name in known if own[f"{name}.weight"].shape != state[f"{name}.weight"].shape]
    if other_size:
        exceptions.append(f"of another size in this network, so re-initialized: {' '.join(other_size)}")
    if more := [name for name in known if name not in other_size]:
        exceptions.append(f"with parameters that batch norm has not, so re-initialized: {' '.join(more)}")
    if biased:
        exceptions.append("batch norm is merged into weights and biases")
    if any(f"{layer}.norm.weight" in own and f"{layer}.norm.running_var" not in own for layer in normalized):
        exceptions.append("this norm has no running means and variances to load")
    return loaded, exceptions
