"""python -m models.weights: checkpoints and darknet's files made of each other, and nothing overwritten."""

from __future__ import annotations

import filecmp
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cfg.plan import load_plan, parse_plan
from models.norms.factory import norm_factory
from models.norms.options import NormOptions
from models.stored_network import build_network, make_checkpoint
from models.weights.__main__ import main
from models.weights.convert import cfg_text
from models.weights.reader import Header, read_weights
from tests.models.weights.nets import SMALL, heads_of, network_of, plan_of, written
from tests.reference import darknet_weights as oracle
from utils.checkpoint import Checkpoint
from utils.errors import UserError

SEEN = 2**35 + 7


@pytest.fixture
def cfg(tmp_path: Path) -> str:
    (tmp_path / "small.cfg").write_text(SMALL)
    return str(tmp_path / "small.cfg")


def checkpoint_of(options: NormOptions, *, text: str = SMALL, classes: int = 5) -> Checkpoint:
    """As train.py writes it, of a run that differs from its cfg in classes, input size and letterbox."""
    plan = parse_plan(text, path="small.cfg", classes=classes, input_hw=(32, 24))
    network = network_of(plan, options)
    names = tuple(f"thing {label}" for label in range(classes))
    norm, weights = norm_factory(options).options, network.state_dict()
    described = make_checkpoint(plan, norm, weights, class_names=names, letterbox=False)
    return replace(described, step=50, settings={"batch_size": 6, "subdivisions": 3})


# --- .weights -> checkpoint -> .weights -----------------------------------------------------------------------


def test_there_and_back_bit_for_bit(tmp_path, cfg, capsys):
    made = written(tmp_path / "made.weights", oracle.random_file(SMALL, seen=SEEN))
    (tmp_path / "two.names").write_text("red\nwhite\n")
    main(["convert", str(made), str(tmp_path / "x.pt"), "--cfg", cfg, "--names", str(tmp_path / "two.names")])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (f"weights   {made}: loaded 5 of 5 convolutions and 2 of 2 weighted shortcuts, 0 bytes left")
    assert said[1:] == [
        f"names     from {tmp_path / 'two.names'}",
        f"written   {tmp_path / 'x.pt'}; next: python detect.py --weights {tmp_path / 'x.pt'} IMAGES",
    ]
    main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "back.weights")])
    assert filecmp.cmp(made, tmp_path / "back.weights", shallow=False)
    assert (tmp_path / "back.cfg").read_text() == SMALL
    assert (tmp_path / "back.names").read_text() == "red\nwhite\n"
    assert capsys.readouterr().out.startswith(f"written   {tmp_path / 'back.weights'}, {tmp_path / 'back.cfg'} and ")


@pytest.mark.parametrize(("normalize", "norm"), [("1", "bn"), ("2", "cmbn")])
def test_the_checkpoint_is_as_one_of_ours(tmp_path, cfg, normalize, norm):
    Path(cfg).write_text(SMALL.replace("batch_normalize=1", f"batch_normalize={normalize}"))
    made = written(tmp_path / "made.weights", oracle.random_file(SMALL, seen=SEEN))
    main(["convert", str(made), str(tmp_path / "x.pt"), "--cfg", cfg])
    checkpoint = Checkpoint.from_file(tmp_path / "x.pt")
    assert checkpoint.seen == SEEN and checkpoint.class_names == ("class 0", "class 1")
    assert checkpoint.letterbox is True and checkpoint.settings == {"batch_size": 8, "subdivisions": 4}
    assert checkpoint.norm == asdict(norm_factory(NormOptions(norm=norm)).options)
    network = build_network(checkpoint)
    for name, tensor in read_weights(made, plan_of()).state.items():
        assert torch.equal(network.state_dict()[name], tensor)


# --- a checkpoint of our training -> darknet ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [NormOptions(), NormOptions(norm="cmbn", weight_centralization=True), NormOptions(norm_eps=1e-3)]
)
def test_what_we_trained_goes_to_darknet(tmp_path, options):
    """Read by its new cfg alone, it computes the same; and 300 images were seen: 50 steps of 6."""
    content = checkpoint_of(options)
    content.to_file(tmp_path / "best.pt")
    main(["convert", str(tmp_path / "best.pt"), str(tmp_path / "best.weights")])
    plan = load_plan(str(tmp_path / "best.cfg"))
    assert plan.classes == 5 and plan.net.input_hw == (32, 24) and plan.net.letter_box is False
    read = read_weights(tmp_path / "best.weights", plan)
    assert read.is_complete and read.header == Header(seen=300)
    stock = network_of(plan)
    stock.load_state_dict(read.state)
    torch.testing.assert_close(heads_of(stock), heads_of(build_network(content)), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "best.names").read_text().splitlines() == list(content.class_names)


