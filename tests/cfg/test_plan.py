"""From text to a wired graph."""

import dataclasses
import pickle
import random

import pytest

from cfg.parse import CfgError
from cfg.plan import cfg_names, load_plan, parse_plan
from cfg.spec import Shape

NET = "[net]\nwidth=32\nheight=32\n"
HEAD = "[convolutional]\nfilters={filters}\n[yolo]\nclasses=3\nanchors=4,8, 8,4\nnum=2\nmask=0,1\n"
TINY = (
    NET
    + "[convolutional]\nfilters=8\nsize=3\nstride=2\npad=1\nbatch_normalize=1\nactivation=leaky\n"
    + "[maxpool]\nsize=2\nstride=2\n"
    + "[convolutional]\nfilters=8\nsize=1\nactivation=leaky\n"
    + "[upsample]\nstride=2\n"
    + "[route]\nlayers=-1, 0\n"
    + HEAD.format(filters=16)
)


def test_absolute_inputs_shapes_and_lines():
    plan = parse_plan(TINY, path="some/tiny.cfg")
    assert plan.name == "tiny"
    assert plan.source_text == TINY
    assert [node.inputs for node in plan.nodes] == [(-1,), (0,), (1,), (2,), (3, 0), (4,), (5,)]
    assert [node.shape for node in plan.nodes[:5]] == [
        Shape(8, 16, 16),
        Shape(8, 8, 8),
        Shape(8, 8, 8),
        Shape(8, 16, 16),
        Shape(16, 16, 16),
    ]
    assert plan.nodes[4].input_shapes == (Shape(8, 16, 16), Shape(8, 16, 16))
    assert TINY.split("\n")[plan.nodes[4].line - 1] == "[route]"


def test_heads_classes_strides_and_consumers():
    plan = parse_plan(TINY, path="a.cfg")
    assert (plan.heads, plan.classes, plan.strides) == ((6,), 3, (2,))
    assert plan.head_specs == (plan.nodes[6].spec,)
    assert plan.consumers == ((1, 4), (2,), (3,), (4,), (5,), (6,), ())


def halved(times: int) -> str:
    return "[convolutional]\nfilters=4\nsize=3\nstride=2\npad=1\nactivation=leaky\n" * times


@pytest.mark.parametrize(
    ("resize_step", "text", "step_px"),
    [
        ("", TINY.removeprefix(NET), 32),
        ("resize_step=16\n", TINY.removeprefix(NET), 16),
        ("", halved(6) + HEAD.format(filters=16), 64),
        # The head is at 32 px a cell, what is enlarged for it at 64.
        ("", halved(6) + "[upsample]\nstride=2\n[route]\nlayers=-1,4\n" + HEAD.format(filters=16), 64),
    ],
)
def test_inputs_of_such_steps_fit_the_network(resize_step, text, step_px):
    plan = parse_plan(f"[net]\nwidth=256\nheight=256\n{resize_step}{text}", path="a.cfg")
    assert plan.size_step_px == step_px
    for steps in range(1, 8):
        assert plan.with_input_hw((steps * step_px, 256)).nodes[-1].shape.height == steps * step_px // plan.strides[0]


def test_a_plan_is_frozen_and_can_be_pickled():
    plan = parse_plan(TINY, path="a.cfg")
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.name = "b"


def test_parameters_of_a_hand_counted_net():
    conv_bn, conv, head = 8 * 3 * 9 + 2 * 8, 8 * 8 + 8, 16 * 16 + 16
    assert parse_plan(TINY, path="a.cfg").parameter_count() == conv_bn + conv + head


def test_classes_resize_every_head_and_its_convolution():
    plan = parse_plan(TINY, path="a.cfg", classes=7)
    assert plan.classes == 7
    assert plan.nodes[5].spec.filters == plan.nodes[6].shape.channels == 2 * (5 + 7)
    assert parse_plan(TINY, path="a.cfg", classes=3) == parse_plan(TINY, path="a.cfg")


