"""The pages on a GPU: a real one where there is one, and a pretended one everywhere (tests/pretend_gpu.py)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import detect
import evaluate
import train
from cfg.plan import parse_plan
from engine.amp import MixedPrecision
from engine.oom_recovery import OutOfMemoryRecovery, Snapshot
from engine.step import TrainStep
from models import offload
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.yolo.criterion import make_criterion
from models.yolo.loss import LossOptions
from tests.e2e.conftest import TOY_CFG
from tests.engine.test_step import NORMS as FACTORIES
from tests.engine.test_step import batch_of
from tests.models.norms.kinds import CORE, KINDS
from tests.pretend_gpu import CPU, GPU, OnGpu, pretend_gpu, waits
from utils.clock import BatchClock
from utils.memory import host_memory_like

NORMS = [*CORE, "ln", "in", "domains"]


@pytest.fixture(params=["pretended", "real"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "pretended":
        with pretend_gpu(monkeypatch):
            yield GPU
    elif torch.cuda.is_available():
        yield GPU
    else:
        pytest.skip("there is no CUDA GPU here")


@contextlib.contextmanager
def counted_waits(found: list[int]) -> Iterator[None]:
    """Append how often the host waited for the GPU: as torch says of a real one, or as the pretended one counts."""
    waits.clear()
    is_real = torch.cuda.get_device_name(GPU) != "pretended"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if is_real:
            torch.cuda.set_sync_debug_mode("warn")
        yield
        if is_real:
            torch.cuda.set_sync_debug_mode("default")
    found.append(waits.total() + sum("synchronizing CUDA operation" in str(each.message) for each in said))


def network_with(norm: str) -> Network:
    factory = norm_factory(KINDS[norm]) if norm in KINDS else FACTORIES[norm]
    return Network(parse_plan(TOY_CFG, path="toy.cfg"), factory).train()


def trained(
    norm: str, loss: str, device: torch.device, dtype: torch.dtype = torch.float64, *, offloads: bool = False
) -> tuple[list[float], dict[str, Tensor], int]:
    """Three steps of two mini-batches -> their losses, the network's state, and the waits of the third step."""
    torch.manual_seed(0)
    network = network_with(norm).to(device, dtype)
    step = TrainStep(
        network=network,
        forward=network,
        criterion=make_criterion(LossOptions(loss=loss)),
        optimizer=torch.optim.SGD(parameter_groups(network, weight_decay=5e-4), lr=0.001, momentum=0.9),
        precision=MixedPrecision("off", CPU),
        clock=BatchClock(network),
        recovery=OutOfMemoryRecovery(network, subdivisions=2, communicates=False, say=print),
        clip_norm=None,
        offload_activations=offloads,
    )
    losses: list[float] = []
    waited: list[int] = []
    for seed in range(3):
        batch = batch_of(4, seed=seed)
        batch.images.data = batch.images.to(dtype)
        if device.type == "cuda":
            batch = batch.pin_memory()
        with counted_waits(waited):
            found = step(batch.to(device, non_blocking=True))
        losses += found.tolist()
    state = {name: value._host if isinstance(value, OnGpu) else value for name, value in network.state_dict().items()}
    return losses, {name: value.cpu() for name, value in state.items()}, waited[-1]


@cache
def trained_on_cpu(norm: str, loss: str) -> tuple[list[float], dict[str, Tensor]]:
    losses, state, _ = trained(norm, loss, CPU)
    return losses, state


# The losses see what the network gives, whichever norm is in it: by default darknet's meets a few.
NORMS_AND_LOSSES = [
    *((norm, "autograd") for norm in NORMS),
    *(
        pytest.param(norm, "darknet", marks=[] if norm in ("bn", "cmbn-weights", "cbn-std") else pytest.mark.slow)
        for norm in NORMS
    ),
]


@pytest.mark.parametrize(("norm", "loss"), NORMS_AND_LOSSES)
def test_a_step_is_the_cpus_and_waits_once(norm: str, loss: str, gpu: torch.device) -> None:
    """Once: for the losses and whether the gradient is finite. Never in a norm, nor in a mini-batch."""
    expected, state = trained_on_cpu(norm, loss)
    made, on_gpu, waited = trained(norm, loss, gpu)
    assert made == pytest.approx(expected, rel=1e-9)
    for name, value in state.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-7, atol=1e-10, msg=name)
    assert waited == 1


@pytest.mark.parametrize("norm", ["bn", "cmbn-weights", "mabn"])
def test_offloaded_activations_are_the_same_and_nobody_waits_for_them(
    norm: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, expected, _ = trained(norm, "autograd", gpu)
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    copied: list[Tensor] = []
    monkeypatch.setattr(offload, "host_memory_like", lambda like: copied.append(host_memory_like(like)) or copied[-1])
    made, state, waited = trained(norm, "autograd", gpu, offloads=True)
    assert made == pytest.approx(plain, rel=1e-9)  # a real one adds gradients in any order
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-10, msg=name)
    assert waited == 1
    assert len(copied) > 6 and {each.device for each in copied} == {CPU}


