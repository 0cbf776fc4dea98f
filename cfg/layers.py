"""All layer types: each module of this room lists its own in SPECS."""

from __future__ import annotations

from cfg import convolution, pooling, resampling, same_shape, wiring, yolo
from cfg.parse import Section, did_you_mean
from cfg.spec import LayerSpec

LAYER_TYPES: dict[str, type[LayerSpec]] = {
    spec.kind: spec for family in (convolution, wiring, pooling, resampling, same_shape, yolo) for spec in family.SPECS
}

# What else a darknet cfg may hold.
UNSUPPORTED = {
    "Gaussian_yolo": "a head that also says how sure it is of each side",
    "batchnorm": "batch norm by itself",
    "connected": "a fully connected layer",
    "contrastive": "a loss on embeddings",
    "cost": "the loss of darknet's older classifiers",
    "crop": "a classifier's own cropping",
    "detection": "the head of YOLOv1",
    "empty": "a layer that passes its input on",
    "history": "a memory of past frames",
    "implicit": "a learned constant",
    "local": "a convolution without shared weights",
    "local_avgpool": "a mean over windows",
    "normalization": "local response normalization",
    "region": "the head of YOLOv2",
    "reorg": "YOLOv2's reorganisation, which is not that of [reorg3d]",
    **dict.fromkeys(("rnn", "gru", "lstm", "crnn", "conv_lstm"), "a recurrent layer"),
}


def stops_backward(section: Section) -> bool:
    """Whether no layer before this one learns (darknet's parser.c, parse_network_cfg_custom)."""
    return section.integer("stopbackward", 0) == 1


def read_layer(section: Section) -> LayerSpec:
    """Raises CfgError, also for a section name that is not in LAYER_TYPES."""
    name = section.name
    if name == "net":
        raise section.error("[net] can only be the first section")
    if name in UNSUPPORTED:
        raise section.error(f"[{name}], {UNSUPPORTED[name]}, is not supported")
    if name not in LAYER_TYPES:
        raise section.error(f"[{name}] is no layer of darknet's{did_you_mean(name, tuple(LAYER_TYPES))}")
    section.ignore_aloud(clip=0, onlyforward=0, dont_update=0, burnin_update=0)
    if not stops_backward(section):  # any other value stops it during the first so many batches, which is not done here
        section.ignore_aloud(stopbackward=0)
    section.ignore_aloud(train_only_bn=0)
    section.ignore("dontload", "dontloadscales", "learning_rate")  # about trained values; most layers have none
    return LAYER_TYPES[name].read(section)
