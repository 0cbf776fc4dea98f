"""From a command line to a Job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cfg.plan import load_plan
from data.albumentations_import import albumentations as A
from data.digits import make_digits
from engine.data_sets import open_sets
from engine.job import parse_job
from engine.resuming import other_classes
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.options import NormOptions, resolve_norm
from models.stored_network import make_checkpoint
from utils.errors import UserError


def test_two_lengths_of_training_contradict():
    with pytest.raises(UserError, match="--epochs and --max-steps"):
        parse_job(["--epochs", "2", "--max-steps", "10"])


def test_shuffling_among_ranks_does_not_go_with_domains_kept_apart(few: Path):
    with pytest.raises(UserError, match="--shuffle-bn goes with neither --domain-batches one"):
        parse_job(["--data", str(few), "digits", "--domain-statistics", "own", "--shuffle-bn"])


def test_shuffling_among_ranks_needs_several():
    with pytest.raises(UserError, match="--shuffle-bn shuffles images among the processes that torchrun starts, and"):
        parse_job(["--shuffle-bn"])


def test_a_set_without_objects_says_what_was_dropped(tmp_path: Path):
    digits = make_digits(tmp_path / "digits", counts={"train": 2, "val": 1}, hw=(64, 64))
    annotations = digits / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    for row in content["annotations"]:
        row["bbox"][2] = 0
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_sets({"data": str(digits)})
    nothing, dropped, more = str(caught.value).split("; ")
    assert nothing == f"{digits}: none of the 2 images of 'train' has an object"
    assert dropped.startswith(f"{len(content['annotations'])} boxes without area dropped (first: ")
    assert more == f"python -m data.doctor {digits} has details"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Six training images: fewer than a batch."""
    return make_digits(tmp_path / "few", counts={"train": 6, "val": 1}, hw=(64, 64))


def test_a_pipeline_that_fails_does_so_before_there_is_a_run(few: Path, tmp_path: Path):
    """64-pixel images are kept at their own size."""
    A.save(A.Crop(0, 0, 60, 60), tmp_path / "fits.json")
    parse_job(["--data", str(few), "--albumentations", str(tmp_path / "fits.json")])
    A.save(A.Crop(100, 100, 200, 200), tmp_path / "fails.json")
    with pytest.raises(UserError, match=r"--albumentations fails on .*\.png: "):
        parse_job(["--data", str(few), "--albumentations", str(tmp_path / "fails.json")])


@pytest.mark.parametrize(("typed", "norm"), [("gn", "gn:groups=2"), ("gn:groups=4", "gn:groups=4"), ("cmbn", "cmbn")])
def test_weights_fix_the_options_of_the_norm_that_were_not_typed(few: Path, tmp_path: Path, typed: str, norm: str):
    plan = load_plan("yolov4-pico", classes=10)
    options = resolve_norm(NormOptions(norm="gn:groups=2"))
    weights = Network(plan, norm_factory(options)).state_dict()
    names = tuple(map(str, range(10)))
    make_checkpoint(plan, options, weights, class_names=names, letterbox=True).to_file(tmp_path / "gn.pt")
    job = parse_job(["--data", str(few), "--weights", str(tmp_path / "gn.pt"), "--norm", typed])
    assert job.options.norm.norm == norm


def test_a_batch_cut_to_the_images_there_are_is_accepted(few: Path):
    """Out of memory, a run may have gone on with a divisor of a batch that the data set made smaller."""
    flags = ["--data", str(few), "--batch-size", "16", "--subdivisions"]
    assert parse_job([*flags, "6"]).mini_batch == 1
    with pytest.raises(UserError, match="--batch-size 16 is not divisible by --subdivisions 5 "):
        parse_job([*flags, "5"])


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (("b", "a"), "the data lists its classes in another order than it was trained with, a, b"),
        (("a", "c"), "was trained on other classes than the data has now (without b and with c)"),
        (("a",), "was trained on other classes than the data has now (without b)"),
    ],
)
def test_a_resume_says_how_the_classes_have_changed(now: tuple[str, ...], text: str):
    assert other_classes(("a", "b"), now) == text


def test_a_fraction_that_nothing_is_held_out_by_is_said(few: Path, capsys):
    open_sets({"data": str(few), "val_fraction": 0.3, "val_data": str(few), "val_split": "train"})
    assert f"warning: --val-fraction is not used: {few} is what is evaluated" in capsys.readouterr().out
    open_sets({"data": str(few), "val_fraction": 0.3})
    assert f"warning: --val-fraction is not used: the split 'val' of {few} is" in capsys.readouterr().out
    open_sets({"data": str(few)})
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "trained", "norm"),
    [
        (["--subdivisions", "3"], None, "cmbn:carry"),
        (["--subdivisions", "1"], None, "bn"),
        (["--subdivisions", "3", "--loss", "darknet"], None, "bn"),
        (["--subdivisions", "3", "--norm-eval"], "bn", "bn"),
        (["--subdivisions", "3", "--norm", "bn"], None, "bn"),
        (["--subdivisions", "3", "--norm-heads", "gn"], None, "bn"),
        (["--subdivisions", "3"], "bn", "bn"),
        (["--subdivisions", "6"], "bn", "cmbn:carry"),
        (["--subdivisions", "6"], "gn", "gn"),
        (["--subdivisions", "6"], "cmbn", "cmbn"),
    ],
)
def test_without_a_norm_the_images_in_a_forward_decide(
    few: Path, tmp_path: Path, flags: list[str], trained: str | None, norm: str
):
    """Two images in a forward with --subdivisions 3 of a batch of 6, one with 6."""
    flags = ["--data", str(few), "--batch-size", "6", *flags]
    if trained is not None:
        plan, options = load_plan("yolov4-pico", classes=10), resolve_norm(NormOptions(norm=trained))
        weights = Network(plan, norm_factory(options)).state_dict()
        names = tuple(map(str, range(10)))
        make_checkpoint(plan, options, weights, class_names=names, letterbox=True).to_file(tmp_path / "a.pt")
        flags += ["--weights", str(tmp_path / "a.pt")]
    job = parse_job(flags)
    assert job.options.norm.norm.partition(",")[0] == norm
    decides = {"--norm", "--norm-heads", "--norm-eval", "--loss"} & set(flags) or trained in ("gn", "cmbn")
    assert ("norm" in job.reasons) == (not decides)


def test_a_cfg_of_cmbn_decides_itself(few: Path, tmp_path: Path):
    text = load_plan("yolov4-pico").source_text.replace("batch_normalize=1", "batch_normalize=2")
    (tmp_path / "a.cfg").write_text(text)
    assert parse_job(["--data", str(few), "--cfg", str(tmp_path / "a.cfg")]).options.norm.norm == "cmbn"
