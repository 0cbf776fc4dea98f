"""The command lines. The only file that sees argparse, and the first one a page imports.

A setting is a dataclass field made with `knob`; groups of settings live with the part they turn and are composed
here. Precedence: flag > data set > cfg file > default. `given_flags` returns only what was typed, `settle` lays it
over the data set's and the cfg's values and the defaults, once; the result is printed, saved and never changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from utils.environment import check_opencv, check_torchvision
from utils.errors import UserError, exit_on_error
from utils.knob import knob, outside_limits

# Before the imports below pull torchvision in: a mismatched pair fails there, in words that help nobody.
exit_on_error(check_torchvision)
check_opencv()

from cfg.layers import ConvSpec  # noqa: E402
from cfg.parse import CfgError  # noqa: E402
from cfg.plan import Plan  # noqa: E402
from cfg.yolo import NMS_KINDS  # noqa: E402
from data.augment import AugmentOptions  # noqa: E402
from data.geometry import RESIZES  # noqa: E402
from data.picture_cache import CACHES  # noqa: E402
from models.norms.table import NormOptions  # noqa: E402
from models.yolo.loss import LossOptions  # noqa: E402
from utils.coco_backends import BACKENDS  # noqa: E402
from utils.darknet_map import POINTS  # noqa: E402
from utils.schedule import POLICIES  # noqa: E402

Options = TypeVar("Options")

AMP_KINDS = ("auto", "off", "bf16", "fp16")
METRICS = ("coco", "darknet")
GROUP_TITLES = {
    "optim": "optimisation",
    "norm": "normalisation",
    "augment": "augmentation (training pictures)",
    "loss": "loss",
    "speed": "memory and speed",
}


def parse_image_hw(text: str) -> tuple[int, int]:
    """'416' -> (416, 416); '96x128' -> height 96, width 128."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write 416, or HEIGHTxWIDTH as in 96x128")
    return int(sides[0]), int(sides[-1])


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def parse_subdivisions(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 1, or auto")
    return text if text == "auto" else int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """Batches, learning rate and what else makes an optimizer step."""

    epochs: int | None = knob(None, "passes over the pictures (default: as many as make max_steps)", low=1)
    max_steps: int = knob(2000, "optimizer steps, if epochs is not given (cfg: max_batches)", unit="STEPS", low=1)
    batch_size: int = knob(16, "pictures per optimizer step (cfg: batch)", unit="PICTURES", low=1)
    subdivisions: int | str = knob(
        1,
        "mini-batches a batch is cut into, one forward each; auto: as few as fit into the GPU's memory",
        unit="N",
        parse=parse_subdivisions,
    )
    learning_rate: float = knob(0.01, "rate after burn-in", low=1e-12)
    final_learning_rate: float = knob(1e-5, "where cosine and sgdr end (cfg: learning_rate_min)", low=0)
    lr_policy: str = knob(
        "cosine",
        "learning rate after burn-in (cfg: policy, with step, scale, gamma, power, sgdr_cycle, sgdr_mult)",
        choices=tuple(POLICIES),
    )
    lr_steps: tuple[int, ...] = knob(
        (), "lr_policy steps: optimizer steps at which the rate is scaled (cfg: steps)", unit="STEP", low=1
    )
    lr_scales: tuple[float, ...] = knob((), "lr_policy steps: the factors (cfg: scales)", unit="FACTOR", low=0)
    burn_in_steps: int = knob(0, "steps in which the rate rises as a power (cfg: burn_in)", unit="STEPS", low=0)
    momentum: float = knob(0.9, "of SGD", low=0, high=0.9999)
    weight_decay: float = knob(5e-4, "on convolution weights only (cfg: decay)", low=0, high=1)
    freeze: int = knob(
        0,
        "first layers of the cfg that do not learn, nor do the statistics of their norms (cfg: those before the last "
        "stopbackward=1)",
        unit="LAYERS",
        low=0,
    )
    backbone_rate: float = knob(
        1.0,
        "rate of all but the convolutions that feed the [yolo] layers, as a share of theirs: 0.1 keeps more of what "
        "--weights brings",
        unit="FACTOR",
        low=0,
    )
    clip_norm: float | None = knob(None, "clip the norm of the whole gradient to this", unit="NORM", low=1e-12)
    ema_decay: float | None = knob(
        None,
        "of the averaged weights (default: about the last twentieth of training; 0 = no average)",
        low=0,
        high=0.99999,
    )
    amp: str = knob("auto", "mixed precision; auto = bf16 or fp16 on CUDA, off elsewhere", choices=AMP_KINDS)


def eval_backend_knob() -> Any:
    return knob(
        "auto",
        "what computes COCO's numbers, which do not depend on it; auto = faster-coco-eval where it is installed",
        choices=BACKENDS,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedOptions:
    """What a step takes, and not what comes out of it, but for rounding."""

    checkpoint_activations: bool = knob(
        False, "keep few activations and compute the rest again in the backward: less memory, more time"
    )
    channels_last: bool = knob(False, "lay pictures out channel by channel in memory; often faster, with amp above all")
    compile: bool = knob(False, "compile the network with torch.compile, once for each input size")
    profile: bool = knob(False, "time the first steps by operation: profile.json for a trace viewer, and a table")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """python train.py"""

    data: str = knob(
        "digits",
        "COCO or VOC folder, COCO json, darknet .data file; 'digits' is the built-in set, made on first use",
        unit="PATH",
    )
    cfg: str | None = knob(
        None,
        "network: a darknet .cfg, or the name of one in cfg/ (default: yolov4-pico, made for CPUs)",
    )
    train_split: str = knob("train", "split to train on", unit="NAME")
    val_split: str = knob("val", "split to measure and choose the best weights on", unit="NAME")
    weights: str | None = knob(
        None,
        "start from a checkpoint, or from darknet's .weights (with --cfg); heads of other size start fresh",
        unit="FILE",
    )
    image_size: tuple[int, int] | None = knob(
        None, "network input: 416, or HEIGHTxWIDTH (default: the cfg's)", unit="PX", parse=parse_image_hw
    )
    multi_scale: float = knob(
        1.0,
        "vary the input size by up to this factor every 10 batches, 1 = off (cfg: random)",
        unit="FACTOR",
        low=1,
        high=4,
    )
    run: str | None = knob(None, "folder for everything this run writes (default: runs/DATA-CFG-NORM)", unit="DIR")
    resume: str | None = knob(
        None,
        "go on from a run's folder or its last.pt, with its settings; alone, from the newest run",
        unit="RUN",
        alone="",
    )
    save_minutes: float = knob(
        10,
        "write last.pt at least this often, and at an epoch's end, unless that were more than 5 % of the time",
        unit="MINUTES",
        low=0,
    )
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = knob(2, "processes that load pictures; 0 = the main one", unit="N", low=0)
    cache: str = knob(
        "ram",
        "where decoded training pictures are kept: in up to a quarter of the free memory, shared by the workers, or on "
        "up to half of the free disk, in ~/.cache/yolov4-norms (to be deleted at will), for later runs too",
        choices=CACHES,
    )
    seed: int = knob(0, "fixes initial weights, picture order and augmentation", low=0, high=2**32 - 1)
    evals: int = knob(10, "evaluations over the run; the last epoch always gets one", unit="N", low=1)
    eval_backend: str = eval_backend_knob()
    optim: OptimOptions = field(default_factory=OptimOptions)
    norm: NormOptions = field(default_factory=NormOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)


def resize_knob() -> Any:
    return knob(
        "opencv",
        "how a picture becomes the network's input: OpenCV, which averages where it shrinks, or darknet's own bilinear",
        choices=RESIZES,
    )


def nms_knob() -> Any:
    return knob(
        "cfg",
        "overlap of two boxes: IoU (default), less a share for their centres' distance (greedynms, diounms), or what "
        "the network's last [yolo] says",
        choices=("cfg", *NMS_KINDS),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """python evaluate.py"""

    weights: str = knob(MISSING, "checkpoint to evaluate, or darknet's .weights (with --cfg)", unit="FILE")
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(
        None, "class names of a .weights file, one a line (default: COCO's, for 80 classes)", unit="FILE"
    )
    data: str = knob("digits", "COCO or VOC folder, COCO json, darknet .data file, or 'digits'", unit="PATH")
    split: str = knob("val", "split to evaluate on", unit="NAME")
    image_size: tuple[int, int] | None = knob(
        None, "network input: 416, or HEIGHTxWIDTH (default: as trained)", unit="PX", parse=parse_image_hw
    )
    batch_size: int = knob(16, "pictures per forward", unit="PICTURES", low=1)
    rect: bool = knob(
        False,
        "of a network with letterboxed pictures, batches of pictures of one shape without most of the grey: quicker, "
        "and AP may differ a little",
    )
    norm_stats: str = knob(
        "population",
        "what norms normalise by: their population statistics, or each batch's own",
        choices=("population", "batch"),
    )
    recalibrate_on: str | None = knob(
        None,
        "give the norms the statistics of pictures of this data set's 'train' split, print AP before and after and "
        "write recalibrated.pt",
        unit="PATH",
    )
    norm_report: bool = knob(
        False, "per layer, how far statistics of mini-batches are from the population's: norm_report.txt, .png"
    )
    recalibrate_pictures: int = knob(
        200, "pictures that recalibrate_on takes, and norm_report of the split", unit="PICTURES", low=1
    )
    eval_backend: str = eval_backend_knob()
    metric: str = knob("coco", "COCO's AP, or darknet's beside it", choices=METRICS)
    map_points: str = knob(
        "0", "metric darknet: recall points; 0 is the area under the curve", choices=tuple(map(str, POINTS))
    )
    map_iou: float = knob(0.5, "metric darknet: IoU that a right detection exceeds", low=0, high=1)
    resize: str = resize_knob()
    nms: str = nms_knob()
    confidence: float = knob(0.001, "drop detections below this score", low=0, high=1)
    nms_iou: float = knob(
        0.6, "of two overlapping boxes of a class the weaker is dropped above this overlap", low=0, high=1
    )
    max_detections: int = knob(100, "kept per picture, best first; COCO scores 100", unit="N", low=1)
    run: str | None = knob(None, "folder for tables and pictures (default: runs/eval-DATA-SPLIT)", unit="DIR")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = knob(2, "processes that load pictures; 0 = the main one", unit="N", low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectOptions:
    """python detect.py"""

    sources: tuple[str, ...] = knob(MISSING, "pictures, folders, globs, videos, or a webcam's number", unit="SOURCE")
    weights: str = knob(MISSING, "checkpoint to detect with, or darknet's .weights (with --cfg)", unit="FILE")
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(
        None, "class names of a .weights file, one a line (default: COCO's, for 80 classes)", unit="FILE"
    )
    resize: str = resize_knob()
    nms: str = nms_knob()
    confidence: float = knob(0.25, "drop detections below this score", low=0, high=1)
    nms_iou: float = knob(
        0.45, "of two overlapping boxes of a class the weaker is dropped above this overlap", low=0, high=1
    )
    max_detections: int = knob(300, "kept per picture, best first", unit="N", low=1)
    image_size: tuple[int, int] | None = knob(
        None, "network input: 416, or HEIGHTxWIDTH (default: as trained)", unit="PX", parse=parse_image_hw
    )
    run: str | None = knob(None, "folder for annotated copies (default: runs/detect)", unit="DIR")
    save_json: bool = knob(False, "write detections.json: one entry a picture, boxes as x, y, width, height in px")
    save_txt: bool = knob(False, "write a darknet label file per picture: class x y w h score, relative")
    save_crops: bool = knob(False, "write each detected object as a picture of its own")
    max_frames: int | None = knob(None, "stop a video or webcam after this many frames", unit="N", low=1)
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")


PAGE_DESCRIPTIONS = {
    TrainOptions: "Train a YOLOv4-family detector. With no flag: the built-in digits, to the end, in minutes. "
    "A setting that is not typed comes from the cfg file, then from the default.",
    EvaluateOptions: "COCO mAP of a checkpoint on a data set, with tables, curves and the detections as json.",
    DetectOptions: "Find objects in pictures and videos and write annotated copies.",
}


def cfg_settings(plan: Plan, mosaic_geometry: str = "content") -> dict[str, Any]:
    """What the cfg file says, under the names of the options; keys that it leaves at 'nothing' are left out.

    With darknet's mosaic geometry it is heard on `mosaic_bound` and `max`, too, and darknet's limits for boxes hold.
    """
    net, head = plan.net, plan.nodes[plan.heads[-1]].spec  # darknet reads augmentation from the last [yolo]
    said: dict[str, Any] = {
        "batch_size": net.batch,
        "subdivisions": net.subdivisions,
        "learning_rate": net.learning_rate,
        "final_learning_rate": net.learning_rate_min if net.policy == "sgdr" else None,
        "lr_policy": net.policy,
        "lr_steps": net.steps or None,
        "lr_scales": net.scales or None,
        "burn_in_steps": net.burn_in_steps,
        "momentum": net.momentum,
        "weight_decay": net.decay,
        "freeze": plan.frozen_layers or None,
        "max_steps": net.max_batches or None,
        "ema_decay": net.ema_alpha or None,
        "multi_scale": 1.4 if head.random == 1 else head.random or None,
        "mosaic": 0.5 if net.mosaic else 0.0,
        "flip": net.flip,
        "letterbox": net.letter_box,
        "jitter": head.jitter,
        "resize": max(head.resize, 1 / head.resize) if head.resize else 1.0,
        "saturation": max(net.saturation, 1.0),
        "exposure": max(net.exposure, 1.0),
        "hue": net.hue,
    }
    if mosaic_geometry == "darknet":
        said |= {"mosaic_bound": net.mosaic_bound, "max_boxes": head.max_boxes}
        said |= {"min_visibility": 0.0, "min_side_px": 1.0}
    if any(isinstance(node.spec, ConvSpec) and node.spec.batch_normalize == 2 for node in plan.nodes):
        said["norm"] = "cmbn"
    return {name: value for name, value in said.items() if value is not None}


# Keys of [yolo] that --loss darknet alone reads, and their values not worth a warning: darknet's defaults, and the
# max_delta of its YOLOv4 cfgs, which clips a gradient that autograd does not make.
DARKNET_LOSS_KEYS: dict[str, tuple[Any, ...]] = {
    "focal_loss": (False,),
    "truth_thresh": (1.0,),
    "max_delta": (math.inf, 5.0, 2.0),
    "counters_per_class": ((),),
    "delta_normalizer": (1.0,),
}


def unread_settings(plan: Plan, loss: str) -> list[str]:
    """A line for each key with which the cfg asks something of training that this loss does not do."""
    if loss == "darknet":
        return []
    lines = []
    for key, silent in DARKNET_LOSS_KEYS.items():
        places = [plan.nodes[i].line for i in plan.heads if getattr(plan.nodes[i].spec, key) not in silent]
        if places:
            lines.append(f"{plan.path}:{places[0]}: {key} has no effect with --loss {loss}, only with --loss darknet")
    return lines


def settle(kind: type[Options], given: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> Options:
    """The settings: what was typed, else what the files (cfg, data set) say, else the default."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if inner := _nested(f):
            values[f.name] = settle(inner, given, files)
        elif f.name in given:
            values[f.name] = given[f.name]
        elif files and f.name in files:
            values[f.name] = files[f.name]
    return kind(**values)


def given_flags(kind: type, argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse `argv`: only what was typed, by field name. Exits with 0 after --help, with 2 on a bad flag."""
    parser = argparse.ArgumentParser(
        prog=(kind.__doc__ or "").split()[-1],
        description=PAGE_DESCRIPTIONS[kind],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_flags(parser.add_argument_group("main"), kind)
    for f in dataclasses.fields(kind):
        if inner := _nested(f):
            _add_flags(parser.add_argument_group(GROUP_TITLES.get(f.name, f.name)), inner)
    given = vars(parser.parse_args(argv))
    if given.keys() >= {"epochs", "max_steps"}:
        parser.error("--epochs and --max-steps both say how long to train: give one of them")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def flatten(options: Any) -> dict[str, Any]:
    """Settings as one flat dict of plain values, for printing and saving; `settle` takes it back."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {f.name: value})
    return flat


def run_page(page: Callable[[Sequence[str] | None], None]) -> None:
    """Bad input becomes one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A file's name need not be text: what cannot be printed is escaped. Not every stand-in stream can be told.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    exit_on_error(lambda: page(sys.argv[1:]), (UserError, CfgError))


def _add_flags(group: Any, kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if _nested(f) or "text" not in f.metadata:
            continue
        wanted: dict[str, Any] = {"help": _help(f)}
        flag = "--" + f.name.replace("_", "-")
        required = f.default is MISSING
        plain, is_tuple = _plain_type(hints[f.name])
        choices = f.metadata["choices"]
        if plain is bool:
            # Both ways, because a file may say either: --no-letterbox overrules letter_box=1.
            wanted["action"] = argparse.BooleanOptionalAction
        else:
            wanted["type"] = f.metadata["parse"] or _checked_type(f, plain)
            wanted["metavar"] = f.metadata["unit"] or ("" if choices else plain.__name__.upper())
            if choices:
                wanted["choices"] = tuple(choices() if callable(choices) else choices)
                wanted.pop("metavar")
            if is_tuple and not f.metadata["parse"]:
                wanted["nargs"] = "+"
            if f.metadata["alone"] is not None:
                wanted |= {"nargs": "?", "const": f.metadata["alone"]}
        if required and is_tuple:
            group.add_argument(f.name, **wanted)
        else:
            group.add_argument(flag, required=required, dest=f.name, **wanted)


def _checked_type(f: dataclasses.Field[Any], plain: type) -> Callable[[str], Any]:
    """`plain` for argparse, which refuses what is outside the knob's limits."""

    def parse(text: str) -> Any:
        value = plain(text)
        if wrong := outside_limits(f, value):
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value

    parse.__name__ = plain.__name__  # argparse's "invalid int value" says it
    return parse


def _help(f: dataclasses.Field[Any]) -> str:
    text = f.metadata["text"].replace("%", "%%")
    silent = f.default is MISSING or f.default is None or f.default is False or f.default == ()
    return text if silent or "(default" in text else f"{text} (default {f.default})"


def _nested(f: dataclasses.Field[Any]) -> type | None:
    factory = f.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _plain_type(hint: Any) -> tuple[type, bool]:
    """int | None -> (int, False); tuple[float, ...] -> (float, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
