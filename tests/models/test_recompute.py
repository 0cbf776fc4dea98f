"""Recomputed activations: the same bits in less memory, for every norm and a graph full of routes."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from cfg.convolution import ConvSpec
from cfg.plan import Plan, load_plan, parse_plan
from engine.training_state import norm_histories
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.recompute import spans_of
from tests.models.norms.kinds import assert_same_bits, state_of
from utils.clock import BatchClock

NETS = ("yolov4-pico", "yolov4-tiny", "yolov4")


@pytest.fixture(scope="module", params=NETS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return load_plan(request.param, input_hw=(64, 64))


def test_spans_are_all_layers_once(plan: Plan) -> None:
    spans = spans_of(plan)
    assert [index for span in spans for index in span] == list(range(len(plan.nodes)))
    assert len(spans) > 2


def taken(plan: Plan, edges: tuple[int, ...]) -> int:
    """By the definition: numbers that cross an edge, each once, and those inside the largest span."""
    sizes = [node.shape.channels * node.shape.height * node.shape.width for node in plan.nodes]
    kept = [size * (2 if isinstance(node.spec, ConvSpec) else 1) for node, size in zip(plan.nodes, sizes, strict=True)]
    bounds = [0, *edges, len(plan.nodes)]
    crosses = {
        index
        for index, readers in enumerate(plan.consumers)
        if not readers or any(index < edge <= max(readers) for edge in bounds)
    }
    return sum(sizes[index] for index in crosses) + max(sum(kept[a:b]) for a, b in pairwise(bounds))


def test_no_other_cut_of_a_small_network_takes_less() -> None:
    """All of them are tried; the limits that the fast search tries are a tenth apart."""
    layers = "[convolutional]\nfilters={}\nsize=3\npad=1\nstride={}\nactivation=leaky\n"
    text = "[net]\nwidth=32\nheight=32\n" + "".join(layers.format(8 * i, 1 + (i == 2)) for i in range(1, 6))
    text += "[route]\nlayers=-1,-2\n" + "".join(layers.format(24, 1) for _ in range(2))
    text += (
        "[shortcut]\nfrom=-2\nactivation=linear\n" + layers.format(18, 1) + "[yolo]\nclasses=1\nanchors=1,1,2,2,3,3\n"
    )
    plan = parse_plan(text, path="small.cfg")
    inner = range(1, len(plan.nodes))
    best = min(taken(plan, edges) for count in range(len(inner) + 1) for edges in combinations(inner, count))
    found = taken(plan, tuple(span.start for span in spans_of(plan)[1:]))
    assert best <= found <= 1.1 * best < taken(plan, ())


def train_two_batches(norm: str, *, recomputes: bool) -> tuple[Network, list[Tensor]]:
    torch.manual_seed(0)
    plan = load_plan("yolov4-pico", input_hw=(64, 64))
    network = Network(plan, norm_factory(NormOptions(norm=norm))).train()
    if recomputes:
        network.recompute_activations()
    clock, optimizer = BatchClock(network), torch.optim.SGD(network.parameters(), lr=0.01)
    outputs = []
    for _ in range(2):
        for part in clock.minibatches(torch.rand(4, 3, 64, 64).split(2)):
            heads = network(part)
            outputs += [head.logits.detach() for head in heads]
            sum(head.logits.square().mean() for head in heads).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
    return network, outputs


@pytest.mark.parametrize("norm", ["bn", "cmbn", "cbn", "mabn", "brn", "gn"])
def test_a_network_that_recomputes_trains_to_the_same_bits(norm: str) -> None:
    (plain, outputs), (recomputed, again) = (train_two_batches(norm, recomputes=value) for value in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert_same_bits(state_of(plain), state_of(recomputed))
    assert_same_bits(norm_histories(plain), norm_histories(recomputed))


def test_outside_training_nothing_is_different(plan: Plan) -> None:
    network = Network(plan, norm_factory(NormOptions(norm="bn"))).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = network(images)
        network.recompute_activations()
        again = network(images)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(plain, again, strict=True))
