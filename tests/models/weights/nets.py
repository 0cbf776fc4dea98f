"""Small networks with every kind of layer that has something in a .weights file, and what tests do with them."""

from __future__ import annotations

from pathlib import Path

import torch

from cfg.plan import Plan, parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions

# Batch norm and none, groups, a blur, weighted shortcuts of both kinds, layers without weights between them; in the
# end a route, so that the last layer of the file is not the last of the network.
SMALL = """
[net]
width=16
height=16
batch=8
subdivisions=4
letter_box=1
[convolutional]
batch_normalize=1
filters=4
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=4
size=1
activation=mish
[shortcut]
from=-2
weights_type=per_channel
weights_normalization=softmax
[maxpool]
size=2
stride=1
[convolutional]
batch_normalize=1
antialiasing=1
filters=8
groups=2
size=3
stride=2
pad=1
activation=swish
[convolutional]
batch_normalize=1
filters=8
size=1
activation=linear
[shortcut]
from=-2,5
weights_type=per_feature
[convolutional]
filters=21
activation=linear
[yolo]
mask=0,1,2
anchors=2,3, 4,5, 6,7
classes=2
[route]
layers=6
"""


def plan_of(text: str = SMALL, name: str = "small.cfg") -> Plan:
    return parse_plan(text, path=name)


def network_of(plan: Plan, options: NormOptions | None = None) -> Network:
    """Nothing in it is what a fresh network has."""
    network = Network(plan, norm_factory(options or NormOptions()))
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.4, 0.4)
    return network.eval()


def heads_of(network: Network) -> torch.Tensor:
    """All logits for one image, always the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        heads = network(torch.rand(1, 3, *network.plan.net.input_hw, generator=generator))
    return torch.cat([head.logits.flatten() for head in heads])


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
