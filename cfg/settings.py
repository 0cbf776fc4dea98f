"""What a cfg file says of training: its words as the trainer's settings, and those that training does not hear."""

from __future__ import annotations

import math
from typing import Any

from cfg.convolution import ConvSpec
from cfg.plan import Plan


def cfg_settings(plan: Plan, mosaic_geometry: str = "content") -> dict[str, Any]:
    """What the cfg file says, under the names of the options; keys that it leaves at 'nothing' are left out.

    With darknet's mosaic geometry it is heard on `mosaic_bound` and `max`, too, and darknet's limits for boxes hold.
    """
    net, head = plan.net, plan.head_specs[-1]  # darknet reads augmentation from the last [yolo]
    said: dict[str, Any] = {
        "batch_size": net.batch,
        "subdivisions": net.subdivisions,
        "learning_rate": net.learning_rate,
        "final_learning_rate": net.learning_rate_min if net.policy == "sgdr" else None,
        "lr_policy": net.policy,
        "lr_scales": net.scales or None,
        "momentum": net.momentum,
        "weight_decay": net.decay,
        "freeze": plan.frozen_layers or None,
        "max_steps": net.max_batches or None,
        "ema_decay": net.ema_alpha or None,
        "multi_scale": 1.4 if head.random == 1 else head.random or None,
        "mosaic": 0.5 if net.mosaic else 0.0,
        "flip": net.flip,
        "letterbox": net.letter_box,
        "jitter": head.jitter,
        "resize": max(head.resize, 1 / head.resize) if head.resize else 1.0,
        "saturation": max(net.saturation, 1.0),
        "exposure": max(net.exposure, 1.0),
        "hue": net.hue,
    }
    if mosaic_geometry == "darknet":
        said |= {"mosaic_bound": net.mosaic_bound, "max_boxes": head.max_boxes}
        said |= {"min_visibility": 0.0, "min_side_px": 1.0}
    if any(isinstance(node.spec, ConvSpec) and node.spec.batch_normalize == 2 for node in plan.nodes):
        said["norm"] = "cmbn"
    return {name: value for name, value in said.items() if value is not None}


# Keys of [yolo] that --loss darknet alone reads, and their values not worth a warning: darknet's defaults, and the
# max_delta of its YOLOv4 cfgs, which clips a gradient that autograd does not make.
DARKNET_LOSS_KEYS: dict[str, tuple[Any, ...]] = {
    "focal_loss": (False,),
    "truth_thresh": (1.0,),
    "max_delta": (math.inf, 5.0, 2.0),
    "counters_per_class": ((),),
    "delta_normalizer": (1.0,),
}


def unread_settings(plan: Plan, loss: str) -> list[str]:
    """A line for each key with which the cfg asks something of training that this loss does not do."""
    if loss == "darknet":
        return []
    lines = []
    for key, silent in DARKNET_LOSS_KEYS.items():
        places = [plan.nodes[i].line for i in plan.heads if getattr(plan.nodes[i].spec, key) not in silent]
        if places:
            lines.append(f"{plan.path}:{places[0]}: {key} has no effect with --loss {loss}, only with --loss darknet")
    return lines
