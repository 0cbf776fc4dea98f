"""Heads for other classes say of the old ones what they said, wherever these stand now."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.weights.start import by_class_name
from tests.models.weights.nets import network_of

CFG = """
[net]
width=32
height=32
[convolutional]
filters=6
size=3
stride=4
activation=leaky
[convolutional]
{norm}filters=16
activation=linear
[yolo]
mask=0,1
anchors=2,3, 4,5, 6,7
classes=3
[route]
layers=0
[convolutional]
filters=8
activation=linear
[yolo]
mask=2
anchors=2,3, 4,5, 6,7
classes=3
"""
NORMALISED = "batch_normalize=1\n"
BEFORE = ("cat", "dog", "owl")


def network_for(names: Sequence[str], *, norm: str = "", trained: bool = False) -> Network:
    plan = parse_plan(CFG.format(norm=norm), path="two-heads.cfg", classes=len(names))
    return network_of(plan) if trained else Network(plan, norm_factory(NormOptions())).eval()


@pytest.mark.parametrize("norm", ["", NORMALISED])
@pytest.mark.parametrize(
    "now", [("owl", "cat", "dog"), ("dog", "emu", "cat"), ("owl",), ("emu", "owl", "gnu", "cat"), ("emu",)]
)
def test_what_is_known_is_said_as_before_and_what_is_new_as_a_fresh_network_does(norm, now):
    """By the logits, anchor by anchor."""
    before, fresh, made = network_for(BEFORE, norm=norm, trained=True), *(network_for(now, norm=norm) for _ in "ab")
    state = before.state_dict()
    made.load_state_dict(fresh.state_dict())
    weights, known = by_class_name(state, BEFORE, made, now)
    made.load_state_dict(weights)
    fresh.layers[0].load_state_dict(before.layers[0].state_dict())
    assert known == len(set(now) & set(BEFORE))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        heads = zip(before(images), fresh(images), made(images), strict=True)
    for old, new, mixed in heads:
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(mixed.logits[..., :5], old.logits[..., :5], **close)
        for row, name in enumerate(now, start=5):
            wanted = old.logits[..., 5 + BEFORE.index(name)] if name in BEFORE else new.logits[..., row]
            torch.testing.assert_close(mixed.logits[..., row], wanted, **close)


def test_neither_what_is_given_nor_the_network_is_changed():
    before, other = network_for(BEFORE, trained=True), network_for(("dog", "emu"))
    states = [before.state_dict(), other.state_dict()]
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    by_class_name(states[0], BEFORE, other, ("dog", "emu"))
    for state, copy in zip(states, copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)


def test_a_head_that_differs_in_more_than_its_classes_stays_as_it_is():
    state = network_for(BEFORE, trained=True).state_dict()
    for name, value in {"layers.1.conv.weight": torch.ones(16, 5, 1, 1), "layers.1.conv.bias": torch.ones(9)}.items():
        state[name] = value
    other = network_for(("owl", "cat", "dog"))
    made, known = by_class_name(state, BEFORE, other, ("owl", "cat", "dog"))
    assert known == 3
    assert [name for name in state if made[name] is not state[name]] == ["layers.4.conv.weight", "layers.4.conv.bias"]
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("layers.4.")}
    made, known = by_class_name(rest, BEFORE, other, ("owl", "cat", "dog"))
    assert known is None and made == rest
