"""A network trained with one norm goes on with another."""

from __future__ import annotations

import pytest
import torch

from cfg.plan import load_plan, parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.recalibrate import recalibrate
from models.norms.table import NORMS
from models.weights.start import load_matching
from utils.clock import BatchClock

WITH = [norm for norm, spec in NORMS.items() if spec.has_running_statistics and norm != "bcn"]
SMALL = "\n".join(
    ["[net]", "width=8", "height=8"]
    + 2 * ["[convolutional]", "batch_normalize=1", "filters=8", "size=3", "pad=1", "stride=2", "activation=leaky"]
)


def network(norm: str, *, centred: bool = False) -> Network:
    options = NormOptions(norm=norm, weight_centralization=centred)
    return Network(parse_plan(SMALL, path="small.cfg"), norm_factory(options))


def last_output(made: Network, images: torch.Tensor) -> torch.Tensor:
    for layer in made.layers:
        images = layer(images)
    return images


@pytest.mark.parametrize("after", WITH)
@pytest.mark.parametrize("before", WITH)
@torch.no_grad()
def test_batch_statistics_norms_take_over_from_each_other(before, after):
    """Every layer; in inference nothing changes, and training goes on."""
    images = torch.rand(6, 3, 8, 8)
    trained, other = network(before), network(after)
    recalibrate(trained, [images + 0.3])
    loaded, fresh = load_matching(other, trained.state_dict())
    assert (loaded, fresh) == (4, [])
    torch.testing.assert_close(last_output(other.eval(), images), last_output(trained.eval(), images))
    other.train()
    for part in BatchClock(other).minibatches(images.split(2)):
        assert torch.isfinite(last_output(other, part)).all()


def test_batch_channel_norm_starts_with_the_batch_norm_of_others_and_a_fresh_group_norm():
    images, trained, other = torch.rand(6, 3, 8, 8), network("bn"), network("bcn")
    recalibrate(trained, [images + 0.3])
    assert load_matching(other, trained.state_dict()) == (4, ["layers.0.norm.channel", "layers.1.norm.channel"])
    assert torch.equal(other.layers[0].norm.running_var, trained.layers[0].norm.running_var)
    assert load_matching(trained, other.state_dict()) == (4, [])


def test_centred_weights_are_another_function():
    """The parameters fit; who takes weights over into mabn, which centres them by default, does not get the same."""
    images, trained, other = torch.rand(6, 3, 8, 8), network("bn"), network("mabn", centred=True)
    assert load_matching(other, trained.state_dict())[1] == []
    assert not torch.allclose(last_output(other.eval(), images), last_output(trained.eval(), images), atol=1e-2)


@pytest.mark.parametrize("after", WITH)
@pytest.mark.parametrize("before", ["gn", "ln", "in"])
def test_from_norms_without_batch_statistics_norms_start_fresh(before, after):
    trained, other = network(before), network(after)
    torch.nn.init.constant_(trained.layers[0].norm.weight, 3.0)
    loaded, fresh = load_matching(other, trained.state_dict())
    assert (loaded, fresh) == (2, ["layers.0.norm", "layers.1.norm"])
    assert torch.equal(other.layers[0].norm.weight, torch.ones(8))
    assert torch.equal(other.layers[0].conv.weight, trained.layers[0].conv.weight)


def test_a_whole_network_is_taken_over():
    plan = load_plan("yolov4-pico", classes=3)
    trained, other = (Network(plan, norm_factory(NormOptions(norm=norm))) for norm in ("bn", "cbn"))
    loaded, fresh = load_matching(other, trained.state_dict())
    assert (loaded, fresh) == (21 + 23, [])
