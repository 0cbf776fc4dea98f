"""Training from a .weights file: every norm starts with what it can use of it, and keeps it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.norms.running_stats import has_running_statistics
from models.norms.table import NORMS
from models.norms.used_weight import filters_of
from models.stored_network import make_checkpoint
from models.weights.start import load_matching, read_start, start_from
from models.weights.writer import write_weights
from tests.models.norms.kinds import BN_IN_INFERENCE, KINDS
from tests.models.weights.nets import SMALL, heads_of, network_of, plan_of, written
from tests.reference import darknet_weights as oracle
from tests.toy_checkpoint import toy_checkpoint
from utils.clock import BatchClock
from utils.errors import UserError

CENTRALIZED = "; filters are centralized from here on: the network computes something else"
STANDARDIZED = CENTRALIZED.replace("centralized", "standardized")


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Network, str, str]:
    """A network, its .weights file and its cfg."""
    network = network_of(plan_of())
    write_weights(tmp_path / "small.weights", network, seen=640)
    (tmp_path / "small.cfg").write_text(SMALL)
    return network, str(tmp_path / "small.weights"), str(tmp_path / "small.cfg")


def fresh(options: NormOptions, *, classes: int = 2) -> Network:
    return Network(parse_plan(SMALL, path="small.cfg", classes=classes), norm_factory(options))


@pytest.mark.parametrize("kind", BN_IN_INFERENCE)
def test_a_norm_with_statistics_keeps_all_of_it(trained, kind):
    """Also after its first batch, which moves the statistics by its momentum and does not replace them."""
    network, weights, cfg = trained
    other = fresh(KINDS[kind])
    said = start_from(weights, cfg, other)
    wanted = f"{weights}: loaded 5 of 5 convolutions and 2 of 2 weighted shortcuts, 0 bytes left"
    assert said == wanted + {"": "", "centralized": CENTRALIZED, "standardized": STANDARDIZED}[filters_of(other)]
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(other.state_dict()[name], tensor), name
    norm, loaded = other.train().layers[0].norm, network.layers[0].norm.running_mean
    images = 50 + torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1)  # far from what the statistics are of
    for part in BatchClock(other).minibatches(images.split(2)):
        other(part)
    mean = torch.zeros(4) if kind.startswith("mabn") else other.layers[0].conv(images).mean((0, 2, 3))
    updates = 2 if kind in ("bn", "bn-centred", "bn-ws", "cmbn-darknet") else 1  # after each mini-batch, or each batch
    share = 0 if kind == "frozen" else 1 - (1 - norm.momentum) ** updates
    torch.testing.assert_close(norm.running_mean, loaded + share * (mean.detach() - loaded), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("norm", ["gn", "ln", "in"])
def test_a_norm_without_statistics_takes_gamma_and_beta_and_says_so(trained, norm):
    network, weights, cfg = trained
    other = fresh(NormOptions(norm=norm))
    said = start_from(weights, cfg, other)
    assert said.endswith("0 bytes left; this norm has no running means and variances to load")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_without_a_norm_it_is_merged(trained):
    network, weights, cfg = trained
    other = fresh(NormOptions(norm="none"))
    said = start_from(weights, cfg, other)
    assert said.endswith("0 bytes left; batch norm is merged into weights and biases")
    torch.testing.assert_close(heads_of(other.eval()), heads_of(network), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_heads_for_other_classes_start_fresh_and_all_else_does_not(trained, norm):
    _, weights, cfg = trained
    other = fresh(NormOptions(norm=norm), classes=7)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    said = start_from(weights, cfg, other)
    assert "; of another size in this network, so re-initialized: layers.7.conv" in said
    # darknet's file has no group norm behind batch norm, and no parameters of an activation.
    not_there = [name.rpartition(".")[0] for name in before if re.search(r"norm\.(channel\.weight|v|tau)$", name)]
    for name, tensor in other.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            is_fresh = name.startswith("layers.7.") or name.rpartition(".")[0] in not_there
            assert torch.equal(tensor, before[name]) == is_fresh, name


@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_for_other_classes_keeps_all_but_the_heads_own_convolutions(tmp_path, norm):
    options = NormOptions(norm=norm)
    network = network_of(plan_of(), options)
    path = checkpoint_of(network, ("a", "b"), tmp_path / "best.pt", options)
    other = fresh(options, classes=7)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    kept = {name.rpartition(".")[0] for name in before} - {"layers.7.conv"}
    said = start_from(path, None, other)
    assert said == f"{len(kept)} layers from {path}, 1 re-initialized layers.7.conv"
    for name, tensor in other.state_dict().items():
        wanted = before if name.startswith("layers.7.") else network.state_dict()
        assert torch.equal(tensor, wanted[name]), name


def checkpoint_of(network: Network, names: tuple[str, ...], path: Path, norm: NormOptions | None = None) -> str:
    weights = network.state_dict()
    make_checkpoint(network.plan, norm or NormOptions(), weights, class_names=names, letterbox=False).to_file(path)
    return str(path)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("ab", None),
        ("ba", "2 of 2 classes are known by name"),
        ("bc", "1 of 2 classes are known by name, the heads' rows of the others are re-initialized"),
        ("cd", "0 of 2 classes are known by name, the heads' rows of the others are re-initialized"),
        ("cba", "2 of 3 classes are known by name, the heads' rows of the others are re-initialized"),
        ("b", "1 of 1 classes are known by name"),
    ],
)
def test_the_line_says_how_many_classes_a_checkpoint_knows(tmp_path, now, said):
    network = network_of(plan_of())
    path = checkpoint_of(network, ("a", "b"), tmp_path / "x.pt")
    other = fresh(NormOptions(), classes=len(now))
    before = other.state_dict()["layers.7.conv.bias"].clone()
    line = start_from(path, None, other, now)
    assert line == f"10 layers from {path}, 0 re-initialized" + (f"; {said}" if said else "")
    biases, old = other.state_dict()["layers.7.conv.bias"].view(3, -1), network.state_dict()["layers.7.conv.bias"]
    for row, name in enumerate(now, start=5):
        wanted = old.view(3, -1)[:, 5 + "ab".index(name)] if name in "ab" else before.view(3, -1)[:, row]
        assert torch.equal(biases[:, row], wanted), name
    assert torch.equal(biases[:, :5], old.view(3, -1)[:, :5])


@pytest.mark.parametrize(("before", "now"), [(("class 0", "class 1"), "xy"), (("a", "b"), None)])
def test_where_names_are_not_known_heads_that_fit_are_taken_as_they_are(tmp_path, before, now):
    """As those of darknet's weights that were made a checkpoint without --names."""
    network, other = network_of(plan_of()), fresh(NormOptions())
    path = checkpoint_of(network, before, tmp_path / "x.pt")
    assert start_from(path, None, other, now).endswith("0 re-initialized")
    assert torch.equal(other.state_dict()["layers.7.conv.weight"], network.state_dict()["layers.7.conv.weight"])


