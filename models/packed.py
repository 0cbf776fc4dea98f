"""A network for inference on a CPU: each convolution with its bias and activation is one operation of oneDNN.

The filters are laid out for it once, instead of in every forward, and activations stay channels last. torch's compiler
calls the same operations (`torch/_inductor/mkldnn_lowerings.py`), but takes longer to compile than most uses last.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cfg.convolution import ConvSpec
from models.blocks import ConvNormAct
from models.network import Network

_MISH_PART = 1 << 16  # values of which the intermediate results stay in the cache


def can_pack(network: Network) -> bool:
    """Return whether this torch has the operations, and the network is on a CPU and without norms (see `fold`)."""
    return (
        torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and all(parameter.device.type == "cpu" for parameter in network.parameters())
        and all(block.norm is None for block in network.layers if isinstance(block, ConvNormAct))
    )


@torch.no_grad()
def pack(network: Network, dtype: torch.dtype) -> Network:
    """Return a copy that takes images of this type, channels last: equal outputs to rounding."""
    packed = copy.deepcopy(network).eval().to(dtype)
    for node in packed.plan.nodes:
        if isinstance(node.spec, ConvSpec):
            block = packed.layers[node.index]
            assert isinstance(block, ConvNormAct)
            packed.layers[node.index] = PackedConv(block, (1, *node.input_shapes[0]))
    return packed


class PackedConv(nn.Module):
    """Convolution with a bias, activation and an optional blur. Other sizes than `input_shape` are right, but slower.

    input_shape: (N, C_in, H, W). The filters are an opaque tensor, which has no place in a state dict.
    """

    def __init__(self, block: ConvNormAct, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        conv = block.conv
        assert conv.bias is not None and isinstance(conv.padding, tuple)
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.filters = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self.geometry, input_shape)
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.fused, self.act = _fuse(block.act)
        self.blur = block.blur

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.filters, self.bias, *self.geometry, *self.fused)
        y = y if self.act is None else self.act(y)
        return y if self.blur is None else self.blur(y)


class _Mish(nn.Module):
    """Mish, in place: torch's own is slow on a CPU, where it takes a third of yolov4's time.

    With q = sigmoid(x), tanh(softplus(x)) = p / (2 - p) for p = q (2 - q). Computed in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        for part in torch.split(x.as_strided((x.numel(),), (1,)), _MISH_PART):  # dense in any memory format
            values = part.float()
            q = values.sigmoid()
            half = torch.addcmul(q, q, q, value=-0.5)  # of p
            part.copy_(half.div_(torch.sub(1, half, out=q)).mul_(values))
        return x


def _fuse(activation: nn.Module) -> tuple[tuple[str, list[float], str], nn.Module | None]:
    """Return what oneDNN computes with the convolution, and what is left to do after it."""
    match activation:
        case nn.Identity():
            return ("none", [], ""), None
        case nn.LeakyReLU():
            return ("leaky_relu", [activation.negative_slope], ""), None
        case nn.ReLU():
            return ("relu", [], ""), None
        case nn.SiLU():
            return ("swish", [], ""), None
        case nn.Sigmoid():
            return ("sigmoid", [], ""), None
        case nn.Mish():
            return ("none", [], ""), _Mish()
    return ("none", [], ""), activation
