"""Activations in host memory until the backward: the same bits, for every norm, and nothing of them left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cfg.plan import Plan, load_plan, parse_plan
from engine.training_state import norm_histories
from models import offload
from models.network import Network
from models.norms.factory import norm_factory
from models.offload import saved_on_host
from tests.models.norms.kinds import CORE, KINDS, assert_same_bits, state_of
from utils.clock import BatchClock
from utils.memory import host_memory_like

CFG = """
[net]
width=16
height=16
[convolutional]
batch_normalize=1
filters=8
size=3
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
groups=2
activation=mish
[convolutional]
batch_normalize=1
filters=8
size=1
activation=swish
[shortcut]
from=-2
activation=linear
[route]
layers=-1,-2
[route]
layers=-1
groups=2
group_id=1
[maxpool]
size=2
stride=1
[convolutional]
filters=6
activation=linear
"""


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was copied to the host, small tensors too; the copies."""
    made: list[Tensor] = []
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    monkeypatch.setattr(offload, "host_memory_like", lambda like: made.append(host_memory_like(like)) or made[-1])
    return made


def plan() -> Plan:
    return parse_plan(CFG, path="small.cfg")


def network_of(norm: str, *, recomputes: bool = False, channels_last: bool = False) -> Network:
    torch.manual_seed(0)
    network = Network(plan(), norm_factory(KINDS[norm])).train()
    if recomputes:
        network._spans = [range(3), range(3, 5), range(5, 8)]
    return network.to(memory_format=torch.channels_last) if channels_last else network


def trained(norm: str, *, offloads: bool, amp: bool = False, **how: bool) -> tuple[Network, list[Tensor]]:
    """Two steps of two mini-batches -> the network, and its outputs and gradients."""
    network, seen = network_of(norm, **how), []
    generator = torch.Generator().manual_seed(1)
    clock, optimizer = BatchClock(network), torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        for part in clock.minibatches(torch.rand(4, 3, 16, 16, generator=generator).split(2)):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                if offloads:
                    with saved_on_host(network):
                        output = network.last_output(part)
                else:
                    output = network.last_output(part)
            output.square().mean().backward()
            seen += [output.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    return network, seen


def assert_offloading_changes_nothing(norm: str, **how: bool) -> None:
    (plain, expected), (ours, seen) = (trained(norm, offloads=value, **how) for value in (False, True))
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert_same_bits(state_of(ours), state_of(plain))
    assert_same_bits(norm_histories(ours), norm_histories(plain))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("norm", CORE)
def test_training_comes_to_the_same_bits(norm: str, recomputes: bool, copied: list[Tensor]) -> None:
    assert_offloading_changes_nothing(norm, recomputes=recomputes)
    assert len(copied) >= 4 * 3 and not any(copy.requires_grad for copy in copied)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["bn", "cmbn-weights", "cbn-std", "mabn", "gn"])
def test_with_bf16_and_either_memory_format_too(norm: str, channels_last: bool, copied: list[Tensor]) -> None:
    assert_offloading_changes_nothing(norm, amp=True, channels_last=channels_last)
    assert torch.bfloat16 in {copy.dtype for copy in copied}


def test_the_backward_takes_the_copies(copied: list[Tensor]) -> None:
    network = network_of("cmbn-weights")
    images = torch.rand(2, 3, 16, 16)
    gradients = []
    for spoil in (False, True):
        with saved_on_host(network):
            output = network.last_output(images)
        if spoil:
            for copy in copied:
                copy.zero_()
        gradients.append(torch.autograd.grad(output.square().mean(), network.layers[0].conv.weight)[0])
    assert gradients[0].any() and not gradients[1].any()


@pytest.mark.parametrize("offloads", [False, True])
def test_activations_are_freed_after_the_forward(offloads: bool, copied: list[Tensor]) -> None:
    network, outputs = network_of("bn"), []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, args, made: outputs.append(StorageWeakRef(made.untyped_storage())))
    with saved_on_host(network) if offloads else torch.enable_grad():
        output = network.last_output(torch.rand(2, 3, 16, 16))
    alive = [not each.expired() for each in outputs]
    assert output.grad_fn is not None and alive[-1]
    assert any(alive[:-1]) != offloads


def test_neither_weights_nor_buffers_are_copied_and_nothing_is_copied_twice(copied: list[Tensor]) -> None:
    network, images = network_of("bn"), torch.rand(2, 3, 16, 16)
    with saved_on_host(network):
        output = network.last_output(images)
    own = [*network.parameters(), *network.buffers()]
    assert output.grad_fn is not None and len(copied) > 4
    for index, one in enumerate(copied):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in (*own, *copied[:index]))


def test_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []
    monkeypatch.setattr(offload, "host_memory_like", lambda like: shapes.append(like.nbytes) or host_memory_like(like))
    network = Network(load_plan("yolov4-pico", input_hw=(64, 64)), norm_factory(KINDS["bn"])).train()
    with saved_on_host(network):
        heads = network(torch.rand(4, 3, 64, 64))
    assert heads and shapes and min(shapes) >= offload.LEAST_BYTES
