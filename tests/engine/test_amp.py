"""Mixed precision, what of it can be tested on a CPU, and what is chosen where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.amp import MixedPrecision, as_it_ran, choose_precision, precision_in_words
from options import TrainOptions
from tests.pretend_gpu import GPU, pretend_gpu
from utils.errors import UserError
from utils.fast_precision import cpu_bf16
from utils.flags import resolve

CPU = torch.device("cpu")


def one_weight() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    return weight, torch.optim.SGD([weight], lr=0.1)


def test_float16_needs_a_gpu():
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        MixedPrecision("fp16", CPU)


@pytest.mark.parametrize(("kind", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_the_forward_runs_in_the_kinds_dtype(kind, dtype):
    conv = nn.Conv2d(1, 1, 1)
    with MixedPrecision(kind, CPU).autocast():
        assert conv(torch.zeros(1, 1, 2, 2)).dtype == dtype
    assert conv(torch.zeros(1, 1, 2, 2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["off", "bf16"])
def test_a_step_is_the_optimizers(kind):
    weight, optimizer = one_weight()
    precision = MixedPrecision(kind, CPU)
    for _ in range(2):  # two mini-batches of one batch
        precision.scaler.scale(weight.square().sum() / 2).backward()
    precision.step(optimizer)
    assert weight.tolist() == pytest.approx([3 - 0.2 * 3, 4 - 0.2 * 4])


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_an_overflow_skips_the_update_and_lowers_the_scale(is_unscaled):
    weight, optimizer = one_weight()
    precision = scaled(1024.0)
    precision.scaler.scale(weight.sum() * float("inf")).backward()
    if is_unscaled:  # as for clipping
        precision.scaler.unscale_(optimizer)
    precision.step(optimizer)
    assert weight.tolist() == [3, 4]
    assert precision.scaler.get_scale() == 512


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_loss_scaling_does_not_change_the_update(is_unscaled):
    weight, optimizer = one_weight()
    precision = scaled(1024.0)
    precision.scaler.scale(weight.square().sum() / 2).backward()
    if is_unscaled:
        precision.scaler.unscale_(optimizer)
        assert weight.grad.tolist() == [3, 4]
    precision.step(optimizer)
    assert weight.tolist() == pytest.approx([3 - 0.1 * 3, 4 - 0.1 * 4])


def scaled(scale: float) -> MixedPrecision:
    """What fp16 has on a GPU."""
    precision = MixedPrecision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return precision


# --- what `auto` is ---------------------------------------------------------------------------------------------


def chosen(device: torch.device, **given: str) -> str:
    """The words that the user sees."""
    options, reason = choose_precision(resolve(TrainOptions, {"device": str(device), **given}))
    assert options.optim.amp != "auto" != options.speed.channels_last
    assert choose_precision(options) == (options, "")  # a run's stored settings leave nothing to choose
    return precision_in_words(options) + (f": {reason}" if reason else "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "bf16, channels last: the CPU has avx512_bf16"),
        ({"amp": "bf16"}, "bf16, channels last: the CPU has avx512_bf16"),
        ({"channels_last": "off"}, "bf16: the CPU has avx512_bf16"),
        ({"amp": "off"}, "float32"),
        ({"amp": "off", "channels_last": "on"}, "float32, channels last"),
        ({"norm": "gn"}, "bf16: the CPU has avx512_bf16"),
        ({"norm": "bcn"}, "bf16: the CPU has avx512_bf16"),
        ({"norm": "none"}, "bf16, channels last: the CPU has avx512_bf16"),
        ({"norm": "auto"}, "bf16, channels last: the CPU has avx512_bf16"),
        ({"loss": "darknet"}, "float32: as darknet computes"),
        ({"loss": "darknet", "amp": "bf16"}, "bf16"),
    ],
)
def test_a_cpu_with_bf16_uses_it_unless_told_otherwise(monkeypatch, given, words):
    monkeypatch.setattr("utils.fast_precision.cpu_bf16", lambda: "avx512_bf16")
    assert chosen(CPU, **given) == words


@pytest.mark.parametrize(("given", "words"), [({}, "float32: no bf16 is known on this CPU"), ({"amp": "bf16"}, "bf16")])
def test_a_cpu_without_bf16_computes_in_float32(given, words):
    assert chosen(CPU, **given) == words


def test_apples_gpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert chosen(torch.device("mps")) == "float32: no bf16 is known on this MPS"


@pytest.mark.parametrize(
    ("name", "capability", "has_bf16", "words"),
    [
        ("NVIDIA A100-SXM4-40GB", (8, 0), True, "bf16, channels last: the GPU has bf16"),
        ("NVIDIA GeForce RTX 4090", (8, 9), True, "bf16, channels last: the GPU has bf16"),
        ("Tesla T4", (7, 5), False, "fp16, channels last: the GPU has no bf16"),
        ("Tesla V100-SXM2-16GB", (7, 0), False, "fp16, channels last: the GPU has no bf16"),
        ("NVIDIA GeForce RTX 2060", (7, 5), False, "fp16, channels last: the GPU has no bf16"),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), False, "fp16: the GPU has no bf16"),
        ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), False, "float32: fp16 gives NaN on NVIDIA GeForce GTX 1660 SUPER"),
        ("NVIDIA GeForce GTX 1650", (7, 5), False, "float32: fp16 gives NaN on NVIDIA GeForce GTX 1650"),
        ("NVIDIA T1000", (7, 5), False, "float32: fp16 gives NaN on NVIDIA T1000"),
        ("Quadro T2000", (7, 5), False, "float32: fp16 gives NaN on Quadro T2000"),
    ],
)
def test_a_gpu_takes_what_its_cores_are_made_for(monkeypatch, name, capability, has_bf16, words):
    with pretend_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        assert chosen(GPU) == words
        assert chosen(GPU, amp="off") == "float32"
        assert chosen(GPU, loss="darknet") == "float32: as darknet computes"


@pytest.mark.parametrize(("missing", "name"), [((), "amx_bf16"), (("_is_amx_tile_supported",), "avx512_bf16")])
def test_the_instructions_are_found_on_torch_versions_that_lack_a_question(monkeypatch, missing, name):
    for function in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, function, lambda: True, raising=False)
    for function in missing:
        monkeypatch.delattr(torch.cpu, function)
    assert cpu_bf16() == name
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert cpu_bf16() == ""


@pytest.mark.parametrize(
    ("device", "before", "ran"),
    [
        ("cpu", {"amp": "auto", "channels_last": False}, {"amp": "off", "channels_last": "off"}),
        ("mps", {"amp": "auto", "channels_last": True}, {"amp": "off", "channels_last": "on"}),
        ("cpu", {"amp": "bf16", "channels_last": True}, {"amp": "bf16", "channels_last": "on"}),
        ("cuda", {"amp": "auto", "channels_last": False}, {"amp": "auto", "channels_last": "off"}),
        ("cpu", {}, {"amp": "off", "channels_last": "off"}),
        ("cuda", {"amp": "off", "channels_last": "on"}, {"amp": "off", "channels_last": "on"}),
    ],
)
def test_settings_of_an_earlier_version_compute_as_they_did(device, before, ran):
    assert as_it_ran({**before, "seed": 3}, torch.device(device)) == {**ran, "seed": 3}
