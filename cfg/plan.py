"""A cfg as a graph of layers with absolute input indices and static shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from cfg.convolution import ConvSpec
from cfg.layers import read_layer, stops_backward
from cfg.net import NetSpec
from cfg.parse import CfgError, Section, did_you_mean, parse_sections
from cfg.resampling import UpsampleSpec
from cfg.spec import MAX_CHANNELS, MAX_SIDE_PX, LayerSpec, Shape, ShapeError, check_extent
from cfg.yolo import YoloSpec

HERE = Path(__file__).parent
MAX_FILE_BYTES = 4 * 2**20
MAX_PARAMETERS = 2**29  # 2 GiB in float32; the largest YOLOv4, P7, has 0.29e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One layer of the graph. inputs: absolute indices, -1 is the network's input; line: where its section begins."""

    index: int
    line: int
    spec: LayerSpec
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape

    @property
    def parameter_count(self) -> int:
        """Trained values; running statistics are not trained."""
        return self.spec.parameter_count(self.input_shapes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A network before it is built.

    source_text is the cfg as read, before any resizing. frozen_layers: how many first layers do not learn, because the
    layer after them has stopbackward=1.
    """

    name: str
    source_text: str
    path: str
    net: NetSpec
    nodes: tuple[Node, ...]
    warnings: tuple[str, ...]
    frozen_layers: int = 0

    @property
    def heads(self) -> tuple[int, ...]:
        """Indices of the [yolo] layers, in file order."""
        return tuple(node.index for node in self.nodes if isinstance(node.spec, YoloSpec))

    @property
    def head_specs(self) -> tuple[YoloSpec, ...]:
        return tuple(node.spec for node in self.nodes if isinstance(node.spec, YoloSpec))

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a network without heads."""
        return self.head_specs[0].classes if self.head_specs else 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell, one per head."""
        return tuple(self.net.height // self.nodes[i].shape.height for i in self.heads)

    @property
    def size_step_px(self) -> int:
        """Step between input sizes that divide evenly down to each head and each map that is upsampled later.

        It is a multiple of the cfg's resize_step, which is 32 by default.
        """
        enlarged = (node.inputs[0] for node in self.nodes if isinstance(node.spec, UpsampleSpec))
        deep = (index for index in (*self.heads, *enlarged) if index >= 0)
        return math.lcm(self.net.resize_step, *(self.net.height // self.nodes[i].shape.height for i in deep))

    @property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Ascending indices of the layers that read each layer."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in sorted(set(node.inputs) - {-1}):
                readers[source].append(node.index)
        return tuple(map(tuple, readers))

    def parameter_count(self) -> int:
        """Return the number of trained values: weights, biases or betas, gammas; no running statistics."""
        return sum(node.parameter_count for node in self.nodes)

    def with_input_hw(self, input_hw: tuple[int, int]) -> Plan:
        """Return the plan for another input (height, width) in pixels. Raises CfgError."""
        net = _resized(self.path, self.net, input_hw)
        layers = [(node.line, node.spec) for node in self.nodes]
        return replace(self, net=net, nodes=_wire(self.path, net, layers))


def load_plan(name_or_path: str, *, classes: int | None = None, input_hw: tuple[int, int] | None = None) -> Plan:
    """Read a cfg file, or one of those beside this file by its bare name, such as `yolov4-tiny`.

    `yolov4-tiny.cfg` is one of those, too, unless the user has a file of that name. Raises CfgError, also if the file
    cannot be read.
    """
    try:
        path = _find(name_or_path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CfgError(f"{path}:1: more than {MAX_FILE_BYTES} bytes, so it is not a cfg")
        # Comments of old cfgs may be in any encoding; the rest is ASCII.
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CfgError(f"{name_or_path}:1: cannot be read, {error.strerror}") from error
    return parse_plan(text, path=str(path), classes=classes, input_hw=input_hw)


def parse_plan(text: str, *, path: str, classes: int | None = None, input_hw: tuple[int, int] | None = None) -> Plan:
    """Parse a cfg. Raises CfgError.

    path: used in messages and for the plan's name. classes: resizes every head and the convolution that feeds it.
    input_hw: (height, width) in pixels, instead of the cfg's.
    """
    first, *sections = parse_sections(text, path=path)
    if first.name != "net":
        raise first.error(f"the first section must be [net], not [{first.name}]")
    net = NetSpec.read(first)
    if input_hw is not None:
        net = _resized(path, net, input_hw)
    if not sections:
        raise first.error("no layer follows [net]")
    specs = [read_layer(section) for section in sections]
    if classes is not None:
        specs = _with_classes(specs, sections, classes)
    _check_heads(specs, sections)
    layers = [(section.line, spec) for section, spec in zip(sections, specs, strict=True)]
    nodes = _wire(path, net, layers)
    warnings = [line for section in (first, *sections) for line in section.warnings(first.used)]
    warnings += _norm_warnings(path, nodes)
    plan = Plan(
        name=Path(path).stem,
        source_text=text,
        path=path,
        net=net,
        nodes=nodes,
        warnings=tuple(warnings),
        frozen_layers=max((index for index, section in enumerate(sections) if stops_backward(section)), default=0),
    )
    _check_new_coords(plan)
    return plan


def cfg_names() -> tuple[str, ...]:
    """Return the bare names that `load_plan` knows, sorted."""
    return tuple(sorted(path.stem for path in HERE.glob("*.cfg")))


def _wire(path: str, net: NetSpec, layers: list[tuple[int, LayerSpec]]) -> tuple[Node, ...]:
    nodes: list[Node] = []
    network_input = Shape(net.channels, net.height, net.width)
    parameters = 0
    for index, (line, spec) in enumerate(layers):
        try:
            inputs = _checked_sources(spec, index, nodes)
            shapes = tuple(network_input if i == -1 else nodes[i].shape for i in inputs)
            shape = spec.output_shape(shapes)
            parameters += spec.parameter_count(shapes)
            check_extent(shape)
            if parameters > MAX_PARAMETERS:
                raise ShapeError(f"more than {MAX_PARAMETERS} parameters")
        except ShapeError as error:
            raise CfgError(f"{path}:{line}: layer {index}: {error}") from error
        nodes.append(Node(index=index, line=line, spec=spec, inputs=inputs, input_shapes=shapes, shape=shape))
    return tuple(nodes)


def _checked_sources(spec: LayerSpec, index: int, nodes: list[Node]) -> tuple[int, ...]:
    sources = spec.sources(index)
    for source in sources:
        if not (0 <= source < index or source == index - 1 == -1):
            raise ShapeError(f"refers to a layer that is not among the {index} before it")
        if source >= 0 and isinstance(nodes[source].spec, YoloSpec):
            raise ShapeError(f"reads layer {source}, a [yolo], which ends its branch")
    return sources


def _resized(path: str, net: NetSpec, input_hw: tuple[int, int]) -> NetSpec:
    height, width = input_hw
    if not (1 <= height <= MAX_SIDE_PX and 1 <= width <= MAX_SIDE_PX):
        raise CfgError(f"{path}:1: an input of {height}x{width} is not within 1..{MAX_SIDE_PX} pixels")
    return replace(net, height=height, width=width)


def _with_classes(specs: list[LayerSpec], sections: list[Section], classes: int) -> list[LayerSpec]:
    """Give every [yolo] `classes` classes, and the convolution before it the filters they need."""
    resized = list(specs)
    for index, spec in enumerate(specs):
        if not isinstance(spec, YoloSpec):
            continue
        head = replace(spec, classes=classes)
        if classes != spec.classes and spec.counters_per_class:
            head = replace(head, counters_per_class=())
            sections[index].note(f"counters_per_class has {spec.classes} classes and is ignored", "counters_per_class")
        feeder = specs[index - 1] if index else None
        if not 1 <= classes <= MAX_CHANNELS or head.channels > MAX_CHANNELS:
            raise sections[index].error(f"{classes} classes is not within 1..{MAX_CHANNELS // len(head.mask) - 5}")
        if not isinstance(feeder, ConvSpec):
            raise sections[index].error("[yolo] can be resized only right after a [convolutional]")
        resized[index - 1 : index + 1] = [replace(feeder, filters=head.channels), head]
    return resized


def _check_heads(specs: list[LayerSpec], sections: list[Section]) -> None:
    """Raise CfgError at the line to fix: the filters of the convolution before a [yolo], not the [yolo]."""
    heads = [(index, spec) for index, spec in enumerate(specs) if isinstance(spec, YoloSpec)]
    for index, head in heads:
        feeder = specs[index - 1]
        if index and isinstance(feeder, ConvSpec) and feeder.filters != head.channels:
            raise sections[index - 1].error(
                f"filters={feeder.filters}, but the [yolo] after it needs {head.channels}, "
                f"{len(head.mask)} anchors * (5 + {head.classes} classes)",
                "filters",
            )
        first = heads[0][1]
        if head.classes != first.classes:
            raise sections[index].error(f"classes={head.classes}, but the first [yolo] has {first.classes}", "classes")


def _check_new_coords(plan: Plan) -> None:
    """Check that a [yolo] with new_coords=1, which has no logistic of its own, follows a logistic convolution."""
    for index, head in zip(plan.heads, plan.head_specs, strict=True):
        if not head.new_coords:
            continue
        feeder = plan.nodes[max(0, index - 1)]  # the [yolo] itself if it is the first layer
        spec = feeder.spec
        if not isinstance(spec, ConvSpec) or spec.activation != "logistic" or spec.antialiasing:
            need = "a [convolutional] with activation=logistic before it"
            raise CfgError(f"{plan.path}:{feeder.line}: layer {index}, a [yolo] with new_coords=1, needs {need}")
        if len(plan.consumers[index - 1]) > 1:
            where, found = f"{plan.path}:{plan.nodes[index].line}", f"layer {index - 1} has another reader"
            raise CfgError(f"{where}: {found} than its [yolo] with new_coords=1")


def _norm_warnings(path: str, nodes: tuple[Node, ...]) -> list[str]:
    """Warn of a mix of BN and CmBN: one norm is built for the whole network, where darknet has one per layer."""
    convolutions = [(node.line, node.spec) for node in nodes if isinstance(node.spec, ConvSpec)]
    lines = {spec.batch_normalize: line for line, spec in convolutions if not spec.norm}
    if not {1, 2} <= lines.keys():
        return []
    return [f"{path}:{lines[1]}: batch_normalize is 1 here and 2 in line {lines[2]}: all layers get the same norm"]


def _find(name_or_path: str) -> Path:
    own, is_cfg = Path(name_or_path), name_or_path.endswith(".cfg")
    shipped = [HERE / f"{name_or_path.removesuffix('.cfg')}.cfg"] if own.name == name_or_path else []
    for path in [own, *shipped] if is_cfg else [*shipped, own]:
        if path.is_file():
            return path
    if is_cfg or not shipped:
        raise CfgError(f"{name_or_path}: no such file")
    names = cfg_names()
    raise CfgError(f"{name_or_path}: no such cfg among {', '.join(names)}{did_you_mean(name_or_path, names)}")
