"""The pages' settings, and the first file a page imports.

A setting is a dataclass field made with `knob`; groups of settings live with the part they turn and are composed
here. `utils/flags.py` makes the command lines. Precedence: flag > data set > cfg file > default.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

from data.augment import AugmentOptions
from data.image_cache import CACHES
from evaluation.coco_backends import BACKENDS
from evaluation.darknet_map import POINTS
from models.detector import DetectionOptions
from models.norms.table import NormOptions
from models.yolo.loss import LossOptions
from utils.flags import parse_image_hw, parse_subdivisions
from utils.knob import knob
from utils.schedule import POLICIES

AMP_KINDS = ("auto", "off", "bf16", "fp16")
METRICS = ("coco", "darknet")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """Batches, learning rate and what else makes an optimizer step."""

    epochs: int | None = knob(None, "passes over the images (default: as many as make max_steps)", low=1)
    max_steps: int = knob(2000, "optimizer steps, if epochs is not given (cfg: max_batches)", unit="STEPS", low=1)
    batch_size: int = knob(16, "images per optimizer step (cfg: batch)", unit="IMAGES", low=1)
    subdivisions: int | str = knob(
        1,
        "mini-batches a batch is cut into, one forward each; auto: as few as fit into the GPU's memory (cfg)",
        unit="N",
        parse=parse_subdivisions,
    )
    learning_rate: float = knob(0.01, "rate after burn-in (cfg)", low=1e-12)
    final_learning_rate: float = knob(1e-5, "where cosine and sgdr end (cfg: learning_rate_min)", low=0)
    lr_policy: str = knob(
        "cosine",
        "learning rate after burn-in (cfg: policy, with step, scale, gamma, power, sgdr_cycle, sgdr_mult)",
        choices=tuple(POLICIES),
    )
    lr_steps: tuple[int, ...] | None = knob(
        None,
        "lr_policy steps: optimizer steps at which the rate is scaled (default: the cfg's steps, in proportion)",
        unit="STEP",
        low=1,
    )
    lr_scales: tuple[float, ...] = knob((), "lr_policy steps: the factors (cfg: scales)", unit="FACTOR", low=0)
    burn_in_steps: int | None = knob(
        None,
        "steps in which the rate rises as a power (default: the cfg's burn_in, in proportion; of a short run a tenth)",
        unit="STEPS",
        low=0,
    )
    momentum: float = knob(0.9, "of SGD (cfg)", low=0, high=0.9999)
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
    channels_last: bool = knob(False, "lay images out channel by channel in memory; often faster, with amp above all")
    compile: bool = knob(False, "compile the network with torch.compile, once for each input size")
    profile: bool = knob(False, "time the first steps by operation: profile.json for a trace viewer, and a table")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """python train.py

    Train a YOLOv4-family detector. With no flag: the built-in digits, to the end, in minutes. A setting that is not
    typed comes from the cfg file, then from the default.
    """

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
        "start from a checkpoint, whose classes are found by name, or from darknet's .weights (with --cfg); what does "
        "not fit starts fresh",
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
    workers: int = knob(2, "processes that load images; 0 = the main one", unit="N", low=0)
    cache: str = knob(
        "ram",
        "where decoded training images are kept: in up to a quarter of the free memory, shared by the workers, or on "
        "up to half of the free disk, in ~/.cache/yolov4-norms (to be deleted at will), for later runs too",
        choices=CACHES,
    )
    seed: int = knob(0, "fixes initial weights, image order and augmentation", low=0, high=2**32 - 1)
    evals: int = knob(10, "evaluations over the run; the last epoch always gets one", unit="N", low=1)
    eval_backend: str = eval_backend_knob()
    optim: OptimOptions = field(default_factory=OptimOptions, metadata={"title": "optimization"})
    norm: NormOptions = field(default_factory=NormOptions, metadata={"title": "normalization"})
    augment: AugmentOptions = field(
        default_factory=AugmentOptions, metadata={"title": "augmentation (training images)"}
    )
    loss: LossOptions = field(default_factory=LossOptions, metadata={"title": "loss"})
    speed: SpeedOptions = field(default_factory=SpeedOptions, metadata={"title": "memory and speed"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """python evaluate.py

    COCO mAP of a checkpoint on a data set, with tables, curves and the detections as json.
    """

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
    batch_size: int = knob(16, "images per forward", unit="IMAGES", low=1)
    rect: bool = knob(
        False,
        "of a network with letterboxed images, batches of images of one shape without most of the grey: quicker, "
        "and AP may differ a little",
    )
    norm_stats: str = knob(
        "population",
        "what norms normalize by: their population statistics, or each batch's own",
        choices=("population", "batch"),
    )
    recalibrate_on: str | None = knob(
        None,
        "give the norms the statistics of images of this data set's 'train' split, print AP before and after and "
        "write recalibrated.pt",
        unit="PATH",
    )
    norm_report: bool = knob(
        False, "per layer, how far statistics of mini-batches are from the population's: norm_report.txt, .png"
    )
    recalibrate_images: int = knob(
        200, "images that recalibrate_on takes, and norm_report of the split", unit="IMAGES", low=1
    )
    eval_backend: str = eval_backend_knob()
    metric: str = knob("coco", "COCO's AP, or darknet's beside it", choices=METRICS)
    map_points: str = knob(
        "0", "metric darknet: recall points; 0 is the area under the curve", choices=tuple(map(str, POINTS))
    )
    map_iou: float = knob(0.5, "metric darknet: IoU that a right detection exceeds", low=0, high=1)
    run: str | None = knob(None, "folder for tables and images (default: runs/eval-DATA-SPLIT)", unit="DIR")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = knob(2, "processes that load images; 0 = the main one", unit="N", low=0)
    detection: DetectionOptions = field(default_factory=DetectionOptions, metadata={"title": "detections"})


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnDetectionOptions(DetectionOptions):
    """DetectionOptions with defaults for people to look at."""

    confidence: float = knob(0.25, "drop detections below this score", low=0, high=1)
    nms_iou: float = knob(
        0.45,
        "of two boxes of a class that overlap more than this, suppress the one with the lower score",
        low=0,
        high=1,
    )
    max_detections: int | None = knob(300, "keep this many per image, best first", unit="N", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectOptions:
    """python detect.py

    Find objects in images and videos and write annotated copies.
    """

    sources: tuple[str, ...] = knob(MISSING, "images, folders, globs, videos, or a webcam's number", unit="SOURCE")
    weights: str = knob(MISSING, "checkpoint to detect with, or darknet's .weights (with --cfg)", unit="FILE")
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(
        None, "class names of a .weights file, one a line (default: COCO's, for 80 classes)", unit="FILE"
    )
    image_size: tuple[int, int] | None = knob(
        None, "network input: 416, or HEIGHTxWIDTH (default: as trained)", unit="PX", parse=parse_image_hw
    )
    run: str | None = knob(None, "folder for annotated copies (default: runs/detect)", unit="DIR")
    save_json: bool = knob(False, "write detections.json: one entry an image, boxes as x, y, width, height in px")
    save_txt: bool = knob(False, "write a darknet label file per image: class x y w h score, relative")
    save_crops: bool = knob(False, "write each detected object as an image of its own")
    max_frames: int | None = knob(None, "stop a video or webcam after this many frames", unit="N", low=1)
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    detection: DetectionOptions = field(default_factory=DrawnDetectionOptions, metadata={"title": "detections"})
