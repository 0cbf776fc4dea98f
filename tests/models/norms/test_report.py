"""The gap between mini-batch and population statistics, against means and deviations taken by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.moments import Moments
from models.norms.options import NormOptions
from models.norms.recalibrate import recalibrate
from models.norms.report import LayerGap, NormReport, measure_norms, pooled_pairs
from utils.errors import UserError

TWO_LAYERS = """[net]
width=12
height=12
[convolutional]
batch_normalize=1
filters=5
size=3
stride=2
pad=1
activation=leaky
[maxpool]
size=2
stride=2
[convolutional]
batch_normalize=1
filters=6
size=1
activation=mish
"""


def network(norm: str = "bn") -> Network:
    made = Network(parse_plan(TWO_LAYERS, path="two.cfg"), norm_factory(NormOptions(norm=norm))).double()
    images = make_images(7, seed=5)
    if norm not in ("gn", "none"):
        recalibrate(made, [images])
    return made


def make_images(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64) * 2
    return torch.rand(count, 3, 12, 12, generator=generator, dtype=torch.float64) * strength + strength


def inputs_of_norms(made: Network, images: torch.Tensor) -> list[np.ndarray]:
    seen = []
    hooks = [layer.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in conv_layers(made)]
    with torch.no_grad():
        made.eval()(images)
    for hook in hooks:
        hook.remove()
    return [y.numpy() for y in seen]


def conv_layers(made: Network) -> list[torch.nn.Module]:
    return [layer for layer in made.layers if hasattr(layer, "norm")]


@pytest.mark.parametrize("norm", ["bn", "cmbn", "mabn"])
@pytest.mark.parametrize("count", [4, 7])
def test_the_gaps_are_those_of_mini_batches_taken_by_hand(norm, count):
    made, images = network(norm), make_images(count)
    report = measure_norms(made, list(images.split(3)))
    assert (report.sizes, report.images) == ((1, 2, 4), count)
    assert [(gap.layer, gap.name, gap.channels) for gap in report.layers] == [
        (0, "conv 3x3/2", 5),
        (2, "conv 1x1", 6),
    ]
    for gap, y, layer in zip(report.layers, inputs_of_norms(made, images), conv_layers(made), strict=True):
        centre = layer.norm.running_mean.numpy()
        pop = np.sqrt(layer.norm.running_var.numpy() + layer.norm.eps)

        def by_hand(groups: list[np.ndarray], centre=centre, pop=pop) -> tuple[float, float]:
            means = np.array([g.mean((0, 2, 3)) for g in groups])
            squares = np.array([g.var((0, 2, 3)) for g in groups])
            if norm == "mabn":  # no mean, E[y^2]
                means, squares = 0 * means, squares + means**2
            ratio = np.sqrt(squares + layer.norm.eps) / pop - 1  # noqa: B023
            return np.sqrt((ratio**2).mean()), np.sqrt((((means - centre) / pop) ** 2).mean())

        for size in report.sizes:
            groups = [y[start : start + size] for start in range(0, count - size + 1, size)]
            assert (gap.sigma[size], gap.mean[size]) == pytest.approx(by_hand(groups), rel=1e-9, abs=1e-12)
        assert (gap.stale_sigma, gap.stale_mean) == pytest.approx(by_hand([y]), rel=1e-9, abs=1e-12)


def test_pairs_are_pooled_and_an_odd_one_is_left_out():
    rows = torch.randn(5, 4, 30, dtype=torch.float64)  # 5 images of 4 channels
    of_images = Moments(count=torch.tensor(30.0), mean=rows.mean(-1), var=rows.var(-1, correction=0))
    pairs = pooled_pairs(of_images)
    together = rows[:4].view(2, 2, 4, 30).transpose(1, 2).flatten(2)
    assert pairs.count == 60
    torch.testing.assert_close(pairs.mean, together.mean(-1))
    torch.testing.assert_close(pairs.var, together.var(-1, correction=0))


def test_population_statistics_of_the_same_images_are_not_stale():
    made, images = network(), make_images(16)
    recalibrate(made, [images])
    report = measure_norms(made, [images])
    assert max(gap.stale for gap in report.layers) < 0.01  # N - 1 in the running variance
    assert all(list(gap.mean.values()) == sorted(gap.mean.values(), reverse=True) for gap in report.layers)
    assert "no layer differs" in report.verdict(mini_batch=16, effective=None)


def test_the_network_is_left_as_it_was():
    made = network().train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    measure_norms(made, [make_images(4)])
    assert made.training and all(torch.equal(before[name], t) for name, t in made.state_dict().items())
    assert not any(module._forward_pre_hooks for module in made.modules())


def test_one_image_makes_a_report():
    report = measure_norms(network(), [make_images(1)])
    assert report.sizes == (1,)
    assert "mini-batches of 4 images (measured at 1)" in report.verdict(mini_batch=4, effective=16)


@pytest.mark.parametrize("norm", ["gn", "none"])
def test_a_network_without_batch_statistics_is_refused(norm):
    with pytest.raises(UserError, match="no norm with running statistics"):
        measure_norms(network(norm), [make_images(2)])


def test_no_image_is_refused():
    with pytest.raises(UserError, match="there is no image"):
        measure_norms(network(), [])


# --- in words ------------------------------------------------------------------------------------------------


def layer_gap(layer: int, sigma: float, mean: float, stale: float = 0.0) -> LayerGap:
    """Falling to a tenth at 16 images."""
    return LayerGap(
        layer=layer,
        name="conv 3x3",
        channels=8,
        sigma={2: sigma, 16: sigma / 10},
        mean={2: mean, 16: mean / 10},
        stale_sigma=stale,
        stale_mean=0.0,
    )


def test_the_verdict_names_the_layers():
    layers = (layer_gap(0, 0.1, 0.2), layer_gap(3, 0.31, 0.1), layer_gap(7, 0.1, 0.9, stale=0.4))
    report = NormReport(layers=layers, sizes=(2, 16), images=20)
    first, second, third = report.verdict(mini_batch=2, effective=16).splitlines()
    assert first == ("mini-batches of 2 images: 2 of 3 layers differ by more than 30% (3, 7), the most 90% in layer 7")
    assert second == "16 images pooled: no layer differs by more than 30%, the most is 9% in layer 7"
    assert third.startswith("running statistics against these 20 images: 1 of 3 layers differ by more than 30% (7)")
    assert third.endswith("evaluate.py --recalibrate-on replaces them")


def test_a_verdict_without_a_pool_has_no_line_for_it():
    report = NormReport(layers=(layer_gap(0, 0.1, 0.2),), sizes=(2, 16), images=20)
    assert len(report.verdict(mini_batch=2, effective=2).splitlines()) == 2
    assert len(report.verdict(mini_batch=2, effective=None).splitlines()) == 2


def test_the_table_has_a_row_a_layer_in_per_cent():
    report = NormReport(layers=(layer_gap(0, 0.1, 0.2), layer_gap(12, 1.5, 0.25)), sizes=(2, 16), images=20)
    lines = report.table().splitlines()
    assert lines[-1].split() == ["12", "conv", "3x3", "8", "|", "150", "15", "0", "|", "25", "2", "0"]
    assert len({line.index("|") for line in lines}) == 1
