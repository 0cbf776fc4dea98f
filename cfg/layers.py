"""The table of all layer types: the door to every spec."""

from __future__ import annotations

from cfg.convolution import ConvSpec
from cfg.parse import Section, did_you_mean
from cfg.pooling import AvgPoolSpec, DepthPoolSpec, LocalAvgPoolSpec, PoolSpec
from cfg.resampling import Reorg3dSpec, UpsampleSpec
from cfg.same_shape import ActivationSpec, ContrastiveSpec, CostSpec, DropoutSpec, EmptySpec, SoftmaxSpec
from cfg.spec import LayerSpec, Shape
from cfg.wiring import RouteSpec, SamSpec, ScaleChannelsSpec, ShortcutSpec
from cfg.yolo import YoloSpec

__all__ = [
    "LAYER_TYPES",
    "ActivationSpec",
    "AvgPoolSpec",
    "ContrastiveSpec",
    "ConvSpec",
    "CostSpec",
    "DepthPoolSpec",
    "DropoutSpec",
    "EmptySpec",
    "LayerSpec",
    "LocalAvgPoolSpec",
    "PoolSpec",
    "Reorg3dSpec",
    "RouteSpec",
    "SamSpec",
    "ScaleChannelsSpec",
    "Shape",
    "ShortcutSpec",
    "SoftmaxSpec",
    "UpsampleSpec",
    "YoloSpec",
    "read_layer",
]

_SPECS: tuple[type[LayerSpec], ...] = (
    *(ConvSpec, RouteSpec, ShortcutSpec, PoolSpec, UpsampleSpec, YoloSpec),
    *(SamSpec, ScaleChannelsSpec, Reorg3dSpec, AvgPoolSpec, LocalAvgPoolSpec),
    *(ActivationSpec, DropoutSpec, SoftmaxSpec, EmptySpec, CostSpec, ContrastiveSpec),
)
LAYER_TYPES: dict[str, type[LayerSpec]] = {spec.kind: spec for spec in _SPECS}

# The other layer types of darknet.
UNSUPPORTED = {
    "Gaussian_yolo": "a head that also predicts the uncertainty of each side",
    "batchnorm": "a separate batch norm",
    "connected": "a fully connected layer",
    "crop": "cropping for classifiers",
    "detection": "the head of YOLOv1",
    "history": "a memory of past frames",
    "implicit": "a learned constant",
    "local": "a convolution without shared weights",
    "normalization": "local response normalization",
    "region": "the head of YOLOv2",
    "reorg": "YOLOv2's reorganization, which differs from [reorg3d]",
    **dict.fromkeys(("rnn", "gru", "lstm", "crnn", "conv_lstm"), "a recurrent layer"),
}


def stops_backward(section: Section) -> bool:
    """Return whether no layer before this one learns (darknet's parser.c, parse_network_cfg_custom)."""
    return section.integer("stopbackward", 0) == 1


def read_layer(section: Section) -> LayerSpec:
    """Read the section of a layer. Raises CfgError, also for a name that is not in LAYER_TYPES."""
    name = section.name
    if name == "net":
        raise section.error("[net] can only be the first section")
    if name in UNSUPPORTED:
        raise section.error(f"[{name}], {UNSUPPORTED[name]}, is not supported")
    if name not in LAYER_TYPES:
        raise section.error(f"[{name}] is not a layer of darknet{did_you_mean(name, tuple(LAYER_TYPES))}")
    section.warn_unless(clip=0, onlyforward=0, dont_update=0, burnin_update=0)
    if not stops_backward(section):  # another value stops it only during the first batches, which is not implemented
        section.warn_unless(stopbackward=0)
    section.warn_unless(train_only_bn=0)
    section.ignore("dontload", "dontloadscales", "learning_rate")  # for layers with trained values
    return LAYER_TYPES[name].read(section)
