"""Broken cfgs: whatever is done to one, it is a network, or one sentence that names file and line."""

from __future__ import annotations

import re
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cfg.parse import CfgError
from cfg.plan import Plan, parse_plan
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from tests.models.test_network import ZOO
from tests.reference.darknet_cfg import NARROW

BN = norm_factory(NormOptions(norm="bn"))
BASES = [
    ZOO,
    *(
        (NARROW / f"{name}.cfg").read_text()
        for name in ("yolov3-tiny-prn", "yolov4-tiny-3l", "yolov7-tiny", "enet-coco")
    ),
]
FEW_PARAMETERS = 500_000
FEW_CELLS = 300_000  # of all outputs together

NUMBERS = ["0", "-1", "1", "2", "3", "7", "64", "1000", "65536", "32768", "1000000000", "2147483648", "-2147483649"]
ODD_VALUES = ["", "nan", "inf", "-inf", "1e9", "1e999", "0.5", ".5", "-0", "+3", "9" * 400, "0x10", "1_000", "३"]
ODD_VALUES += [
    "1,2",
    "-1,-2,-3,-4",
    ",",
    "1,",
    "-1,0,1,2,3",
    "=",
    "[",
    "]",
    "#",
    "1#2",
    "1;2",
    "\0",
    "é",
    "\ufeff",
    "\u2028",
]
WORDS = ["leaky", "mish", "logistic", "hard_mish", "per_channel", "per_feature", "softmax", "relu", "ciou", "greedynms"]
SECTIONS = ["net", "conv", "max", "route", "shortcut", "yolo", "upsample", "sam", "scale_channels", "reorg3d", "avg"]
SECTIONS += ["dropout", "soft", "local_avg", "activation", "cost", "contrastive", "empty", "region", "lstm", "x", ""]
KEYS = ["filters", "size", "stride", "stride_x", "pad", "padding", "groups", "group_id", "dilation", "antialiasing"]
KEYS += ["layers", "from", "weights_type", "weights_normalization", "activation", "batch_normalize", "cbn", "classes"]
KEYS += ["anchors", "mask", "num", "new_coords", "maxpool_depth", "out_channels", "scale_wh", "reverse", "scale"]
KEYS += ["width", "height", "channels", "probability", "temperature", "steps", "scales", "policy", "counters_per_class"]

values = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(ODD_VALUES), st.sampled_from(WORDS), st.integers().map(str), st.text()
)
places = st.integers(0, 10_000)
mutations = st.one_of(
    st.tuples(st.just("value"), places, values),
    st.tuples(st.just("key"), places, st.one_of(st.sampled_from(KEYS), st.text(max_size=8))),
    st.tuples(st.just("insert"), places, st.builds("{}={}".format, st.sampled_from(KEYS), values)),
    st.tuples(st.just("insert"), places, st.sampled_from(SECTIONS).map("[{}]".format)),
    st.tuples(st.just("insert"), places, st.text()),
    st.tuples(st.sampled_from(["delete", "duplicate", "swap", "cut", "move section"]), places, places),
)


def mutated(text: str, changes: list[tuple]) -> str:
    lines = text.split("\n")
    for kind, place, extra in changes:
        at = place % len(lines)
        key, equals, _ = lines[at].partition("=")
        if kind == "value" and equals:
            lines[at] = f"{key}={extra}"
        elif kind == "key" and equals:
            lines[at] = lines[at].replace(key, extra, 1)
        elif kind == "insert":
            lines.insert(at + 1, extra)
        elif kind == "delete" and len(lines) > 1:
            del lines[at]
        elif kind == "duplicate":
            lines.insert(extra % len(lines), lines[at])
        elif kind == "swap":
            other = extra % len(lines)
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "cut":
            lines = "\n".join(lines)[: -1 - extra % 300].split("\n")
        elif kind == "move section":
            parts = re.split(r"(?m)^(?=\[)", "\n".join(lines))
            parts.insert(extra % len(parts), parts.pop(place % len(parts)))
            lines = "".join(parts).split("\n")
    return "\n".join(lines)