@pytest.mark.parametrize("norm", NORMS)
def test_single_precision_is_near_the_cpus_double(norm: str, gpu: torch.device) -> None:
    expected, state = trained_on_cpu(norm, "autograd")
    made, on_gpu, _ = trained(norm, "autograd", gpu, torch.float32)
    assert made == pytest.approx(expected, rel=1e-4)
    for name, value in state.items():
        torch.testing.assert_close(on_gpu[name].to(value), value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("norm", "loss"), NORMS_AND_LOSSES)
def test_the_backward_asks_for_no_number(norm: str, loss: str) -> None:
    """Autograd's own formulas may, as `prod`'s does, and a pretended GPU does not see them."""
    network = network_with(norm)
    parts = list(batch_of(4).split(2))
    for part in BatchClock(network).minibatches(parts, [part.domains for part in parts]):
        terms = make_criterion(LossOptions(loss=loss))(network(part.pixels()), part.targets)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            terms.total.backward()
        called = {event.key for event in profiled.key_averages()}
        assert "aten::convolution_backward" in called
        assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_nobody_waits_for_large_histories_to_be_kept(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "LARGE", 100)
    *_, waited = trained("cbn-std", "autograd", gpu)
    assert waited == 1


FLAGS = {
    "cmbn": ["--norm", "cmbn", "--checkpoint-activations", "--channels-last", "--precise-bn", "8"],
    "cbn": ["--norm", "cbn", "--loss", "darknet", "--mosaic", "1", "--multi-scale", "1.4", "--clip-norm", "1"],
    "mabn": ["--norm", "mabn", "--subdivisions", "auto", "--freeze", "1", "--ema-decay", "0.9"],
    "bn": ["--norm", "bn", "--norm-freeze-after", "0.5", "--offload-activations", "--workers", "1", "--cache", "disk"],
}


@pytest.mark.parametrize("norm", FLAGS)
def test_all_pages_run(norm: str, scenes: Path, toy_cfg: str, tmp_path: Path, gpu: torch.device, capsys) -> None:
    run_all_pages(["--amp", "off", *FLAGS[norm]], scenes, toy_cfg, tmp_path)
    assert "1 image annotated" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", FLAGS)
def test_all_pages_run_in_mixed_precision(
    norm: str, amp: str, scenes: Path, toy_cfg: str, tmp_path: Path, capsys
) -> None:
    run_all_pages(["--amp", amp, *FLAGS[norm]], scenes, toy_cfg, tmp_path)
    assert "1 image annotated" in capsys.readouterr().out


def run_all_pages(flags: list[str], scenes: Path, toy_cfg: str, folder: Path) -> None:
    run, best = folder / "run", str(folder / "run" / "best.pt")
    common = ["--device", str(GPU), "--workers", "0"]
    train.main([*common, "--cfg", toy_cfg, "--data", str(scenes), "--max-steps", "4", "--out", str(run), *flags])
    train.main([*common, "--resume", str(run), "--epochs", "2"])
    reports = ["--norm-report", "--recalibrate-on", str(scenes), "--metric", "darknet", "--nms", "diounms"]
    evaluate.main([*common, "--weights", best, "--data", str(scenes), "--out", str(folder / "report"), *reports])
    image = str(next((scenes / "val").glob("*")))
    detect.main(
        ["--device", str(GPU), "--weights", best, "--confidence", "0.001", "--out", str(folder / "found"), image]
    )


def test_a_forgotten_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch) as device:
        here, there = torch.ones(3), torch.ones(3).to(device)
        assert there.device == device and (2 * there + torch.tensor(1.0)).tolist() == [3, 3, 3]
        with pytest.raises(RuntimeError, match="one device"):
            here + there
        index = torch.tensor([0, 2])
        assert there[index].tolist() == [1, 1]
        there[index] = torch.tensor(2.0)
        with pytest.raises(RuntimeError, match="one device"):
            torch.stack((torch.zeros(3), there))
        with pytest.raises(RuntimeError, match="one device"):
            here[index.to(device)]
        with pytest.raises(RuntimeError, match="one device"):
            here[index.to(device)] = 1
        with pytest.raises(RuntimeError, match="one device"):
            there[index.to(device)] = torch.zeros(2)


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch) as device:
        there = torch.ones(3).pin_memory().to(device, non_blocking=True)
        there[torch.tensor([0, 2]).pin_memory().to(device, non_blocking=True)].sum().sqrt()
        torch.empty(3, pin_memory=True).copy_(there, non_blocking=True)
        assert waits.total() == 0
        for wait in (
            lambda: there.sum().item(),
            lambda: there[there > 0],
            lambda: there[torch.tensor([0, 2])],
            lambda: there.nonzero(),
            lambda: there.cpu(),
            lambda: torch.ones(3).to(device),
            lambda: torch.ones(3).to(device, non_blocking=True),
            lambda: torch.empty(3).copy_(there, non_blocking=True),
            lambda: there[0].copy_(torch.tensor(1.0)),
            lambda: there.tolist(),
            lambda: there.new_tensor([1.0, 2.0]),
            lambda: bool((there > 0).all()),
        ):
            waits.clear()
            wait()
            assert waits.total() == 1