def test_classes_repair_filters_that_do_not_match():
    text = NET + HEAD.format(filters=99)
    with pytest.raises(CfgError) as caught:
        parse_plan(text, path="a.cfg")
    assert str(caught.value) == "a.cfg:5: filters=99, but the [yolo] after it needs 16, 2 anchors * (5 + 3 classes)"
    assert parse_plan(text, path="a.cfg", classes=3).nodes[0].spec.filters == 16


def test_another_input_size_changes_shapes_only():
    plan = parse_plan(TINY, path="a.cfg")
    wide = plan.with_input_hw((64, 96))
    assert wide.net.input_hw == (64, 96)
    assert wide.nodes[6].shape == Shape(16, 32, 48)
    assert [node.spec for node in wide.nodes] == [node.spec for node in plan.nodes]
    assert wide == parse_plan(TINY, path="a.cfg", input_hw=(64, 96))
    assert wide.with_input_hw((32, 32)) == plan


def test_an_input_size_that_does_not_fit_names_the_route():
    plan = parse_plan(TINY, path="a.cfg")
    with pytest.raises(CfgError) as caught:
        plan.with_input_hw((32, 34))
    line = plan.nodes[4].line
    assert str(caught.value) == (f"a.cfg:{line}: layer 4: inputs differ in height or width: 8x16x18 and 8x16x17")


@pytest.mark.parametrize("hw", [(0, 32), (32, -32), (32, 40_000)])
def test_absurd_input_sizes(hw):
    with pytest.raises(CfgError, match=r"^a\.cfg:1: an input of "):
        parse_plan(TINY, path="a.cfg", input_hw=hw)


@pytest.mark.parametrize("classes", [0, -1, 10**9])
def test_absurd_class_counts(classes):
    with pytest.raises(CfgError, match=r"^a\.cfg:21: .* classes is not within 1\.\."):
        parse_plan("\n" * 15 + NET + HEAD.format(filters=16), path="a.cfg", classes=classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convolutional]", "a.cfg:1: the first section must be [net], not [convolutional]"),
        (NET, "a.cfg:1: no layer follows [net]"),
        (NET + NET, "a.cfg:4: [net] can only be the first section"),
        (
            NET + "[route]\nlayers=-1",
            "a.cfg:4: layer 0: refers to a layer that is not among the 0 before it",
        ),
        (
            NET + "[conv]\n[route]\nlayers=-2",
            "a.cfg:5: layer 1: refers to a layer that is not among the 1",
        ),
        (NET + "[conv]\n[route]\nlayers=1", "a.cfg:5: layer 1: refers to a layer that is not among the 1"),
        (
            NET + "[conv]\n[shortcut]\nfrom=7",
            "a.cfg:5: layer 1: refers to a layer that is not among the 1",
        ),
        (
            NET + "[conv]\n[conv]\nstride=2\n[shortcut]\nfrom=-2",
            "a.cfg:7: layer 2: inputs differ in height or width: 1x16x16 and 1x32x32",
        ),
        (NET + "[conv]\nsize=33", "a.cfg:4: layer 0: a window of 33 does not fit into a padded side of 32"),
        (
            NET + HEAD.format(filters=16) + "[conv]",
            "a.cfg:11: layer 2: reads layer 1, a [yolo], which ends its branch",
        ),
        (
            NET + HEAD.format(filters=16) + "[route]\nlayers=0\n[yolo]\nanchors=1,1\nclasses=11",
            "a.cfg:15: classes=11, but the first [yolo] has 3",
        ),
        (
            NET + "[yolo]\nclasses=3\nanchors=4,8",
            "a.cfg:4: layer 0: [yolo] needs 8 channels, 1 anchors * (5 + 3 classes), but its input has 3",
        ),
        (NET + "[upsample]\nstride=64\n" * 3, "a.cfg:6: layer 1: 3x131072x131072 is too large"),
        (NET + "[upsample]\nstride=32\n" * 2, "a.cfg:6: layer 1: 3x32768x32768 is too large"),
        (NET + "[conv]\nfilters=60000\n" * 2, "a.cfg:6: layer 1: more than 536870912 parameters"),
        (NET + "[conv]\nfilters=1000000000", "a.cfg:5: filters=1000000000 is above 65536"),
        (NET + "[route]\nlayers=" + "0," * 30_000 + "0", "a.cfg:4: layer 0: refers to a layer"),
        (NET + "[conv]\nfilters=9\n[route]\nlayers=" + "0," * 30_000 + "0", "a.cfg:6: layer 1: 270009x32x32 is too"),
    ],
)
def test_broken_graphs_name_file_and_line(text, message):
    with pytest.raises(CfgError) as caught:
        parse_plan(text, path="a.cfg")
    assert str(caught.value).startswith(message)