def check_cfg(text: str) -> None:
    try:
        plan = parse_plan(text, path="fuzz.cfg")
    except CfgError as error:
        place = re.match(r"fuzz\.cfg:(\d+): .", str(error))
        assert place and 1 <= int(place[1]) <= text.count("\n") + 1, str(error)
        event("refused")
        return
    event("a network")
    assert all(re.match(r"fuzz\.cfg:\d+: .", warning) for warning in plan.warnings)
    check_network(plan)


def check_network(plan: Plan) -> None:
    """Where that takes much memory, without any: shapes are computed all the same."""
    cells = sum(node.shape.channels * node.shape.height * node.shape.width for node in plan.nodes)
    light = plan.parameter_count() <= FEW_PARAMETERS and cells <= FEW_CELLS
    with torch.device("cpu" if light else "meta"), torch.no_grad():
        network = Network(plan, BN).eval()
        images = torch.zeros(1, plan.net.channels, *plan.net.input_hw)
        shapes = [head.logits.shape for head in network(images)] or [network.last_output(images).shape]
    assert sum(p.numel() for p in network.parameters()) == plan.parameter_count()
    if plan.heads:
        grids = [plan.nodes[index].shape for index in plan.heads]
        expected = [
            (1, len(head.mask), grid.height, grid.width, 5 + head.classes)
            for head, grid in zip(plan.head_specs, grids, strict=True)
        ]
    else:
        expected = [(1, *plan.nodes[-1].shape)]
    assert shapes == expected


REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(REPEATABLE, max_examples=300)
@given(st.sampled_from(BASES), st.lists(mutations, min_size=1, max_size=5))
def test_300_mutated_cfgs(base, changes):
    check_cfg(mutated(base, changes))


@pytest.mark.slow
@settings(REPEATABLE, max_examples=2000)
@given(st.sampled_from(BASES), st.lists(mutations, min_size=1, max_size=5))
def test_2000_mutated_cfgs(base, changes):
    check_cfg(mutated(base, changes))


def test_the_bases_are_networks():
    for base in BASES:
        check_network(parse_plan(base, path="fuzz.cfg"))


# --- memory --------------------------------------------------------------------------------------------------

HEAD = "[net]\nwidth=608\nheight=608\n[conv]\nfilters=32\n"
GREEDY = {
    "a billion filters": HEAD + "[conv]\nfilters=1000000000\n",
    "a billion parameters": HEAD + "[conv]\nfilters=32768\n[conv]\nfilters=32768\n",
    "a billion groups": HEAD + "[conv]\nfilters=32\ngroups=1000000000\n",
    "a huge kernel": HEAD + "[conv]\nfilters=65536\nsize=1023\npad=1\n",
    "a huge input": "[net]\nwidth=32768\nheight=32768\nchannels=1024\n[conv]\n",
    "a billion classes": HEAD + "[yolo]\nclasses=1000000000\nanchors=1,1\n",
    "blown up": HEAD + "[upsample]\nstride=64\n" * 4,
    "doubled 40 times": HEAD + "[route]\nlayers=-1,-1\n" * 40,
    "10,000 sources": HEAD + "[route]\nlayers=" + ",".join(["0"] * 10_000) + "\n",
    "a weight per channel of 10,000 sources": HEAD
    + "[conv]\nfilters=65536\n[shortcut]\nweights_type=per_channel\nfrom="
    + ",".join(["1"] * 10_000)
    + "\n",
    "padding without end": HEAD + "[conv]\nsize=1023\npad=1\ndilation=1024\n",
    "a window without end": HEAD + "[conv]\nfilters=65536\n[max]\nsize=1024\nstride=1024\n",
    "5,000 layers": HEAD + "[conv]\n" * 5000,
}


@pytest.mark.parametrize("what", GREEDY)
def test_greed_is_refused_before_anything_is_allocated(what):
    tracemalloc.start()
    try:
        with pytest.raises(CfgError, match=r"^greedy\.cfg:\d+: "):
            parse_plan(GREEDY[what], path="greedy.cfg")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20
