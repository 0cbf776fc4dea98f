"""A slow reader of darknet cfgs, without anything from cfg/: it counts parameters, and makes networks narrow.

`PYTHONPATH=. python tests/reference/darknet_cfg.py FOLDER` narrows every cfg of FOLDER into tests/golden/cfg/narrow.
"""

from __future__ import annotations

import sys
from pathlib import Path

NARROW = Path(__file__).parents[1] / "golden" / "cfg" / "narrow"
FACTOR = 8  # filters, and groups of convolutions, are divided by it: sums of channels stay sums
INPUT_PX = 64  # every official network's strides divide it
CLASSES = 2

FULL_NAMES = {"conv": "convolutional", "max": "maxpool"}

# What defines the network; the rest is about training, loss and NMS.
KEPT = {
    "net": ("width", "height", "channels"),
    "convolutional": (
        *("batch_normalize", "filters", "size", "stride", "stride_x", "stride_y", "pad", "padding"),
        *("dilation", "groups", "antialiasing", "activation"),
    ),
    "route": ("layers", "groups", "group_id"),
    "shortcut": ("from", "activation", "weights_type", "weights_normalization"),
    "maxpool": ("size", "stride", "stride_x", "stride_y", "padding", "maxpool_depth", "out_channels", "antialiasing"),
    "upsample": ("stride", "scale"),
    "reorg3d": ("stride",),
    "sam": ("from", "activation"),
    "scale_channels": ("from", "scale_wh", "activation"),
    "avgpool": (),
    "dropout": ("probability",),
    "softmax": ("groups", "temperature"),
    "yolo": ("mask", "anchors", "classes", "num", "scale_x_y", "new_coords"),
}

DEFAULTS = {
    "convolutional": {"size": "1", "stride": "1", "groups": "1"},
    "shortcut": {"activation": "linear"},
    "maxpool": {"stride": "1"},
    "softmax": {"groups": "1"},
    "yolo": {"scale_x_y": "1.0"},
}

Section = tuple[str, dict[str, str]]


def read_sections(text: str) -> list[Section]:
    """(name, keys) in file order; of equal keys the first."""
    sections: list[Section] = []
    for raw in text.split("\n"):
        line = "".join(raw.split())
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            name = line.strip("[]")
            sections.append((FULL_NAMES.get(name, name), {}))
        else:
            key, _, value = line.partition("=")
            sections[-1][1].setdefault(key, value)
    return sections


def count_parameters(text: str) -> int:
    """Weights; biases or betas; gammas; weights of shortcuts."""
    (_, net), *layers = read_sections(text)
    channels: list[int] = []
    total = 0
    for index, (name, keys) in enumerate(layers):
        before = channels[-1] if channels else int(net["channels"])
        after = before
        if name == "convolutional":
            after, size, groups = (int(keys.get(key, 1)) for key in ("filters", "size", "groups"))
            total += after * (before // groups) * size * size
            total += after  # biases, or betas
            if keys.get("batch_normalize", "0") != "0":
                total += after  # gammas
        elif name == "route":
            after = 0
            for source in keys["layers"].split(","):
                after += channels[int(source) % index] // int(keys.get("groups", 1))
        elif name == "shortcut":
            inputs = 1 + len(keys["from"].split(","))
            total += inputs * {"none": 0, "per_feature": 1, "per_channel": before}[keys.get("weights_type", "none")]
        elif name == "reorg3d":
            after = before * int(keys["stride"]) ** 2
        elif name == "scale_channels":
            after = channels[int(keys["from"]) % index]
        else:
            assert name in KEPT, f"[{name}] is not counted here"
        channels.append(after)
    return total


def narrow(text: str) -> str:
    """The same layers with an eighth of the filters, two classes and a small input, in the fewest words."""
    sections = read_sections(text)
    lines = []
    for index, (name, keys) in enumerate(sections):
        kept = {key: value for key, value in keys.items() if key in KEPT[name]}
        following, head = sections[index + 1] if index + 1 < len(sections) else ("", {})
        if name == "net":
            kept |= {"width": str(INPUT_PX), "height": str(INPUT_PX)}
        elif name == "yolo":
            kept["classes"] = str(CLASSES)
        elif name == "convolutional" and following == "yolo":
            kept["filters"] = str(len(head["mask"].split(",")) * (5 + CLASSES))
        elif name == "convolutional":
            kept["filters"] = _divided(kept["filters"])
            if int(kept.get("groups", 1)) > 1:
                kept["groups"] = _divided(kept["groups"])
        short = {full: short for short, full in FULL_NAMES.items()}.get(name, name)
        said = {key: value for key, value in kept.items() if DEFAULTS.get(name, {}).get(key) != value}
        lines += [f"[{short}]", *(f"{key}={value}" for key, value in said.items())]
    return "\n".join(lines) + "\n"


def _divided(count: str) -> str:
    assert int(count) % FACTOR == 0
    return str(int(count) // FACTOR)


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.cfg")):
        (NARROW / path.name).write_text(narrow(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
