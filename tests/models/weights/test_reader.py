"""Every byte of a .weights file is accounted for: as darknet's own files and a slow oracle say, or refused."""

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cfg.plan import parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.weights.layout import stored_layers
from models.weights.reader import SETTLED_BATCHES, Header, read_weights
from tests.models.weights.nets import SMALL, plan_of, written
from tests.reference import darknet_weights as oracle
from utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "weights"


def values_of(plan, state: dict[str, torch.Tensor]) -> dict[tuple[int, str], list[float]]:
    """By layer and darknet's word, as the oracle gives them."""
    arrays = [(layer.node.index, array) for layer in stored_layers(plan) for array in layer.loaded]
    return {(index, a.word): state[a.name].flatten().tolist() for index, a in arrays if a.name in state}


def refusal(path: Path, plan) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path, plan)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return said.removeprefix(f"{path}: ")


# --- what darknet wrote ---------------------------------------------------------------------------------------


def test_darknets_own_files_give_darknets_outputs_and_statistics(tmp_path):
    """Before and after an iteration of two mini-batches in darknet itself (CPU build with cuDNN's batch norm).

    The first mini-batch's outputs show weights, biases, gammas and betas; the file after it means and variances.
    """
    golden = np.load(GOLDEN / "darknet_small.npz")
    plan = parse_plan((GOLDEN / "darknet_small.cfg").read_text(), path="small.cfg")
    before, after = (
        read_weights(written(tmp_path / name, oracle.header() + golden[name].tobytes()), plan)
        for name in ("before", "after")
    )
    assert before.report == "loaded 4 of 4 convolutions, 0 bytes left"
    network = Network(plan, norm_factory(NormOptions(norm_momentum=0.01)))
    network.load_state_dict(before.state)
    outputs = []
    network.layers[10].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    for images in torch.from_numpy(golden["images"]).split(2):
        network(images)
    np.testing.assert_allclose(outputs[0].numpy(), golden["layer10"], atol=1e-5)
    state = network.state_dict()
    names = [name for name in state if "running" in name]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(state[name], after.state[name], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(before.state[name], after.state[name], atol=1e-4)


# --- against the oracle ---------------------------------------------------------------------------------------


def test_a_whole_file(tmp_path):
    raw = oracle.random_file(SMALL, seen=2**40 + 3)
    plan = plan_of()
    read = read_weights(written(tmp_path / "a.weights", raw), plan)
    seen, values = oracle.read(SMALL, raw)
    assert read.header == Header(major=0, minor=2, revision=5, seen=seen) and seen == 2**40 + 3
    assert values_of(plan, read.state) == values
    assert read.is_complete
    assert read.report == "loaded 5 of 5 convolutions and 2 of 2 weighted shortcuts, 0 bytes left"
    network = Network(plan, norm_factory(NormOptions()))
    network.load_state_dict(read.state)  # strict: nothing missing, nothing more
    assert read.state["layers.2.weight"].shape == (2, 4) and read.state["layers.6.weight"].shape == (3,)


@pytest.mark.parametrize(("version", "size"), [((0, 1, 0), 16), ((0, 2, 0), 20), ((0, 2, 5), 20)])
def test_old_headers_count_images_in_four_bytes(tmp_path, version, size):
    payload = oracle.random_file(SMALL)[20:]
    raw = oracle.header(77, version) + payload
    assert len(raw) == size + len(payload)
    read = read_weights(written(tmp_path / "a.weights", raw), plan_of())
    assert (read.header.major, read.header.minor, read.header.revision) == version
    assert read.header.seen == 77
    assert values_of(plan_of(), read.state) == oracle.read(SMALL, raw)[1]


def test_a_thousand_truncations(tmp_path):
    """Half of them anywhere, half at the ends of layers or a few bytes beside."""
    raw, plan, draw = oracle.random_file(SMALL, seen=5), plan_of(), random.Random(0)
    ends, position = [20], 20
    for _, arrays in oracle.layers_of(SMALL):
        position += sum(4 * array.size for array in arrays)
        ends.append(position)
    assert ends[-1] == len(raw)
    path, outcomes = tmp_path / "a.weights", Counter()
    for number in range(1000):
        cut = draw.randrange(len(raw)) if number % 2 else draw.choice(ends) + draw.choice([-4, -1, 0, 0, 1, 4])
        outcomes[judged(path, raw[: max(cut, 0)], plan)] += 1
    assert outcomes["partial"] > 100 and outcomes["refused in a layer"] > 300 and outcomes["refused"] > 10


def test_a_thousand_flips_in_the_header(tmp_path):
    """Each single bit of it, then two and three at a time; of a whole file and of a partial one."""
    whole, plan, draw = oracle.random_file(SMALL, seen=5), plan_of(), random.Random(1)
    convolution = 4 * next(sum(array.size for array in arrays) for _, arrays in oracle.layers_of(SMALL))
    path, outcomes = tmp_path / "a.weights", Counter()
    for number in range(1000):
        raw = bytearray(whole if number % 4 else whole[: 20 + convolution])
        bits = [number % 160] if number < 320 else draw.sample(range(160), draw.choice([2, 3]))
        for bit in bits:
            raw[bit // 8] ^= 1 << bit % 8
        outcomes[judged(path, bytes(raw), plan)] += 1
    assert outcomes["whole"] > 50 and outcomes["partial"] > 20 and outcomes["refused"] > 500


def judged(path: Path, raw: bytes, plan) -> str:
    """What reader and oracle both make of the file."""
    path.write_bytes(raw)
    try:
        seen, values = oracle.read(SMALL, raw)
    except oracle.Refused as refused:
        said = refusal(path, plan)
        if refused.layer is None:
            return "refused"
        assert re.search(r"layer \d+ \[\w+\] \(small\.cfg:\d+\)", said)
        if raw[:20] == oracle.header(5):  # else the oracle stumbled over shifted values before it saw the size
            assert f"it ends inside layer {refused.layer} [" in said
        return "refused in a layer"
    read = read_weights(path, plan)
    assert read.header.seen == seen
    assert values_of(plan, read.state) == values
    assert read.is_complete == ("re-initialized" not in read.report)
    return "whole" if read.is_complete else "partial"


# --- partial files --------------------------------------------------------------------------------------------


def test_a_partial_file_says_where_it_ends(tmp_path):
    raw, plan = oracle.random_file(SMALL), plan_of()
    end = 20 + sum(4 * array.size for index, arrays in oracle.layers_of(SMALL) for array in arrays if index < 5)
    read = read_weights(written(tmp_path / "small.conv.5", raw[:end]), plan)
    line = SMALL.split("\n").index("groups=2") + 6  # of the section after
    assert read.report == (
        f"loaded 3 of 5 convolutions and 1 of 2 weighted shortcuts, 0 bytes left; the file ends before layer 5 "
        f"[convolutional] (small.cfg:{line}): it and all after it are re-initialized"
    )
    assert SMALL.split("\n")[line - 1] == "[convolutional]"
    assert not read.is_complete
    assert {name.split(".")[1] for name in read.state} == {"0", "1", "2", "4"}


def test_a_file_without_a_layer_is_none(tmp_path):
    assert refusal(written(tmp_path / "a", oracle.header()), plan_of()) == (
        "a header of a darknet .weights file and nothing behind it"
    )


# --- dontload -------------------------------------------------------------------------------------------------


def test_layers_that_are_not_for_loading_take_nothing_from_the_file(tmp_path):
    text = SMALL.replace("filters=4\nsize=3", "filters=4\ndontload=1\nsize=3")
    text = text.replace("antialiasing=1", "antialiasing=1\ndontloadscales=1")
    raw, plan = oracle.random_file(text, skip_unread=True), plan_of(text)
    read = read_weights(written(tmp_path / "a", raw), plan)
    assert values_of(plan, read.state) == oracle.read(text, raw)[1]
    assert not any(name.startswith("layers.0.") for name in read.state)
    norm = {name.rpartition(".")[2]: tensor for name, tensor in read.state.items() if name.startswith("layers.4.norm")}
    assert norm["weight"].eq(1).all() and norm["running_mean"].eq(0).all() and norm["running_var"].eq(1).all()
    assert norm["num_batches_tracked"] == 0 and norm["bias"].abs().min() > 0
    assert read.state["layers.5.norm.num_batches_tracked"] == SETTLED_BATCHES
    assert not read.is_complete
    assert read.report.startswith("loaded 4 of 5 convolutions and")
    assert read.report.endswith("0 bytes left; dontload=1 in layers 0; dontloadscales=1 in layers 4")
    assert "layer 4 [convolutional]" in refusal(written(tmp_path / "a", raw[:600]), plan)


def test_a_cfg_that_loads_nothing(tmp_path):
    text = "[net]\nwidth=8\nheight=8\n[convolutional]\ndontload=1\n"
    path = written(tmp_path / "a", oracle.random_file(text))
    with pytest.raises(UserError, match=r"^x\.cfg: has no layer that reads anything"):
        read_weights(path, parse_plan(text, path="x.cfg"))


# --- what cannot be right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [1, 4, 400])
def test_a_file_that_is_too_long(tmp_path, extra):
    said = refusal(written(tmp_path / "a", oracle.random_file(SMALL) + bytes(extra)), plan_of())
    assert re.match(
        rf"{extra} bytes are left behind layer 7 \[convolutional\] \(small\.cfg:\d+\), the last with weights: a "
        r"damaged file, or one of another network",
        said,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_in_every_array(tmp_path, value):
    plan, raw, position = plan_of(), oracle.random_file(SMALL), 20
    for layer in stored_layers(plan):
        for array in layer.arrays:
            place = position + 4 * (array.size // 2)
            broken = raw[:place] + struct.pack("<f", value) + raw[place + 4 :]
            said = refusal(written(tmp_path / "a", broken), plan)
            wanted = f"layer {layer.node.index} [{layer.node.spec.kind}] (small.cfg:{layer.node.line}): "
            assert said.startswith(f"{wanted}{array.word}[{array.size // 2}] is {value:g}: ")
            position += 4 * array.size
    assert position == len(raw)


def test_variances_are_not_negative_and_all_else_may_be(tmp_path):
    plan, raw, position = plan_of(), oracle.random_file(SMALL), 20
    for layer in stored_layers(plan):
        for array in layer.arrays:
            broken = raw[:position] + struct.pack("<f", -1e-6) + raw[position + 4 :]
            path = written(tmp_path / "a", broken)
            if array.word == "rolling_variance":
                assert f"(small.cfg:{layer.node.line}): rolling_variance[0] is -1e-06: " in refusal(path, plan)
            else:
                assert read_weights(path, plan).state[array.name].flatten()[0] == pytest.approx(-1e-6)
            position += 4 * array.size


def test_a_variance_of_zero_is_what_darknet_starts_with(tmp_path):
    raw, plan = oracle.random_file(SMALL), plan_of()
    first = 20 + 3 * 16  # behind biases, scales and means of four filters
    read = read_weights(written(tmp_path / "a", raw[:first] + bytes(16) + raw[first + 16 :]), plan)
    assert read.state["layers.0.norm.running_var"].eq(0).all()


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_the_wrong_number_of_classes_is_recognised(tmp_path, classes):
    other = SMALL.replace("classes=2", f"classes={classes}").replace("filters=21", f"filters={3 * (5 + classes)}")
    said = refusal(written(tmp_path / "a", oracle.random_file(other)), plan_of())
    assert said.endswith(f"a damaged file, or one of another network (it would fit with classes={classes})")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "neither a checkpoint of this project nor a darknet .weights file: it is too short"),
        (
            b"[net]\nwidth=3\n" * 99,
            "neither a checkpoint of this project nor a darknet .weights file: version 1952804443",
        ),
        (oracle.header(0, (0, 3, 0)) + bytes(99), "nor a darknet .weights file: version 0.3.0 is neither 0.1 nor 0.2"),
        (oracle.header(0, (1, 0, 0)) + bytes(99), "version 1.0.0 is neither"),
        (oracle.header(0, (0, 2, -5)) + bytes(99), "version 0.2.-5 is neither"),
        (oracle.header()[:19], "ends inside the header of a darknet .weights file"),
        (
            oracle.header(2**60) + bytes(99),
            "its header is damaged: 1152921504606846976 images seen",
        ),
    ],
)
def test_what_is_no_weights_file(tmp_path, raw, sentence):
    assert sentence in refusal(written(tmp_path / "a", raw), plan_of())


def test_no_file_at_all(tmp_path):
    assert refusal(tmp_path / "gone", plan_of()) == "cannot be read, No such file or directory"
    assert refusal(tmp_path, plan_of()) == "cannot be read, Is a directory"


def test_the_header_that_is_written():
    assert Header(seen=9).to_bytes() == oracle.header(9)
