"""The training settings in a cfg file, under the names of the options, and those that training does not use."""

from __future__ import annotations

import math

from cfg.convolution import ConvSpec
from cfg.plan import Plan

Setting = bool | int | float | str | tuple[float, ...]


def cfg_settings(plan: Plan, mosaic_geometry: str = "content") -> dict[str, Setting]:
    """Return the cfg's settings by option name, without those that are off or have no value.

    With darknet's mosaic geometry they include `mosaic_bound`, `max_boxes` and darknet's limits on boxes.
    """
    net, head = plan.net, plan.head_specs[-1]  # darknet reads augmentation from the last [yolo]
    settings: dict[str, Setting | None] = {
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
        # 1 lets layers share memory for gradients, which is how autograd works; from 2 on activations are on the host.
        "offload_activations": net.optimized_memory >= 2 or None,
        "ema_decay": net.ema_alpha or None,
        "multi_scale": 1.4 if head.random == 1 else head.random or None,
        "mosaic": 0.5 if net.mosaic else 0.0,
        "mixup": 0.5 if net.mixup and not net.mosaic else 0.0,  # darknet does one of them, to half of the images
        "flip": net.flip,
        "letterbox": net.letter_box,
        "jitter": head.jitter,
        "resize": max(head.resize, 1 / head.resize) if head.resize else 1.0,
        "saturation": max(net.saturation, 1.0),
        "exposure": max(net.exposure, 1.0),
        "hue": net.hue,
    }
    if mosaic_geometry == "darknet":
        settings |= {"mosaic_bound": net.mosaic_bound, "max_boxes": head.max_boxes}
        settings |= {"min_visibility": 0.0, "min_side_px": 1.0}
    if any(isinstance(node.spec, ConvSpec) and node.spec.batch_normalize == 2 for node in plan.nodes):
        settings["norm"] = "cmbn"
    return {name: value for name, value in settings.items() if value is not None}


# Keys of [yolo] that only --loss darknet reads -> values that need no warning: darknet's defaults, and the max_delta of
# its YOLOv4 cfgs, which clips a gradient that autograd does not compute.
DARKNET_LOSS_KEYS: dict[str, tuple[Setting, ...]] = {
    "focal_loss": (False,),
    "truth_thresh": (1.0,),
    "max_delta": (math.inf, 5.0, 2.0),
    "counters_per_class": ((),),
    "delta_normalizer": (1.0,),
}


def unread_settings(plan: Plan, loss: str) -> list[str]:
    """Return a warning for each key of the cfg that has no effect with this loss."""
    if loss == "darknet":
        return []
    lines = []
    for key, silent in DARKNET_LOSS_KEYS.items():
        places = [plan.nodes[i].line for i in plan.heads if getattr(plan.nodes[i].spec, key) not in silent]
        if places:
            lines.append(f"{plan.path}:{places[0]}: {key} has no effect with --loss {loss}, only with --loss darknet")
    return lines
