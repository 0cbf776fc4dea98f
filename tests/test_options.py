"""The command lines: which flags there are, who wins, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from cfg.plan import cfg_names, load_plan, parse_plan
from cfg.settings import cfg_settings, unread_settings
from demo.__main__ import DemoOptions
from options import FOREIGN_FLAGS, DetectOptions, EvaluateOptions, ExportOptions, OptimOptions, TrainOptions
from utils.errors import UserError
from utils.flags import current_names, flatten, parse_flags, parse_image_hw, resolve
from utils.knob import check_limits, knob

PAGES = {
    "train.py": TrainOptions,
    "evaluate.py": EvaluateOptions,
    "detect.py": DetectOptions,
    "export.py": ExportOptions,
    "demo": DemoOptions,
}
# Of the dataclasses of knobs in TrainOptions, by field name.
GROUP_TITLES = {f.name: f.metadata["title"] for f in dataclasses.fields(TrainOptions) if "title" in f.metadata}
NEEDED = {
    "train.py": [],
    "evaluate.py": ["--weights", "x"],
    "detect.py": ["x.jpg", "--weights", "x"],
    "export.py": ["--weights", "x"],
    "demo": ["--weights", "x"],
}


def help_of(kind: type, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_flags(kind, ["--help"])
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


# --- one line for a bad flag -----------------------------------------------------------------------------------


def refused(capsys, kind: type, argv: list[str], **more: Any) -> str:
    """The one line, without the newline, with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parse_flags(kind, argv, **more)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("argv", [["--no-such-flag"], ["--dat", "x"], ["--image-size", "big"], ["-x"]])
def test_a_bad_flag_exits_with_two(page, argv, capsys):
    parse_flags(PAGES[page], NEEDED[page])
    assert argv[0] in refused(capsys, PAGES[page], [*NEEDED[page], *argv])


@pytest.mark.parametrize("argv", [["--norm", "xn"], ["--amp", "int8"], ["--lr-policy", "random"], ["--epochs", "many"]])
def test_a_bad_value_exits_with_two(argv, capsys):
    assert argv[1] in refused(capsys, TrainOptions, argv)


@pytest.mark.parametrize(("kind", "argv"), [(DetectOptions, ["x.jpg"]), (DetectOptions, [])])
def test_what_has_no_default_is_asked_for(kind, argv, capsys):
    assert "required" in refused(capsys, kind, argv)