def test_the_cfg_beside_it_says_what_was_trained():
    """And no more of its text is touched than that."""
    text = SMALL.replace("filters=21", "filters=21 # of 2 classes").replace(
        "filters=4\nsize=1", "filters=4\ndontload=1"
    )
    content = checkpoint_of(NormOptions(), text=text)
    made = cfg_text(content)
    changed = [(old, new) for old, new in zip(text.split("\n"), made.split("\n"), strict=True) if old != new]
    assert changed == [
        ("width=16", "width=24"),
        ("height=16", "height=32"),
        ("letter_box=1", "letter_box=0"),
        ("dontload=1", "dontload=0"),
        ("filters=21 # of 2 classes", "filters=30 # of 2 classes"),
        ("classes=2", "classes=5"),
    ]
    wanted = parse_plan(text.replace("dontload=1", ""), path="small.cfg", classes=5, input_hw=(32, 24))
    plan = parse_plan(made, path="small.cfg")
    assert [replace(node, line=0) for node in plan.nodes] == [replace(node, line=0) for node in wanted.nodes]
    assert plan.net == replace(wanted.net, letter_box=False)


@pytest.mark.parametrize(("classes", "line"), [(5, "# counters_per_class = 8, 2"), (2, "counters_per_class = 8, 2")])
def test_counters_of_other_classes_than_were_trained_become_a_comment(classes, line):
    text = SMALL.replace("classes=2\n", "counters_per_class = 8, 2\nclasses=2\n")
    made = cfg_text(checkpoint_of(NormOptions(), text=text, classes=classes))
    assert line in made.split("\n")
    plan = parse_plan(made, path="x.cfg")
    assert (plan.classes, plan.warnings) == (classes, ())
    assert plan.head_specs[0].counters_per_class == ((8, 2) if classes == 2 else ())


def test_a_letterbox_that_the_cfg_does_not_mention_is_added():
    text = SMALL.replace("letter_box=1\n", "")
    assert parse_plan(cfg_text(checkpoint_of(NormOptions(), text=text)), path="x.cfg").net.letter_box is False
    with_one = cfg_text(replace(checkpoint_of(NormOptions(), text=text), letterbox=True))
    assert parse_plan(with_one, path="x.cfg").net.letter_box is True


