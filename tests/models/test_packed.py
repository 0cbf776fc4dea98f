"""A packed network computes what the network of plain modules computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cfg.plan import parse_plan
from models.activations import ACTIVATIONS
from models.detector import Detector
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.fold import fold
from models.norms.options import NormOptions
from models.packed import _Mish, can_pack, pack
from models.predictor import TorchPredictor, fast_predictor
from models.stored_network import make_checkpoint
from models.yolo.postprocess import DetectionOptions
from utils.errors import UserError

LAYERS = """[net]
height=32
width=64
channels={channels}

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation={activation}

[convolutional]
filters=6
groups=2
size=3
stride=1
pad=1
antialiasing={blur}
activation={activation}

[convolutional]
filters=7
size=1
activation=linear

[yolo]
mask=0
anchors=10,14
classes=2
"""


def network_of(text: str, norm: str = "bn") -> Network:
    network = Network(parse_plan(text, path="test.cfg"), norm_factory(NormOptions(norm=norm))).train()
    with torch.no_grad():
        network(torch.rand(4, 3, 32, 64))  # statistics other than 0 and 1
    return network.eval()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "hardtan"])
def test_a_packed_network_has_the_same_outputs(activation: str) -> None:
    network = fold(network_of(LAYERS.format(channels=3, activation=activation, blur=0)))
    for size in ((32, 64), (64, 32)):  # the second is not the one it was packed for
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            (plain,) = network(images)
            (packed,) = pack(network, torch.float32)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(packed.logits, plain.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "blur"), [(1, 0), (3, 2)])
def test_grey_and_blurred_networks_are_packed(channels: int, blur: int) -> None:
    network = fold(network_of(LAYERS.format(channels=channels, activation="mish", blur=blur)))
    images = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        (plain,) = network(images)
        (packed,) = pack(network, torch.float32)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(packed.logits, plain.logits, rtol=1e-4, atol=1e-5)


def test_packing_leaves_the_network_as_it_was() -> None:
    network = fold(network_of(LAYERS.format(channels=3, activation="leaky", blur=0)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pack(network, torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, (1 << 16) + 3])
def test_the_quick_mish_is_mish(dtype: torch.dtype, count: int) -> None:
    ends = torch.tensor([-1e30, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1e30])
    values = torch.cat((ends, torch.randn(count) * 5)).to(dtype).view(1, 1, 1, -1)
    exact = F.mish(values.double())
    torch.testing.assert_close(
        _Mish()(values.clone()).double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_norms_that_cannot_be_folded_are_not_packed() -> None:
    network = network_of(LAYERS.format(channels=3, activation="leaky", blur=0).replace("filters=8", "filters=32"), "gn")
    assert not can_pack(network)
    predictor = fast_predictor(network, "auto")
    assert predictor == TorchPredictor(network=network)
    images = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        exact, half = (fast_predictor(network, kind).candidates(images, confidence=0.0) for kind in ("float32", "bf16"))
    assert len(exact[0]) == len(half[0])
    torch.testing.assert_close(half[0].scores, exact[0].scores, rtol=0.1, atol=0.02)


def test_auto_is_what_the_cpu_is_fast_with(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(LAYERS.format(channels=3, activation="leaky", blur=0))
    assert fast_predictor(network, "auto").dtype == torch.float32
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "avx512_bf16")
    assert fast_predictor(network, "auto").dtype == torch.bfloat16
    assert fast_predictor(network, "float32").dtype == torch.float32


def test_to_be_compared_with_darknet_it_stays_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "avx512_bf16")
    network = network_of(LAYERS.format(channels=3, activation="leaky", blur=0))
    checkpoint = make_checkpoint(
        network.plan, NormOptions(norm="bn"), network.state_dict(), class_names=("a", "b"), letterbox=False
    )
    checkpoint.to_file(tmp_path / "best.pt")
    for resize, dtype in (("opencv", torch.bfloat16), ("darknet", torch.float32)):
        detector = Detector.load(tmp_path / "best.pt", device="cpu", options=DetectionOptions(resize=resize))
        assert isinstance(detector.predictor, TorchPredictor) and detector.predictor.dtype == dtype


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        fast_predictor(network_of(LAYERS.format(channels=3, activation="leaky", blur=0)), "fp16")


def test_bf16_boxes_are_decoded_in_float32() -> None:
    network = network_of(LAYERS.format(channels=3, activation="leaky", blur=0))
    with torch.no_grad():
        (found,) = fast_predictor(network, "bf16").candidates(torch.rand(1, 3, 32, 64), confidence=0.0)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