@pytest.mark.parametrize(
    ("kind", "argv", "line"),
    [
        (TrainOptions, ["--imgszz", "9"], "train.py has no --imgszz; did you mean --image-size?"),
        (TrainOptions, ["--image_size=9"], "train.py has no --image_size; did you mean --image-size?"),
        (EvaluateOptions, ["--weight", "x"], "evaluate.py has no --weight; did you mean --weights?"),
        (DetectOptions, ["--walks", "x"], "detect.py has no --walks"),
        (TrainOptions, ["--xyzzy"], "train.py has no --xyzzy"),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest_one_before_anything_else(kind, argv, line, capsys):
    page = line.partition(" ")[0]
    assert refused(capsys, kind, argv) == f"error: {line} (python {page} --help lists all)"


@pytest.mark.parametrize("argv", [["--", "-x.jpg"], ["-1"], ["-"], ["- a.jpg"], ["--max-frames", "3", "x.jpg"]])
def test_what_is_no_flag_is_not_taken_for_one(argv):
    assert parse_flags(DetectOptions, ["--weights", "x", *argv])["sources"] == (argv[-1],)


def recommended(flag: str, own: list[str]) -> str:
    """The first recommendation for `flag` that a page with the flags `own` can follow, or ""."""
    sentences = (sentence for names, sentence in FOREIGN_FLAGS if flag in names.split())
    return next((text for text in sentences if set(re.findall(r"--[a-z0-9-]+", text)) <= set(own)), "")


@pytest.mark.parametrize("kind", PAGES.values())
def test_flags_of_other_programs_are_translated_into_ones_that_exist(kind, capsys):
    own = flags_in(help_of(kind, capsys))
    for flag in (flag for names, _ in FOREIGN_FLAGS for flag in names.split()):
        assert flag not in own
        sentence = recommended(flag, own)
        for argv in ([flag, "1"], [f"{flag}=1"], [flag.replace("-", "_").replace("__", "--", 1)]):
            message = refused(capsys, kind, argv, foreign=FOREIGN_FLAGS)
            assert message.endswith(f": {sentence}" if sentence else "--help lists all)")


def test_each_recommendation_is_one_of_some_page(capsys):
    pages = [flags_in(help_of(kind, capsys)) for kind in PAGES.values()]
    for names, sentence in FOREIGN_FLAGS:
        assert any(recommended(names.split()[0], own) == sentence for own in pages)


@pytest.mark.parametrize(
    ("page", "flags"),
    [
        ("train.py", "--imgsz --batch --lr0 --source --project --name --exist-ok --conf --model --hyp"),
        ("evaluate.py", "--imgsz --batch --conf --iou --source --project --name --exist-ok --max-det --model"),
        ("detect.py", "--imgsz --conf --iou --source --project --name --exist-ok --max-det --model"),
    ],
)
def test_each_page_knows_the_usual_names(page, flags, capsys):
    own = flags_in(help_of(PAGES[page], capsys))
    assert all(recommended(flag, own) for flag in flags.split())


def test_a_knobs_own_parser_may_refuse_and_may_print_and_leave(capsys):
    def parse(text: str) -> str:
        if text == "help":
            raise SystemExit(0)
        raise UserError(f"{text} is no norm")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Page:
        """python page.py"""

        norm: str = knob("bn", "a norm", parse=parse)

    assert refused(capsys, Page, ["--norm", "x"]) == "error: --norm: x is no norm"
    with pytest.raises(SystemExit) as caught:
        parse_flags(Page, ["--norm", "help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("kind", "argv", "given"),
    [
        (TrainOptions, ["--run", "x"], {"out": "x"}),
        (EvaluateOptions, ["--weights", "x", "--recalibrate-pictures=3"], {"weights": "x", "recalibrate_images": 3}),
        (DetectOptions, ["--weights", "x", "--run=y", "z"], {"weights": "x", "out": "y", "sources": ("z",)}),
    ],
)
def test_a_former_name_is_understood(kind, argv, given):
    assert parse_flags(kind, argv) == given


def test_settings_that_were_saved_under_a_former_name_get_the_new_one():
    assert current_names(TrainOptions, {"run": "x", "seed": 3, "mosaic": 0.5}) == {"out": "x", "seed": 3, "mosaic": 0.5}
    assert current_names(TrainOptions, {"out": None}) == {"out": None}


# --- limits --------------------------------------------------------------------------------------------------

LIMITLESS: set[str] = set()  # numbers of any size, by field name


def number_fields(kind: type) -> list[dataclasses.Field[Any]]:
    """The knobs of a page and its groups whose flag is checked as a number."""
    groups = [f.default_factory for f in dataclasses.fields(kind) if isinstance(f.default_factory, type)]
    every = [f for part in (kind, *groups) for f in dataclasses.fields(part)]
    return [
        f for f in every if "text" in f.metadata and not f.metadata["parse"] and re.search("int|float", str(f.type))
    ]


def just_outside(f: dataclasses.Field[Any]) -> list[float]:
    low, high = f.metadata["low"], f.metadata["high"]
    if "float" not in str(f.type):
        return [limit + step for limit, step in ((low, -1), (high, 1)) if limit is not None]
    beyond = [math.nextafter(limit, to) for limit, to in ((low, -math.inf), (high, math.inf)) if limit is not None]
    return [*beyond, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("page", PAGES)
def test_each_number_has_limits_within_which_it_passes_and_beyond_which_it_exits_with_two(page, capsys):
    fields = number_fields(PAGES[page])
    assert len(fields) > 3
    for f in fields:
        flag, limits = f"--{f.name.replace('_', '-')}", [f.metadata["low"], f.metadata["high"]]
        limits = [limit for limit in limits if limit is not None]
        assert limits or f.name in LIMITLESS, f"{flag} takes any number"
        for limit in limits:
            assert parse_flags(PAGES[page], [*NEEDED[page], flag, str(limit)])[f.name] in (limit, (limit,))
        for value in just_outside(f):
            with pytest.raises(SystemExit) as caught:
                parse_flags(PAGES[page], [*NEEDED[page], f"{flag}={value}"])
            assert caught.value.code == 2
            output = capsys.readouterr().err
            assert output.startswith(f"error: argument {flag}: {value} must ") and output.count("\n") == 1
            assert all(str(limit) in output.partition(" must ")[2] for limit in limits)


@pytest.mark.parametrize("page", PAGES)
def test_the_defaults_and_the_shipped_cfgs_are_within_limits(page):
    for name in ("yolov4", "yolov4-csp", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-pico"):
        made = resolve(PAGES[page], {"weights": "x", "sources": ("x",)}, cfg_settings(load_plan(name)))
        assert check_limits(made) is None
        for group in GROUP_TITLES:
            if hasattr(made, group):
                check_limits(getattr(made, group))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limited:
    share: float | None = knob(None, "between", low=0, high=1)
    rates: tuple[float, ...] = knob((), "each at least", low=0)
    top: int = knob(0, "at most", high=9)
    free: float = knob(0.0, "any")
    switch: bool = knob(True, "not a number")
    bare: float = 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.5}, "share=1.5 must lie between 0 and 1"),
        ({"share": float("nan")}, "share=nan must lie between 0 and 1"),
        ({"rates": (1.0, -2.0)}, "rates=(1.0, -2.0) must be at least 0"),
        ({"rates": (float("inf"),)}, "rates=(inf,) must be finite and at least 0"),
        ({"top": 10}, "top=10 must be at most 9"),
        ({"free": float("nan")}, "free=nan must be finite"),
        ({"bare": float("nan")}, "bare=nan must be finite"),
    ],
)
def test_limits_in_words(given, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_limits(Limited(**given))


@pytest.mark.parametrize("given", [{}, {"share": 0, "rates": (0, 1e30), "top": -(10**18), "free": -5.0}, {"share": 1}])
def test_what_is_within_limits_passes(given):
    assert check_limits(Limited(**given)) is None


# --- who wins ------------------------------------------------------------------------------------------------


def test_only_what_was_typed_is_given():
    assert parse_flags(TrainOptions, []) == {}
    argv = ["--data", "x", "--batch-size", "8", "--image-size", "96x128", "--no-flip", "--letterbox"]
    argv += ["--lr-steps", "10", "20", "--lr-scales", ".1", ".5"]
    assert parse_flags(TrainOptions, argv) == {
        "data": ("x",),
        "batch_size": 8,
        "image_size": (96, 128),
        "flip": False,
        "letterbox": True,
        "lr_steps": (10, 20),
        "lr_scales": (0.1, 0.5),
    }


def test_flag_beats_file_beats_default():
    files = {"batch_size": 32, "subdivisions": 4, "jitter": 0.25, "unknown_key": 1}
    made = resolve(TrainOptions, {"batch_size": 8, "mosaic": 0.0}, files)
    assert (made.optim.batch_size, made.optim.subdivisions, made.optim.momentum) == (8, 4, 0.9)
    assert (made.augment.mosaic, made.augment.jitter, made.augment.flip) == (0.0, 0.25, True)


def test_a_typed_default_beats_the_file_too():
    assert (
        resolve(TrainOptions, parse_flags(TrainOptions, ["--batch-size", "16"]), {"batch_size": 64}).optim.batch_size
        == 16
    )


def test_the_cfg_file_is_used():
    plan = load_plan("yolov4-pico")
    made = resolve(TrainOptions, {"learning_rate": 0.5}, cfg_settings(plan))
    assert made.optim.learning_rate == 0.5
    assert (made.optim.batch_size, made.optim.momentum) == (plan.net.batch, plan.net.momentum)
    assert (made.optim.burn_in_steps, made.optim.lr_steps) == (None, None), "in proportion to the run: make_schedule"
    assert (made.optim.lr_policy, made.optim.final_learning_rate) == ("sgdr", plan.net.learning_rate_min)
    assert made.optim.max_steps == plan.net.max_batches != OptimOptions().max_steps
    assert made.augment.letterbox is True


@pytest.mark.parametrize(
    ("line", "norm"), [("batch_normalize=1", None), ("batch_normalize=2", "cmbn"), ("cbn=1", "cmbn")]
)
def test_a_cfg_may_ask_for_cmbn(line, norm):
    plan = parse_plan(load_plan("yolov4-pico").source_text.replace("batch_normalize=1", line), path="some.cfg")
    settings = cfg_settings(plan)
    assert settings.get("norm") == norm
    assert resolve(TrainOptions, {"norm": "gn"}, settings).norm.norm == "gn"


def test_a_cfgs_stopbackward_freezes_unless_something_else_is_typed():
    text = "[net]\nwidth=32\nheight=32\n[maxpool]\n[convolutional]\nfilters=6\nactivation=linear\nstopbackward={}\n"
    text += "[yolo]\nclasses=1\nanchors=4,4\n"
    frozen, none = (cfg_settings(parse_plan(text.format(value), path="some.cfg")) for value in (1, 0))
    assert resolve(TrainOptions, {}, frozen).optim.freeze == 1
    assert resolve(TrainOptions, {"freeze": 0}, frozen).optim.freeze == 0
    assert resolve(TrainOptions, {}, none).optim.freeze == 0


@pytest.mark.parametrize(("level", "offloads"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_cfgs_optimized_memory_keeps_activations_on_the_host(level: int, offloads: bool) -> None:
    """darknet parser.c: from 2 on it makes the outputs of layers in page-locked memory."""
    text = f"[net]\nwidth=32\nheight=32\noptimized_memory={level}\n[convolutional]\nfilters=6\nactivation=linear\n"
    text += "[yolo]\nclasses=1\nanchors=4,4\n"
    settings = cfg_settings(parse_plan(text, path="some.cfg"))
    assert resolve(TrainOptions, {}, settings).speed.offload_activations == offloads
    assert not resolve(TrainOptions, {"offload_activations": False}, settings).speed.offload_activations


def test_darknets_mosaic_uses_more_of_the_cfg():
    text = "[net]\nwidth=32\nheight=32\nmosaic=1\nletter_box=1\nmosaic_bound={}\n[convolutional]\nfilters=6\n"
    text += "activation=linear\n[yolo]\nclasses=1\nanchors=4,4\nmax=90\n"
    for bound in (True, False):
        plan = parse_plan(text.format(int(bound)), path="some.cfg")
        plain = resolve(TrainOptions, {}, cfg_settings(plan)).augment
        assert (plain.mosaic_bound, plain.max_boxes, plain.min_visibility, plain.min_side_px) == (True, None, 0.2, 2)
        given = {"mosaic_geometry": "darknet"}
        made = resolve(TrainOptions, given, cfg_settings(plan, **given)).augment
        assert (made.mosaic_bound, made.max_boxes, made.min_visibility, made.min_side_px) == (bound, 90, 0, 1)
        assert (made.mosaic, made.letterbox) == (0.5, True)
        typed = resolve(
            TrainOptions, {**given, "max_boxes": 7, "min_side_px": 3.0}, cfg_settings(plan, **given)
        ).augment
        assert (typed.max_boxes, typed.min_side_px, typed.min_visibility) == (7, 3, 0)


@pytest.mark.parametrize(
    ("lines", "mosaic", "mixup"),
    [("", 0, 0), ("mixup=1", 0, 0.5), ("mosaic=1", 0.5, 0), ("mixup=1\nmosaic=1", 0.5, 0), ("mixup=0", 0, 0)],
)
def test_a_cfg_mixes_as_darknet_does(lines, mosaic, mixup):
    text = f"[net]\nwidth=32\nheight=32\n{lines}\n[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nclasses=1\n"
    plan = parse_plan(text + "anchors=4,4,5,5,6,6\n", path="some.cfg")
    made = resolve(TrainOptions, {}, cfg_settings(plan)).augment
    assert (made.mosaic, made.mixup, made.cutmix) == (mosaic, mixup, 0)
    assert plan.warnings == ()


@pytest.mark.parametrize("name", ["yolov4", "yolov4-csp", "yolov4-tiny", "yolov4-tiny-3l", "yolov4-pico"])
def test_each_shipped_cfg_resolves(name):
    settings = cfg_settings(load_plan(name))
    assert None not in settings.values()
    flat = flatten(resolve(TrainOptions, {}, settings))
    assert {key: flat[key] for key in settings} == settings


LOSS_KEYS = {
    "focal_loss=1": "focal_loss",
    "truth_thresh=.7": "truth_thresh",
    "max_delta=3": "max_delta",
    "counters_per_class=4,5": "counters_per_class",
    "delta_normalizer=.5": "delta_normalizer",
}


@pytest.mark.parametrize("line", LOSS_KEYS)
def test_a_key_of_darknets_loss_has_a_warning_with_the_other_one(line):
    head = f"[convolutional]\nfilters=7\nactivation=linear\n[yolo]\nclasses=2\nanchors=4,4\n{line}\n"
    plan = parse_plan(f"[net]\nwidth=32\nheight=32\n{head}[route]\nlayers=0\n{head}", path="some.cfg")
    (message,) = unread_settings(plan, "autograd")
    assert message == f"some.cfg:7: {LOSS_KEYS[line]} has no effect with --loss autograd, only with --loss darknet"
    assert unread_settings(plan, "darknet") == []


def test_no_published_cfg_has_such_a_warning(shared: Path):
    cfgs = [*cfg_names(), *map(str, (shared / "darknet" / "cfg").glob("*.cfg"))]
    assert len(cfgs) > 30
    assert [line for cfg in cfgs for line in unread_settings(load_plan(cfg), "autograd")] == []


@pytest.mark.parametrize("name", cfg_names())
def test_no_cfg_of_ours_has_such_a_warning(name):
    assert unread_settings(load_plan(name), "autograd") == []


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TrainOptions, {}),
        (
            TrainOptions,
            {"norm": "cbn:window=3", "lr_steps": (1, 2), "lr_scales": (0.1, 0.1), "fill": (1, 2, 3)},
        ),
        (EvaluateOptions, {"weights": "x.pt", "image_size": (96, 128)}),
        (DetectOptions, {"weights": "x.pt", "sources": ("a", "b"), "save_json": True}),
    ],
)
def test_resolve_takes_back_what_flatten_gave(kind, given):
    options = resolve(kind, given)
    flat = flatten(options)
    assert resolve(kind, flat) == options
    assert {key: flat[key] for key in given} == given
    assert json.loads(json.dumps(flat)).keys() == flat.keys()


def test_no_two_groups_share_a_name():
    def names(kind: type) -> list[str]:
        nested = [getattr(resolve(kind, {}), group) for group in GROUP_TITLES]
        return [name for part in nested for name in flatten(part)]

    own = [name for name in flatten(resolve(TrainOptions, {})) if name not in names(TrainOptions)]
    assert len(set(names(TrainOptions))) == len(names(TrainOptions)) > 20
    assert "data" in own and "norm" not in own


def test_a_value_out_of_bounds_is_the_users_error():
    with pytest.raises(UserError, match=r"mosaic=1\.5 must lie between 0 and 1"):
        resolve(TrainOptions, {"mosaic": 1.5})


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


@pytest.mark.parametrize("typed", ["9" * 19, "9" * 400, "9" * 5000, "x\x1b[2J" * 1000])
def test_numbers_of_any_length_are_one_short_sentence(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--workers", "--batch-size", "--patience", "--subdivisions"):
        with pytest.raises(SystemExit) as stop:
            resolve(TrainOptions, parse_flags(TrainOptions, [flag, typed]))
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and len(printed) < 250 and printed.rstrip("\n").isprintable(), (flag, printed)
