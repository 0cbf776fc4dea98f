"""What is written is what darknet would compute with, bit for bit where it was read; and else it is refused."""

from __future__ import annotations

import filecmp
import json
import os
import re
from pathlib import Path

import pytest
import torch

from cfg.plan import load_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.fold import fold
from models.norms.options import NormOptions
from models.norms.table import NORMS
from models.weights.reader import Header, read_weights
from models.weights.writer import write_weights
from tests import darknet_fixtures
from tests.models.norms.kinds import BN_IN_INFERENCE, KINDS
from tests.models.weights.nets import SMALL, heads_of, network_of, plan_of, written
from tests.reference import darknet_weights as oracle
from tests.reference.darknet_cfg import NARROW
from utils.errors import UserError

BN = norm_factory(NormOptions())
WITHOUT_STATISTICS = [norm for norm, spec in NORMS.items() if not spec.has_running_statistics]

# --- there and back, bit for bit ------------------------------------------------------------------------------


SMALLEST = ("yolov4-tiny-3l", "yolov3-tiny", "enet-coco", "darknet53")
OTHERS = sorted({path.stem for path in NARROW.glob("*.cfg")} - set(SMALLEST))


@pytest.mark.parametrize("name", ["small", *SMALLEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_file_comes_back_bit_for_bit(tmp_path, name):
    text = SMALL if name == "small" else (NARROW / f"{name}.cfg").read_text(encoding="utf-8")
    plan = plan_of(text)
    network = network_of(plan)
    write_weights(tmp_path / "a", network, seen=2_048_003)
    read = read_weights(tmp_path / "a", plan)
    assert read.is_complete and read.header == Header(seen=2_048_003)
    other = Network(plan, BN)
    other.load_state_dict(read.state)
    for key, tensor in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(other.state_dict()[key], tensor), key
    write_weights(tmp_path / "b", other, seen=read.header.seen)
    assert filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)


def test_it_is_the_file_the_oracle_makes(tmp_path):
    raw, plan = oracle.random_file(SMALL, seed=3, seen=2**33), plan_of()
    network = Network(plan, BN)
    network.load_state_dict(read_weights(written(tmp_path / "a", raw), plan).state)
    write_weights(tmp_path / "b", network, seen=2**33)
    assert (tmp_path / "b").read_bytes() == raw
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["yolov4", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-csp", "yolov3", "yolov3-spp", "yolov3-tiny"]
)
def test_whole_networks_come_back_bit_for_bit(tmp_path, shared: Path, name):
    fixtures = shared / "darknet" / "fixtures"
    facts = json.loads((fixtures / f"fwd_{name}.json").read_text())
    cfg, made = shared / "darknet" / "cfg" / f"{name}.cfg", tmp_path / "made.weights"
    darknet_fixtures.write_weights(fixtures, cfg, made, facts)
    assert made.stat().st_size == facts["weights_bytes"]
    plan = load_plan(str(cfg), input_hw=(96, 128))
    read = read_weights(made, plan)
    assert read.is_complete and read.header == Header(seen=2_048_000)
    assert re.fullmatch(r"loaded (\d+) of \1 convolutions, 0 bytes left", read.report)
    network = Network(plan, BN)
    network.load_state_dict(read.state)
    write_weights(tmp_path / "again.weights", network, seen=read.header.seen)
    assert filecmp.cmp(made, tmp_path / "again.weights", shallow=False)


# --- every norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BN_IN_INFERENCE)
def test_what_darknet_gets_computes_the_same(tmp_path, kind):
    """Centred and standardized filters as they are used, another eps in the variance; all else as it is."""
    plan, options = plan_of(), KINDS[kind]
    network = network_of(plan, options)
    write_weights(tmp_path / "a", network, seen=0)
    read = read_weights(tmp_path / "a", plan)
    stock = Network(plan, BN)
    stock.load_state_dict(read.state)
    torch.testing.assert_close(heads_of(stock.eval()), heads_of(network), atol=1e-5, rtol=1e-5)
    settled = norm_factory(options).options
    moved = {
        key.rpartition(".")[2]
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked") and not torch.equal(read.state[key], tensor)
    }
    expected = {"weight"} if settled.weight_centralization or settled.spec.ws else set()
    assert moved == expected | ({"running_var"} if settled.norm_eps != 1e-5 else set())


def test_a_smaller_eps_needs_variances_that_can_spare_it(tmp_path):
    plan = plan_of()
    network = network_of(plan, NormOptions(norm_eps=1e-8))
    network.layers[4].norm.running_var[5] = 9.0e-6
    where = r"layer 4 \[convolutional\] \(small\.cfg:\d+\)"
    with pytest.raises(
        UserError, match=rf"^{where}: a variance of 9e-06 with eps 1e-08 is less than darknet's eps of 1e-05"
    ):
        write_weights(tmp_path / "a", network, seen=0)
    network.layers[4].norm.running_var[5] = 1.0e-5
    write_weights(tmp_path / "a", network, seen=0)
    stock = Network(plan, BN)
    stock.load_state_dict(read_weights(tmp_path / "a", plan).state)
    torch.testing.assert_close(heads_of(stock.eval()), heads_of(network), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["gn", "ln", "in", "bcn", "evonorm-s0", "frn"])
def test_norms_of_single_images_are_refused(tmp_path, norm):
    network = network_of(plan_of(), NormOptions(norm=norm))
    reason = "(has no running statistics|is not batch norm in inference); darknet has batch norm only"
    with pytest.raises(UserError, match=rf"^layer 0 \[convolutional\] \(small\.cfg:8\): \w+Norm\w* {reason}"):
        write_weights(tmp_path / "a", network, seen=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make", [lambda: network_of(plan_of(), NormOptions(norm="none")), lambda: fold(network_of(plan_of()))]
)
def test_a_bias_in_place_of_a_norm_is_refused(tmp_path, make):
    with pytest.raises(UserError, match=r"^layer 0 .*\(small\.cfg:8\): has a bias in place of the cfg's batch norm"):
        write_weights(tmp_path / "a", make(), seen=0)
    assert not list(tmp_path.iterdir())


def test_without_batch_norm_in_the_cfg_every_norm_is_the_same(tmp_path):
    plan = plan_of(SMALL.replace("batch_normalize=1\n", ""))
    files = {}
    for norm in ("gn", "none", "bn"):
        torch.manual_seed(0)
        write_weights(tmp_path / norm, network_of(plan, NormOptions(norm=norm)), seen=0)
        files[norm] = (tmp_path / norm).read_bytes()
    assert files["gn"] == files["none"] == files["bn"]


# --- values and files -----------------------------------------------------------------------------------------


def test_values_that_no_reader_would_take_are_not_written(tmp_path):
    network = network_of(plan_of())
    with torch.no_grad():
        network.layers[1].conv.weight[2, 1] = float("nan")
    path = written(tmp_path / "a", b"as before")
    with pytest.raises(UserError, match=r"a: cannot be written, in layer 1 .* weights\[9\] is nan$"):
        write_weights(path, network, seen=0)
    assert path.read_bytes() == b"as before" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_rounded_to_float32(tmp_path, dtype):
    plan, network = plan_of(), network_of(plan_of()).to(dtype)
    write_weights(tmp_path / "a", network, seen=0)
    for name, tensor in read_weights(tmp_path / "a", plan).state.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, network.state_dict()[name].float())
