"""Frozen layers stay as they were, to the last bit, whatever the norm and whoever puts the network into training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from cfg.plan import parse_plan
from engine.ema import ModelEMA
from engine.training_state import norm_histories
from models.freeze import freeze
from models.network import Network, parameter_groups
from models.norms.factory import norm_factory
from models.norms.freeze_stats import StatisticsFreeze
from models.norms.options import NormOptions
from utils.clock import BatchClock
from utils.errors import UserError

CONV = "[convolutional]\nbatch_normalize=1\nfilters=4\nsize=3\npad=1\nactivation=mish\n"
HEAD = "[convolutional]\nfilters=7\n[yolo]\nclasses=2\nanchors=4,8\nnum=1\nmask=0\n"
TEXT = (
    f"[net]\nwidth=8\nheight=8\nchannels=3\n{CONV}{CONV}[route]\nlayers=-1,-2\n[dropout]\nprobability=.5\n{CONV}{HEAD}"
)
NORMS = ["bn", "cmbn", "cbn", "cbn-lite", "mabn", "brn", "gn", "none"]
STEPS = 3


def network_of(norm: str = "bn", text: str = TEXT) -> Network:
    options = NormOptions(norm=f"{norm}:burn_in_steps=0" if norm.startswith("cbn") else norm)
    return Network(parse_plan(text, path="toy.cfg"), norm_factory(options))


def train(network: Network, *, steps: int = STEPS, weight_decay: float = 0.1) -> None:
    """As train.py does, with two mini-batches a step."""
    groups = parameter_groups(network, weight_decay=weight_decay)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    clock = BatchClock(network)
    regime = StatisticsFreeze(network, NormOptions(), steps)
    for _ in range(steps):
        network.train()  # as at the start of an epoch
        regime.set_mode(clock.step)
        for images in clock.minibatches(torch.randn(2, 3, 3, 8, 8)):
            (head,) = network(images)
            head.logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[int]:
    """Layers of which a parameter, a statistic or a memory is another."""
    assert before.keys() <= after.keys()
    names = [name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])]
    return {int(name.split(".")[1]) for name in names}


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_layers_stay_as_they_are_and_the_others_learn(norm: str) -> None:
    network = network_of(norm)
    learning = copy.deepcopy(network)
    before, remembered = copy.deepcopy((network.state_dict(), norm_histories(network)))
    freeze(network, 2)
    train(network)
    assert changed(before, network.state_dict()) == {4, 5}
    assert changed(remembered, norm_histories(network)) <= {4}
    train(learning)  # nothing but freezing keeps a layer from changing
    assert changed(before, learning.state_dict()) == {0, 1, 4, 5}


@pytest.mark.parametrize("norm", NORMS)
def test_in_training_they_compute_what_they_compute_in_evaluation(norm: str) -> None:
    network = network_of(norm)
    train(network)  # statistics of their own, and histories
    freeze(network, 4)
    network.train()
    images = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(network).eval()
    for index in (0, 1):
        assert torch.equal(network.layers[index](images), expected.layers[index](images))
        images = expected.layers[index](images)
    wide = torch.randn(2, 8, 8, 8)
    assert torch.equal(network.layers[3](wide), wide), "a frozen dropout drops nothing"


def test_backward_ends_there_and_none_of_their_activations_are_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    network = network_of()
    freeze(network, 4)
    network.train()
    images = torch.randn(2, 3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [images]
        for index in (0, 1):
            outputs.append(network.layers[index](outputs[-1]))
        together = network.layers[2](outputs[2], outputs[1])
        assert not kept and not together.requires_grad
        network(images)[0].logits.sum().backward()
    assert kept
    assert [p.grad is None for layer in network.layers for p in layer.parameters()] == [True] * 6 + [False] * 5


@pytest.mark.parametrize("norm", ["bn", "cmbn", "cbn"])
def test_with_recomputed_activations_it_is_the_same(norm: str) -> None:
    stored = network_of(norm, TEXT.replace(".5", "0"))
    freeze(stored, 2)
    made_again = copy.deepcopy(stored)
    made_again.recomputes = True
    for network in (stored, made_again):
        torch.manual_seed(0)
        train(network)
    expected = stored.state_dict()
    for name, tensor in made_again.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_norms_mode_is_the_regimes_in_layers_that_learn_and_eval_in_frozen_ones() -> None:
    network = network_of("cmbn")
    freeze(network, 1)
    regime = StatisticsFreeze(network, NormOptions(norm_freeze_after=0.5), total_steps=4)
    for step, learns in enumerate([True, True, False, False]):
        network.eval()
        network.train()
        regime.set_mode(step)
        assert [network.layers[index].norm.training for index in (0, 1, 4)] == [False, learns, learns]
        assert network.training and network.layers[1].conv.training


def test_the_averaged_copy_has_the_same_frozen_layers() -> None:
    network = network_of()
    freeze(network, 2)
    average = ModelEMA(network, decay=0.9)
    before = copy.deepcopy(network.state_dict())
    train(network, steps=2)
    average.update(network, step=1)
    assert changed(before, average.model.state_dict()) == {4, 5}


def test_the_summary() -> None:
    network = network_of()
    assert freeze(network, 2) == ("layers 0 to 1, with their norm statistics: 0.00 M of 0.00 M parameters are trained")


@pytest.mark.parametrize("layers", [6, 7, 100])
def test_something_must_learn(layers: int) -> None:
    with pytest.raises(UserError, match=f"^--freeze {layers}: none of the network's 7 layers is left to train$"):
        freeze(network_of(), layers)


def test_a_run_goes_on_with_them() -> None:
    """What is saved fits a network frozen alike: the optimizer's groups and its momentum, too."""
    torch.manual_seed(0)
    whole = network_of()
    freeze(whole, 2)
    other = network_of()
    freeze(other, 2)
    other.load_state_dict(whole.state_dict())
    saved = torch.optim.SGD(parameter_groups(whole, weight_decay=0.1), lr=0.1, momentum=0.9)
    whole(torch.randn(2, 3, 8, 8))[0].logits.sum().backward()
    saved.step()
    fresh = torch.optim.SGD(parameter_groups(other, weight_decay=0.1), lr=0.1, momentum=0.9)
    fresh.load_state_dict(saved.state_dict())
    assert [group["lr_scale"] for group in fresh.param_groups] == [1.0, 1.0]
    assert len(fresh.state_dict()["state"]) == 5