NEW_COORDS = "[yolo]\nclasses=1\nanchors=4,8\nnew_coords=1\n"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[conv]\nfilters=6\nactivation=linear\n", "a.cfg:4: layer 1, a [yolo] with new_coords=1, needs a [conv"),
        ("[conv]\nfilters=6\n[max]\nsize=3\n", "a.cfg:6: layer 2, a [yolo] with new_coords=1, needs a [conv"),
        ("[conv]\nfilters=6\nantialiasing=1\n", "a.cfg:4: layer 1, a [yolo] with new_coords=1, needs a [conv"),
    ],
)
def test_the_decoder_without_a_logistic_needs_one_before_it(layers, message):
    assert parse_plan(NET + "[conv]\nfilters=6\n" + NEW_COORDS, path="a.cfg").heads == (1,)
    with pytest.raises(CfgError) as caught:
        parse_plan(NET + layers + NEW_COORDS, path="a.cfg")
    assert str(caught.value).startswith(message)


def test_a_head_may_come_first_but_not_that_decoder():
    net = "[net]\nwidth=32\nheight=32\nchannels=6\n"
    assert parse_plan(net + NEW_COORDS.replace("coords=1", "coords=0"), path="a.cfg").heads == (0,)
    with pytest.raises(CfgError, match=r"^a\.cfg:5: layer 0, a \[yolo\] with new_coords=1, needs a"):
        parse_plan(net + NEW_COORDS, path="a.cfg")


def test_nobody_else_reads_what_that_decoder_reads():
    text = NET + "[conv]\nfilters=6\n" + NEW_COORDS + "[route]\nlayers=0\n"
    with pytest.raises(CfgError, match=r"^a\.cfg:6: layer 0 has another reader than its \[yolo\] with new"):
        parse_plan(text, path="a.cfg")


def test_one_norm_for_all_layers_is_said():
    kinds = [f"[conv]\nbatch_normalize={kind}\n" for kind in (1, 2, 0)]
    assert parse_plan(NET + "".join(kinds), path="a.cfg").warnings == (
        "a.cfg:4: batch_normalize is 1 here and 2 in line 6: all layers get the same norm",
    )
    for kind in kinds:
        assert parse_plan(NET + kind, path="a.cfg").warnings == ()


def test_counters_of_other_classes_go_with_them():
    text = NET + HEAD.format(filters=16) + "counters_per_class=5,6,7\n"
    assert parse_plan(text, path="a.cfg", classes=3).head_specs[0].counters_per_class == (5, 6, 7)
    resized = parse_plan(text, path="a.cfg", classes=4)
    assert resized.head_specs[0].counters_per_class == ()
    assert resized.warnings == ("a.cfg:11: counters_per_class has 3 classes and is ignored",)


def test_only_a_convolution_can_be_resized_for_a_head():
    with pytest.raises(CfgError, match=r"^a\.cfg:4: \[yolo\] can be resized only right after a"):
        parse_plan(NET + "[yolo]\nanchors=4,8", path="a.cfg", classes=2)