def test_darknets_heads_are_taken_as_they_are(trained):
    network, weights, cfg = trained
    other = fresh(NormOptions())
    assert start_from(weights, cfg, other, ("x", "y")).endswith("0 bytes left")
    assert torch.equal(other.state_dict()["layers.7.conv.bias"], network.state_dict()["layers.7.conv.bias"])


def test_a_partial_file(tmp_path, trained):
    network, weights, cfg = trained
    raw = Path(weights).read_bytes()
    end = 20 + sum(4 * array.size for index, arrays in oracle.layers_of(SMALL) for array in arrays if index < 5)
    other = fresh(NormOptions(norm="cmbn"), classes=7)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    said = start_from(str(written(tmp_path / "small.conv.5", raw[:end])), cfg, other)
    assert (
        "loaded 3 of 5 convolutions and 1 of 2 weighted shortcuts, 0 bytes left; the file ends before layer 5 [" in said
    )
    for name, tensor in other.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            wanted = network.state_dict() if int(name.split(".")[1]) < 5 else before
            assert torch.equal(tensor, wanted[name]), name


def test_a_norm_that_was_not_loaded_learns_from_its_first_batch(tmp_path, trained):
    _, weights, cfg = trained
    path = written(tmp_path / "small.conv.1", Path(weights).read_bytes()[: 20 + 4 * (16 + 108)])
    other = fresh(NormOptions(norm="cmbn"))
    start_from(str(path), cfg, other)
    norms = [module for module in other.modules() if has_running_statistics(module)]
    assert [norm.num_batches_tracked.item() > 0 for norm in norms] == [True, False, False]