# --- rates of groups ---------------------------------------------------------------------------------------------


def scale_of(network: Network, groups: list[dict]) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_all_but_the_heads_own_convolutions_learn_at_a_share_of_the_rate() -> None:
    network = network_of()
    scales = scale_of(network, parameter_groups(network, weight_decay=0.1, backbone_rate=0.25))
    assert scales == {name: 1.0 if name.startswith("layers.5.") else 0.25 for name, _ in network.named_parameters()}


def test_a_layers_own_rate_multiplies_it() -> None:
    network = network_of(
        text=TEXT.replace("filters=7\n", "filters=7\nlearning_rate=3\n").replace(
            "size=3", "size=3\nlearning_rate=0.5", 1
        )
    )
    groups = parameter_groups(network, weight_decay=0.1, backbone_rate=0.1)
    scales = scale_of(network, groups)
    assert {scales["layers.0.conv.weight"], scales["layers.0.norm.bias"]} == {0.05}
    assert (scales["layers.1.conv.weight"], scales["layers.5.conv.bias"]) == (0.1, 3.0)
    decays = {group["weight_decay"] for group in groups if any(p.dim() == 4 for p in group["params"])}
    assert decays == {0.1}


def test_frozen_layers_are_in_no_group() -> None:
    network = network_of()
    freeze(network, 4)
    scales = scale_of(network, parameter_groups(network, weight_decay=0.1))
    assert {name.split(".")[1] for name in scales} == {"4", "5"}


# --- the cfg's own freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "frozen"), [({}, 0), ({1: 1}, 1), ({1: 1, 4: 1}, 4), ({0: 1}, 0), ({4: 800}, 0), ({1: 1, 4: 0}, 1)]
)
def test_stopbackward_freezes_the_layers_before_it(places: dict[int, int], frozen: int) -> None:
    net, *sections = TEXT.split("\n[")
    marked = [
        f"{text}\nstopbackward={places[index]}" if index in places else text for index, text in enumerate(sections)
    ]
    plan = parse_plan("\n[".join([net, *marked]), path="toy.cfg")
    assert plan.frozen_layers == frozen
    assert plan.with_input_hw((16, 16)).frozen_layers == frozen
    ignored = [line for line in plan.warnings if "stopbackward" in line]
    assert [line.split()[1] for line in ignored] == [f"stopbackward={n}" for n in places.values() if n > 1]