def test_warnings_are_collected_in_file_order():
    text = "[net]\nwidth=32\nheight=32\nadam=1\n[convolutional]\nfiltres=8\n[convolutional]\nbatch=1\nwidth=9\n"
    assert parse_plan(text, path="a.cfg").warnings == (
        "a.cfg:4: adam=1 is not supported and is ignored",
        "a.cfg:6: unknown key 'filtres' in [convolutional], did you mean 'filters'?",
        "a.cfg:8: [net] keys in [convolutional] are ignored: batch, width",
    )


def test_bare_names_are_found_beside_the_package():
    plan = load_plan("yolov4-tiny", classes=2, input_hw=(64, 128))
    assert (plan.name, plan.classes, plan.net.input_hw) == ("yolov4-tiny", 2, (64, 128))


def test_with_their_suffix_too_where_the_user_has_no_such_file(tmp_path, monkeypatch):
    """As darknet's commands name them; a network of the user's own goes before ours of the same name."""
    monkeypatch.chdir(tmp_path)
    for name in ("yolov4-tiny.cfg", "yolov4.cfg"):
        assert load_plan(name).path == load_plan(name.removesuffix(".cfg")).path
    (tmp_path / "yolov4.cfg").write_text(TINY)
    assert load_plan("yolov4.cfg").path == "yolov4.cfg"
    for name in ("parse.py", "no.cfg"):
        with pytest.raises(CfgError, match=r"no such (cfg|file)"):
            load_plan(name)


def test_paths_are_read(tmp_path):
    path = tmp_path / "mine.cfg"
    path.write_bytes(b"\xef\xbb\xbf# caf\xe9\n" + TINY.replace("\n", "\r\n").encode())
    plan = load_plan(str(path))
    assert (plan.name, plan.path) == ("mine", str(path))
    assert plan.nodes == tuple(
        dataclasses.replace(node, line=node.line + 1) for node in parse_plan(TINY, path="a.cfg").nodes
    )


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CfgError) as caught:
        load_plan("yolov4-tinny")
    assert str(caught.value) == (
        f"yolov4-tinny: no such cfg among {', '.join(cfg_names())}, did you mean 'yolov4-tiny'?"
    )


def test_unreadable_paths(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "absent.cfg"), "absent.cfg"):
        with pytest.raises(CfgError, match=r"no such file$"):
            load_plan(name)
    with pytest.raises(CfgError, match="cannot be read"):
        load_plan("x" * 5000)
    with pytest.raises(CfgError, match="no such cfg"):
        load_plan("nul\0byte")
    large = tmp_path / "large.cfg"
    large.write_bytes(b"#" * (4 * 2**20 + 1))
    with pytest.raises(CfgError, match=r"so it is not a cfg$"):
        load_plan(str(large))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutations_give_a_plan_or_a_cfg_error(count):
    rng = random.Random(count)
    original = load_plan("yolov4-tiny").source_text
    outcomes = {"plan": 0, "error": 0}
    for _ in range(count):
        lines = original.split("\n")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(lines))
            line = lines[at]
            cut = rng.randint(0, len(line))
            lines[at] = rng.choice(
                [
                    "",
                    line[:cut],
                    line[:cut] + rng.choice("0123456789-=[],.#x\0é") + line[cut:],
                    line.partition("=")[0] + "=" + rng.choice(["-1", "0", "1e9", "99999999", "nan", "leaky"]),
                    rng.choice(lines),
                    f"[{rng.choice(['route', 'yolo', 'maxpool', 'shortcut', 'net', 'lstm'])}]",
                ]
            )
        try:
            assert parse_plan("\n".join(lines), path="a.cfg").nodes
            outcomes["plan"] += 1
        except CfgError as error:
            assert str(error).startswith("a.cfg:")
            outcomes["error"] += 1
    assert min(outcomes.values()) > count / 10, outcomes