@pytest.mark.parametrize("norm", ["bn", "mabn", "gn"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("now", [False, True])
def test_filters_that_are_centred_on_one_side_only_are_another_function(tmp_path, norm, before, now):
    """Which is said, and is so."""
    options = NormOptions(norm=norm, weight_centralization=before)
    trained = network_of(plan_of(), options)
    checkpoint_of(trained, ("a", "b"), tmp_path / "x.pt", options)
    other = fresh(NormOptions(norm=norm, weight_centralization=now)).eval()
    said = start_from(str(tmp_path / "x.pt"), None, other)
    change = CENTRALIZED if now else CENTRALIZED.replace("are", "are no longer")
    assert said.endswith("0 re-initialized" + (change if before != now else ""))
    assert torch.equal(heads_of(other), heads_of(trained)) == (before == now)


@pytest.mark.parametrize("norms", [("gn", "gn:ws"), ("gn:ws", "gn"), ("mabn", "mabn:ws"), ("bn:ws", "bn:ws")])
def test_filters_that_are_standardized_on_one_side_only_are_another_function(tmp_path, norms):
    before, now = (NormOptions(norm=norm) for norm in norms)
    trained = network_of(plan_of(), before)
    checkpoint_of(trained, ("a", "b"), tmp_path / "x.pt", before)
    other = fresh(now).eval()
    said = start_from(str(tmp_path / "x.pt"), None, other)
    change = STANDARDIZED if now.spec.ws else STANDARDIZED.replace("are", "are no longer")
    assert said.endswith("0 re-initialized" + (change if before != now else ""))
    assert torch.equal(heads_of(other), heads_of(trained)) == (before == now)


def test_nothing_that_fits(trained):
    other = Network(
        parse_plan("[net]\nwidth=8\nheight=8\n[conv]\nfilters=9\n", path="x.cfg"), norm_factory(NormOptions())
    )
    with pytest.raises(UserError, match=r"small\.weights: none of its layers fits this network$"):
        start_from(*trained[1:], other)


# --- the settings that come with it ---------------------------------------------------------------------------


@pytest.mark.parametrize(("normalize", "norm"), [("1", "bn"), ("2", "cmbn")])
def test_the_filters_are_not_centred_and_the_norm_is_the_cfgs(trained, normalize, norm):
    _, weights, cfg = trained
    Path(cfg).write_text(SMALL.replace("batch_normalize=1", f"batch_normalize={normalize}"))
    start = read_start(weights, cfg)
    found = [start.norm[name] for name in ("norm", "weight_centralization", "norm_eps")]
    assert found == [norm, False, 1e-5]
    assert start.letterbox is True


def test_darknets_weights_need_a_cfg(trained):
    with pytest.raises(UserError, match=r"small\.weights: darknet's weights do not .*: name its cfg with --cfg$"):
        read_start(trained[1], None)


def test_a_checkpoint_is_one_whatever_it_is_called(tmp_path):
    toy_checkpoint(norm={"norm": "gn"}).to_file(tmp_path / "odd.weights")
    assert read_start(str(tmp_path / "odd.weights"), None).norm == {"norm": "gn"}


# --- layers that fit ---------------------------------------------------------------------------------------------


def test_what_fits_is_loaded_and_the_rest_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = model[1].weight.detach().clone()
    fresh_bias = model[1].bias.detach().clone()
    state = {
        "0.weight": torch.ones(4, 3),
        "0.bias": torch.full((4,), 2.0),
        "1.weight": torch.ones(5, 4),  # another class count
        "1.bias": torch.ones(2),  # would fit, but a layer is taken over as a whole or not at all
        "2.weight": torch.ones(1),  # unknown here
    }
    assert load_matching(model, state) == (1, ["1"])
    assert model[0].weight.detach().eq(1).all() and model[0].bias.detach().eq(2).all()
    assert torch.equal(model[1].weight.detach(), before)
    assert torch.equal(model[1].bias.detach(), fresh_bias)


def test_everything_and_nothing_may_fit():
    model = nn.Sequential(nn.Linear(3, 4))
    assert load_matching(model, nn.Sequential(nn.Linear(3, 4)).state_dict()) == (1, [])
    assert load_matching(model, {}) == (0, ["0"])
