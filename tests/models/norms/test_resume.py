"""Training goes on after a save, and through recomputed activations, as if nothing had happened. Every norm."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from engine.training_state import load_norm_histories, norm_histories
from models.blocks import ConvNormAct
from models.norms.factory import norm_factory
from models.recompute import checkpointed, running_statistics_held
from tests.models.norms.kinds import BATCH_STATISTICS, CORE, KINDS, assert_same_bits, autocast, parts, state_of
from utils.clock import BatchClock

every_kind = pytest.mark.parametrize("kind", KINDS)


class Training:
    """Two blocks, one with an activation that norms fuse, and SGD with momentum; a mini-batch of another size."""

    def __init__(self, kind: str, *, recompute: bool = False) -> None:
        torch.manual_seed(3)
        factory = norm_factory(KINDS[kind])
        self.net = nn.Sequential(
            ConvNormAct.make(4, 6, 3, padding=1, norm=factory, activation=nn.Mish()),
            ConvNormAct.make(6, 4, 3, padding=1, stride=2, groups=2, norm=factory, activation=nn.LeakyReLU(0.1)),
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        self.clock = BatchClock(self.net)
        self.recompute = recompute

    def run(self, steps: int, *, announced: bool = True, dtype: str = "float32") -> list[Tensor]:
        """The losses of mini-batches; which images a step sees depends on the step alone."""
        losses = []
        for _ in range(steps):
            batch = parts((2, 1, 2), hw=(6, 6), dtype=torch.float32, seed=self.clock.step)
            for x in self.clock.minibatches(batch) if announced else batch:
                with autocast(dtype):
                    for layer in self.net:
                        x = checkpointed(layer, x, layers=[layer]) if self.recompute else layer(x)
                loss = (x.float() - 1).square().mean()
                loss.backward()
                losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.clock.stepped()
        return losses

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "network": self.net.state_dict(),
                "histories": norm_histories(self.net),
                "optimizer": self.optimizer.state_dict(),
                "step": self.clock.step,
            },
            file,
        )
        return file.getvalue()

    def load(self, saved: bytes, *, histories: bool = True) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.net.load_state_dict(state["network"])
        if histories:
            load_norm_histories(self.net, state["histories"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clock.step = state["step"]


# --- resuming ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("saved_after", [1, 3])
def test_a_resumed_training_goes_on_bit_for_bit(kind, saved_after):
    """Saved while the window fills, and in the middle of it, between two refreshments. Loaded into a fresh network,
    and into one that has trained on its own, of which nothing is left."""
    straight, resumed = Training(kind), Training(kind)
    straight.run(saved_after)
    if saved_after > 1:
        resumed.run(2)
    resumed.load(straight.save())
    expected, made = straight.run(2), resumed.run(2)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert_same_bits(state_of(resumed.net), state_of(straight.net))


@pytest.mark.parametrize("kind", [kind for kind in BATCH_STATISTICS if kind in CORE])
def test_histories_are_needed_where_a_norm_remembers_across_batches(kind):
    """Else the tests above would see nothing of them."""
    straight, forgetful = Training(kind), Training(kind)
    straight.run(3)
    forgetful.load(straight.save(), histories=False)
    same = all(torch.equal(a, b) for a, b in zip(forgetful.run(1), straight.run(1), strict=True))
    assert same == (not kind.startswith(("cbn", "mabn", "carried")))


@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_what_is_saved_is_bounded(kind):
    """Not more than the window's copies of the weights and a few vectors."""
    training = Training(kind)
    training.run(1)
    weights = sum(block.conv.weight.numel() for block in training.net)
    window = {"cbn": 4, "cbn-lite": 1, "cmbn": 2}.get(KINDS[kind].spec.name, 0)
    vectors = 10 * 24 + 4 * sum(block.conv.weight[0].numel() for block in training.net) * 2
    assert sum(t.numel() for t in norm_histories(training.net).values()) <= window * weights + vectors


# --- activation checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "announced", "dtype"),
    [
        *((kind, True, "float32") for kind in KINDS),
        *((kind, True, "bf16 autocast") for kind in CORE),
        *((kind, False, "float32") for kind in CORE),
    ],
)
def test_recomputed_activations_give_the_same_bits_and_one_running_update(kind, announced, dtype):
    plain, recomputing = Training(kind), Training(kind, recompute=True)
    expected = plain.run(3, announced=announced, dtype=dtype)
    made = recomputing.run(3, announced=announced, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert_same_bits(state_of(recomputing.net), state_of(plain.net))
    for block in recomputing.net:
        if hasattr(block.norm, "num_batches_tracked") and kind != "frozen":
            by_mini_batch = not announced or kind in ("bn", "bn-centred", "bn-ws", "cmbn-darknet")
            assert block.norm.num_batches_tracked == (9 if by_mini_batch else 3)


@every_kind
def test_statistics_are_held_and_let_go(kind):
    """Even if the forward raises; and nothing else about the norm has changed."""
    net = Training(kind).net
    before, attributes = state_of(net), [copy.copy(vars(m)) for m in net.modules()]
    x = parts((3,), hw=(6, 6), dtype=torch.float32)[0]
    with pytest.raises(ZeroDivisionError), running_statistics_held(net):
        net(x)
        raise ZeroDivisionError
    assert_same_bits(state_of(net), before)
    for module, was in zip(net.modules(), attributes, strict=True):
        assert vars(module).keys() == was.keys()
        kept = {k: v for k, v in was.items() if k[0] != "_" and k != "used_moments"}
        assert all(vars(module)[k] is v or vars(module)[k] == v for k, v in kept.items())
    net(x)
    if kind in BATCH_STATISTICS or kind.startswith("bn"):
        assert net[0].norm.num_batches_tracked == 1 and not torch.equal(
            net[0].norm.running_mean, before["0.norm.running_mean"]
        )