@pytest.mark.parametrize("norm", ["gn", "ln", "in", "bcn"])
def test_group_norms_do_not_go_to_darknet(tmp_path, norm):
    checkpoint_of(NormOptions(norm=norm)).to_file(tmp_path / "best.pt")
    with pytest.raises(UserError, match="darknet has batch norm only"):
        main(["convert", str(tmp_path / "best.pt"), str(tmp_path / "best.weights")])
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_checkpoint_without_its_network(tmp_path):
    torch.save({"format": 4, "weights": {}}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt: the checkpoint does not describe its network"):
        main(["convert", str(tmp_path / "odd.pt"), str(tmp_path / "odd.weights")])


# --- partial and info -----------------------------------------------------------------------------------------


def test_the_first_layers(tmp_path, cfg, capsys):
    raw = oracle.random_file(SMALL, seen=SEEN)
    made = written(tmp_path / "made.weights", raw)
    main(["partial", str(made), str(tmp_path / "small.conv.5"), "--cfg", cfg, "--layers", "5"])
    end = 20 + sum(4 * array.size for index, arrays in oracle.layers_of(SMALL) for array in arrays if index < 5)
    assert (tmp_path / "small.conv.5").read_bytes() == oracle.header(0) + raw[20:end]
    assert capsys.readouterr().out == f"written   {tmp_path / 'small.conv.5'}: layers 0 to 4, {end:,} bytes\n"
    main(["info", str(tmp_path / "small.conv.5"), "--cfg", cfg])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "version   0.2.5, 0 images seen"
    assert said[1].startswith(
        "weights   loaded 3 of 5 convolutions and 1 of 2 weighted shortcuts, 0 bytes left; the file"
    )
    main(["partial", str(made), str(tmp_path / "all"), "--cfg", cfg, "--layers", "10"])
    assert (tmp_path / "all").read_bytes() == oracle.header(0) + raw[20:]


def test_more_layers_than_there_are(tmp_path, cfg):
    raw = oracle.random_file(SMALL)
    made = written(tmp_path / "made.weights", raw)
    part = written(tmp_path / "part.weights", raw[: 20 + 4 * (16 + 108)])
    for source, layers, sentence in (
        (made, "0", r"--layers 0: .*small\.cfg has 1 to 10 layers$"),
        (made, "11", r"--layers 11: .*small\.cfg has 1 to 10 layers$"),
        (part, "2", r"out: cannot be written, there are no biases for layer 1 \[convolutional\] \(.*small\.cfg:15\)$"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(["partial", str(source), str(tmp_path / "out"), "--cfg", cfg, "--layers", layers])
    Path(cfg).write_text("[net]\nwidth=8\nheight=8\n[max]\n[conv]\n")
    with pytest.raises(UserError, match=r"--layers 1: none of these layers of .*small\.cfg has weights$"):
        main(["partial", str(made), str(tmp_path / "out"), "--cfg", cfg, "--layers", "1"])
    assert not (tmp_path / "out").exists()


# --- nothing is lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["best.weights", "best.cfg", "best.names"])
def test_no_file_is_overwritten(tmp_path, taken):
    checkpoint_of(NormOptions()).to_file(tmp_path / "x.pt")
    (tmp_path / taken).write_text("precious")
    with pytest.raises(UserError, match=rf"{taken}: already exists"):
        main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "best.weights")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([taken, "x.pt"])


def test_nor_is_a_checkpoint_or_a_partial_file(tmp_path, cfg):
    made = written(tmp_path / "made.weights", oracle.random_file(SMALL))
    with pytest.raises(UserError, match=r"made\.weights: already exists$"):
        main(["convert", str(made), str(made), "--cfg", cfg])
    with pytest.raises(UserError, match=r"small\.cfg: already exists$"):
        main(["partial", str(made), cfg, "--cfg", cfg, "--layers", "1"])
    assert Path(cfg).read_text() == SMALL


def test_what_is_made_is_not_called_what_it_is_not(tmp_path, cfg):
    made = written(tmp_path / "made.weights", oracle.random_file(SMALL))
    checkpoint_of(NormOptions()).to_file(tmp_path / "x.pt")
    for source, target, sentence in (
        (made, "q.weights", r"q\.weights: what is made of .*made\.weights is a checkpoint: call it \.pt$"),
        (tmp_path / "x.pt", "q.pt", r"q\.pt: what is made of .*x\.pt is darknet's: call it \.weights$"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(["convert", str(source), str(tmp_path / target)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.weights", "small.cfg", "x.pt"]


def test_there_must_be_a_folder(tmp_path, cfg):
    made = written(tmp_path / "made.weights", oracle.random_file(SMALL))
    checkpoint_of(NormOptions()).to_file(tmp_path / "x.pt")
    for argv in (
        ["convert", str(tmp_path / "x.pt"), str(tmp_path / "no" / "x.weights")],
        ["convert", str(made), str(tmp_path / "no" / "x.pt"), "--cfg", cfg],
        ["partial", str(made), str(tmp_path / "no" / "x"), "--cfg", cfg, "--layers", "1"],
    ):
        with pytest.raises(UserError, match=r"/no/x[.a-z]*: there is no folder .*/no$"):
            main(argv)


def test_a_checkpoint_has_no_layers_to_count(tmp_path, cfg):
    checkpoint_of(NormOptions()).to_file(tmp_path / "x.pt")
    for argv in (
        ["info", str(tmp_path / "x.pt"), "--cfg", cfg],
        ["partial", str(tmp_path / "x.pt"), str(tmp_path / "part"), "--cfg", cfg, "--layers", "1"],
    ):
        with pytest.raises(UserError, match=r"x\.pt: is a checkpoint: convert it first$"):
            main(argv)
    assert not (tmp_path / "part").exists()


def test_three_files_have_three_names(tmp_path):
    checkpoint_of(NormOptions()).to_file(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"best\.cfg: already exists, or would be written twice"):
        main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "best.cfg")])


# --- the command itself ---------------------------------------------------------------------------------------


def test_errors_are_a_line_and_exit_code_two(tmp_path, cfg, monkeypatch, capsys):
    made = str(written(tmp_path / "made.weights", oracle.random_file(SMALL)))
    for argv, sentence in (
        (["convert", made, str(tmp_path / "x.pt")], "name its cfg with --cfg"),
        (["convert", made, str(tmp_path / "x.pt"), "--cfg", "yolov4-tny"], "did you mean 'yolov4-tiny'?"),
        (["convert", made, str(tmp_path / "no" / "x.pt"), "--cfg", cfg], "there is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["weights", *argv])
        monkeypatch.delitem(sys.modules, "models.weights.__main__", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("models.weights", run_name="__main__")
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and sentence in said.err and said.err.count("\n") == 1
