"""All layer types: each module of this room lists its own in SPECS."""

from __future__ import annotations

from cfg import convolution, pooling, resampling, same_shape, wiring, yolo
from cfg.parse import Section, did_you_mean
from cfg.spec import LayerSpec

LAYER_TYPES: dict[str, type[LayerSpec]] = {
    spec.kind: spec for family in (convolution, wiring, pooling, resampling, same_shape, yolo) for spec in family.SPECS
}

# The other layer types of darknet.
UNSUPPORTED = {
    "Gaussian_yolo": "a head that also predicts the uncertainty of each side",
    "batchnorm": "a separate batch norm",
    "connected": "a fully connected layer",
    "contrastive": "a loss on embeddings",
    "cost": "the loss of darknet's older classifiers",
    "crop": "cropping for classifiers",
    "detection": "the head of YOLOv1",
    "empty": "a layer that passes its input on",
    "history": "a memory of past frames",
    "implicit": "a learned constant",
    "local": "a convolution without shared weights",
    "local_avgpool": "a mean over windows",
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
