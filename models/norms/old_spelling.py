"""Earlier spellings: a norm's options were flags of their own, `--norm cmbn --norm-carry`, and settings of their own.

Checkpoints keep what they were written with; `respelled` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX = "norm_"
# Earlier setting -> the norms that had it, with a value to show.
_OPTIONS = {
    "norm_gradient": "cmbn:gradient=darknet or cbn:gradient=share",
    "norm_carry": "cmbn:carry",
    "norm_window": "cbn:window=8",
    "norm_estimator": "cbn:estimator=taylor",
    "norm_burn_in_steps": "cbn:burn_in_steps=200",
    "norm_growth_steps": "",
    "norm_refresh_steps": "cbn-lite:refresh_steps=8",
    "norm_positions": "cbn:positions=0",
    "norm_average_images": "mabn:average_images=32",
    "norm_r_max": "brn:r_max=2",
    "norm_d_max": "brn:d_max=3",
    "norm_ramp_steps": "brn:ramp_steps=200",
    "norm_groups": "gn:groups=8",
    "norm_running": "bn:running=pooled",
    "norm_sync": "cmbn:sync",
}


def removed_flags() -> dict[str, str]:
    """Return what to type instead of each earlier flag."""
    return {
        f"--{name.replace('_', '-')}": f"write --norm {example}" if example else "it was removed"
        for name, example in _OPTIONS.items()
    }


def respelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with one `norm` string in place of the earlier ones; others and newer ones as they are."""
    kept = {name: value for name, value in settings.items() if name not in _OPTIONS}
    options = {n.removeprefix(_PREFIX): settings[n] for n in _OPTIONS if settings.get(n) is not None}
    options.pop("growth_steps", None)
    if not options or ":" in kept.get("norm", ""):
        return kept
    norm, parts = kept["norm"], []
    if norm == "cmbn" and options.get("burn_in_steps") == (100 if options.get("carry") else 0):
        del options["burn_in_steps"]
    if norm == "cmbn" and options.get("gradient", "weights") != "weights":
        options = {name: value for name, value in options.items() if name in ("gradient", "sync")}
    for name, value in options.items():
        if isinstance(value, bool):
            parts += [name] * value
        else:
            parts.append(f"{name}={value}")
    return {**kept, "norm": f"{norm}:{','.join(parts)}" if parts else norm}
