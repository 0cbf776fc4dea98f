"""The command lines: which flags there are, who wins, and what is refused."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from cfg.plan import load_plan
from options import (
    GROUP_TITLES,
    DetectOptions,
    EvaluateOptions,
    OptimOptions,
    TrainOptions,
    cfg_settings,
    flatten,
    given_flags,
    parse_image_hw,
    settle,
)
from utils.errors import UserError

PAGES = {"train.py": TrainOptions, "evaluate.py": EvaluateOptions, "detect.py": DetectOptions}


def help_of(kind: type, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        given_flags(kind, ["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def flags_in(help_text: str) -> list[str]:
    """Flags, and arguments without one, in the order of the help page."""
    found = []
    for line in help_text.splitlines():
        if re.match(r"  [A-Z-]", line) and not line.startswith("  -h"):
            invocation = re.split(r"\s{2,}", line[2:])[0]
            found += re.findall(r"--[a-z][a-z0-9-]*", invocation) or [invocation.split()[0]]
    return found


def test_the_flags_are_the_frozen_ones(root: Path, capsys):
    """Each new flag is a decision: when it is one, change tests/golden/flags.txt in the same commit."""
    made = [f"{page} {flag}" for page, kind in PAGES.items() for flag in flags_in(help_of(kind, capsys))]
    frozen = (root / "tests" / "golden" / "flags.txt").read_text().splitlines()
    assert len(set(made)) == len(made)
    new, gone = sorted(set(made) - set(frozen)), sorted(set(frozen) - set(made))
    assert made == frozen, f"each new flag is a decision, and each lost one breaks a script: new {new}, gone {gone}"


def test_a_planted_flag_is_seen():
    text = "usage: x [--no-such]\n\nmain:\n  -h, --help  show\n  SOURCE     a\n"
    text += "  --data PATH  see --other\n  --flip, --no-flip\n"
    assert flags_in(text) == ["SOURCE", "--data", "--flip", "--no-flip"]


@pytest.mark.parametrize("page", PAGES)
def test_the_help_page_has_its_groups_and_a_text_for_each_flag(page, capsys):
    text = help_of(PAGES[page], capsys)
    assert text.startswith(f"usage: {page}") and "\nmain:\n" in text
    for title in GROUP_TITLES.values():
        assert (f"\n{title}:\n" in text) == (page == "train.py")
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("argv", [["--no-such-flag"], ["--dat", "x"], ["--image-size", "big"]])
def test_a_bad_flag_exits_with_two(page, argv, capsys):
    needed = {"train.py": [], "evaluate.py": ["--weights", "x"], "detect.py": ["x.jpg", "--weights", "x"]}[page]
    given_flags(PAGES[page], needed)
    with pytest.raises(SystemExit) as caught:
        given_flags(PAGES[page], [*needed, *argv])
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--norm", "xn"], ["--amp", "int8"], ["--lr-policy", "poly"], ["--epochs", "many"]])
def test_a_bad_value_exits_with_two(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        given_flags(TrainOptions, argv)
    assert caught.value.code == 2
    assert argv[1] in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "argv"), [(EvaluateOptions, []), (DetectOptions, ["x.jpg"]), (DetectOptions, [])])
def test_what_has_no_default_is_asked_for(kind, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        given_flags(kind, argv)
    assert caught.value.code == 2
    assert "required" in capsys.readouterr().err


# --- who wins ------------------------------------------------------------------------------------------------


def test_only_what_was_typed_is_given():
    assert given_flags(TrainOptions, []) == {}
    argv = ["--data", "x", "--batch-size", "8", "--image-size", "96x128", "--no-flip", "--letterbox"]
    argv += ["--lr-steps", "10", "20", "--lr-scales", ".1", ".5"]
    assert given_flags(TrainOptions, argv) == {
        "data": "x",
        "batch_size": 8,
        "image_size": (96, 128),
        "flip": False,
        "letterbox": True,
        "lr_steps": [10, 20],
        "lr_scales": [0.1, 0.5],
    }


def test_flag_beats_file_beats_default():
    files = {"batch_size": 32, "subdivisions": 4, "jitter": 0.25, "unknown_key": 1}
    made = settle(TrainOptions, {"batch_size": 8, "mosaic": 0.0}, files)
    assert (made.optim.batch_size, made.optim.subdivisions, made.optim.momentum) == (8, 4, 0.9)
    assert (made.augment.mosaic, made.augment.jitter, made.augment.flip) == (0.0, 0.25, True)


def test_a_typed_default_beats_the_file_too():
    assert (
        settle(TrainOptions, given_flags(TrainOptions, ["--batch-size", "16"]), {"batch_size": 64}).optim.batch_size
        == 16
    )


def test_the_cfg_file_is_heard():
    plan = load_plan("yolov4-pico")
    made = settle(TrainOptions, {"learning_rate": 0.5}, cfg_settings(plan))
    assert made.optim.learning_rate == 0.5
    assert (made.optim.batch_size, made.optim.burn_in_steps) == (plan.net.batch, plan.net.burn_in_steps)
    assert made.optim.lr_policy == "cosine"  # the cfg says sgdr
    assert made.optim.max_steps == plan.net.max_batches != OptimOptions().max_steps
    assert made.augment.letterbox is True


@pytest.mark.parametrize("name", ["yolov4", "yolov4-csp", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-pico"])
def test_each_shipped_cfg_settles(name):
    settings = cfg_settings(load_plan(name))
    assert None not in settings.values()
    flat = flatten(settle(TrainOptions, {}, settings))
    assert {key: flat[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TrainOptions, {}),
        (
            TrainOptions,
            {"norm": "cbn", "norm_window": 3, "lr_steps": (1, 2), "lr_scales": (0.1, 0.1), "fill": (1, 2, 3)},
        ),
        (EvaluateOptions, {"weights": "x.pt", "image_size": (96, 128)}),
        (DetectOptions, {"weights": "x.pt", "sources": ("a", "b"), "save_json": True}),
    ],
)
def test_settle_takes_back_what_flatten_gave(kind, given):
    options = settle(kind, given)
    flat = flatten(options)
    assert settle(kind, flat) == options
    assert {key: flat[key] for key in given} == given
    assert json.loads(json.dumps(flat)).keys() == flat.keys()


def test_no_two_groups_share_a_name():
    def names(kind: type) -> list[str]:
        nested = [getattr(settle(kind, {}), group) for group in GROUP_TITLES]
        return [name for part in nested for name in flatten(part)]

    own = [name for name in flatten(settle(TrainOptions, {})) if name not in names(TrainOptions)]
    assert len(set(names(TrainOptions))) == len(names(TrainOptions)) > 20
    assert "data" in own and "norm" not in own


def test_a_value_out_of_bounds_is_the_users_error():
    with pytest.raises(UserError, match=r"mosaic=1\.5 must lie between 0 and 1"):
        settle(TrainOptions, {"mosaic": 1.5})


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hw"), [("416", (416, 416)), ("96x128", (96, 128)), ("96X128", (96, 128)), ("1x1", (1, 1))]
)
def test_sizes_are_height_by_width(text, hw):
    assert parse_image_hw(text) == hw


@pytest.mark.parametrize("text", ["", "x", "0", "0x32", "-3", "3.5", "32x", "x32", "1x2x3", "big", "32 x 32", "32*32"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"'{text}' is not a size")):
        parse_image_hw(text)
