"""The settings of train.py, evaluate.py, detect.py and export.py.

A setting is a dataclass field made with `knob`; groups of settings live with the part they configure and are composed
here. `utils/flags.py` makes command lines of them. Precedence: flag > data set > cfg file > default.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field

from cfg.net import MAX_RATE
from data.augment_options import AugmentOptions
from data.image_cache import CACHES
from evaluation.coco_backends import BACKENDS
from evaluation.darknet_map import POINTS
from models.export.formats import FORMATS
from models.export.metadata import MAX_BATCH, OUTPUTS, PRECISIONS
from models.norms.old_spelling import removed_flags
from models.norms.options import NormOptions
from models.norms.own import trust_knob
from models.predictor import TORCH_PRECISIONS
from models.tiling import TilingOptions
from models.yolo.loss import LossOptions
from models.yolo.postprocess import DetectionOptions, DrawnDetectionOptions
from utils.duration import checked_duration
from utils.errors import UserError
from utils.flags import image_size_knob, parse_count, parse_learning_rate, parse_names
from utils.knob import knob
from utils.schedule import POLICIES

OPTIMIZERS = ("auto", "sgd", "adamw")
AMP_KINDS = ("auto", "off", "bf16", "fp16")
LAYOUTS = ("auto", "on", "off")
DATA = "data set: a COCO, VOC or YOLO folder, COCO json, data.yaml, darknet .data file, or 'digits'"

DOMAIN = "of weights that were trained on several data sets with norms of their own: the data set whose norms to use"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """Settings of batches, learning rate and optimizer."""

    epochs: int | None = knob(None, "passes over the training images (default: as many as make max_steps)", low=1)
    max_steps: int = knob(2000, "optimizer steps, unless epochs is given (cfg: max_batches)", unit="STEPS", low=1)
    time_budget: str | None = knob(
        None,
        "train as many steps as fit into this time, as 3h, 90m, 1h30m, by the pace of the first; evaluations count",
        unit="TIME",
        parse=checked_duration,
    )
    batch_size: int = knob(16, "images per optimizer step (cfg: batch)", unit="IMAGES", low=1)
    subdivisions: int | str = knob(
        1, "mini-batches of a batch, one forward each; auto: as few as fit into memory (cfg)", parse=parse_count
    )
    optimizer: str = knob(
        "auto",
        "sgd, as the cfg says (its batch, rate, policy, momentum, burn-in), for long trainings and --loss darknet; or "
        "adamw with a recipe of its own; auto chooses, and says why",
        choices=OPTIMIZERS,
    )
    learning_rate: float | str = knob(
        0.01,
        "learning rate after burn-in (sgd: the cfg's; adamw: for 16 images a batch 0.012 from scratch, 0.008 from "
        "--weights, 0.0008 if these know all classes; else by the root of --batch-size); auto: found by a test of "
        "about a minute before the first step",
        parse=parse_learning_rate,
        low=1e-12,
        high=MAX_RATE,
    )
    final_learning_rate: float = knob(
        1e-5, "rate at which cosine and sgdr end (cfg: learning_rate_min)", low=0, high=MAX_RATE
    )
    lr_policy: str = knob(
        "cosine", "schedule after burn-in (cfg: policy, step, scale, gamma, power, sgdr_cycle/_mult)", choices=POLICIES
    )
    lr_steps: tuple[int, ...] | None = knob(
        None, "lr_policy steps: when to scale the rate (default: the cfg's steps, in proportion)", unit="STEP", low=1
    )
    lr_scales: tuple[float, ...] = knob((), "with lr_policy steps: the factors (cfg: scales)", unit="FACTOR", low=0)
    burn_in_steps: int | None = knob(
        None, "steps of warm-up (default: the cfg's, in proportion, or a tenth of a short run)", unit="STEPS", low=0
    )
    momentum: float = knob(0.9, "momentum of sgd (cfg)", low=0, high=0.9999)
    weight_decay: float = knob(5e-4, "weight decay, on convolution weights only (cfg: decay)", low=0, high=1)
    freeze: int = knob(
        0, "freeze the first N layers and their norm statistics (cfg: those before the last stopbackward=1)", low=0
    )
    backbone_rate: float = knob(
        1.0, "factor on the rate of all layers but those that feed [yolo]; 0.1 keeps more of --weights", low=0
    )
    clip_norm: float | None = knob(None, "clip the whole gradient to this norm", unit="NORM", low=1e-12)
    ema_decay: float | None = knob(
        None,
        "largest decay of the weights' EMA, 0 = off; it remembers a ninth of the steps so far (default 0.9999)",
        low=0,
        high=0.99999,
    )
    amp: str = knob(
        "auto",
        "mixed precision; auto = bf16 where the CPU or GPU has it, fp16 on other GPUs, off elsewhere and with --loss "
        "darknet",
        choices=AMP_KINDS,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedOptions:
    """Settings of memory and speed, which change results by rounding only."""

    checkpoint_activations: bool = knob(False, "recompute most activations in the backward: less memory, more time")
    offload_activations: bool = knob(
        False, "on a GPU, keep activations in host memory until the backward: less GPU memory, more time"
    )
    channels_last: str = knob(
        "auto",
        "channels-last memory format; auto = with amp, but not for gn and kin",
        choices=LAYOUTS,
        alone="on",
    )
    compile: bool = knob(False, "compile the network with torch.compile, once per input size")
    profile: bool = knob(False, "profile the first steps: profile.json for a trace viewer, and a table")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """python train.py

    Train a YOLOv4-family detector. Without flags it trains on the built-in digits, in minutes. A setting that is not
    given comes from the cfg file, else from the default.
    """

    data: tuple[str, ...] = knob(
        ("digits",), f"{DATA} (default digits); several are the domains of one training", unit="PATH"
    )
    domain_batches: str = knob(
        "mixed",
        "with several --data: mini-batches of images of all of them, or each of one",
        choices=("mixed", "one"),
    )
    val_data: str | None = knob(None, "validate on this data set, such as a second COCO json", unit="PATH")
    val_fraction: float = knob(
        0.1, "of a data set without a split 'val', hold out this part of its images; 0 = none", low=0, high=0.9
    )
    classes: tuple[str, ...] = knob((), "train on these classes only, by name: a,b", unit="NAMES", parse=parse_names)
    cfg: str | None = knob(None, "network: a darknet .cfg, or the name of one in cfg/ (default: yolov4-pico, for CPUs)")
    train_split: str = knob("train", "split to train on", unit="NAME")
    val_split: str = knob("val", "split to evaluate on, which selects the best weights", unit="NAME")
    weights: str | None = knob(
        None,
        "start from a checkpoint, with classes matched by name, from darknet's .weights (with --cfg), or from "
        "published ones by name, as yolov4.conv.137, downloaded once; layers that do not fit are re-initialized",
        unit="FILE",
    )
    trust: tuple[str, ...] = trust_knob()
    image_size: tuple[int, int] | None = image_size_knob("network input: 416, or HEIGHTxWIDTH (default: the cfg's)")
    multi_scale: float = knob(
        1.0, "vary the input size by up to this factor every 10 batches, 1 = off (cfg: random)", low=1, high=4
    )
    out: str | None = knob(
        None, "folder for everything this run writes (default: runs/DATA-CFG-NORM)", unit="DIR", formerly="run"
    )
    resume: str | None = knob(
        None, "resume a run, its folder or last.pt, with its settings; without RUN the newest", unit="RUN", alone=""
    )
    save_minutes: float = knob(
        10, "write last.pt this often, and after each epoch if that takes under 5 % of the time", unit="MINUTES", low=0
    )
    device: str = knob("auto", "device: auto, cpu, cuda, cuda:1 (or 1), mps")
    workers: int = knob(2, "worker processes that load images; 0 = load in the main process", low=0)
    cache: str = knob(
        "ram",
        "where to keep decoded training images: in up to a quarter of the free memory, shared by the workers, or on "
        "up to half of the free disk, in ~/.cache/yolov4-norms (safe to delete), for later runs too",
        choices=CACHES,
    )
    seed: int = knob(0, "seed of initial weights, image order and augmentation", low=0, high=2**32 - 1)
    balance: bool = knob(
        False, "show images of rare classes more often: by the root of (images with the commonest class / with theirs)"
    )
    evals: int = knob(
        10, "number of evaluations: one after a twentieth of the run, others evenly, one after the last epoch", low=1
    )
    patience: int | None = knob(
        None,
        "end early, after this many evaluations in a row without a gain in AP beyond noise, which is 0.002 (default: "
        "never)",
        unit="EVALS",
        low=1,
    )
    eval_backend: str = knob(
        "auto", "library of COCO's metrics, with equal results; auto = faster-coco-eval if there", choices=BACKENDS
    )
    logger: tuple[str, ...] = knob(
        (),
        "log the curves with tensorboard, wandb, mlflow or trackio (pip install -e .[NAME]), or tell a listener of "
        "yours, as MODULE:CLASS (docs/python.md); none: nobody (default: tensorboard, if it is installed)",
        unit="NAME",
    )
    optim: OptimOptions = field(default_factory=OptimOptions, metadata={"title": "optimization"})
    norm: NormOptions = field(default_factory=NormOptions, metadata={"title": "normalization"})
    augment: AugmentOptions = field(default_factory=AugmentOptions, metadata={"title": "augmentation"})
    loss: LossOptions = field(default_factory=LossOptions, metadata={"title": "loss"})
    speed: SpeedOptions = field(default_factory=SpeedOptions, metadata={"title": "memory and speed"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """python evaluate.py

    Measure COCO mAP of a checkpoint on a data set; writes tables, curves and the detections as json.
    """

    weights: str = knob(
        "",
        "checkpoint to evaluate, darknet's .weights (with --cfg), or an exported file (default: two, with --compare)",
        unit="FILE",
    )
    compare: tuple[str, ...] = knob(
        (),
        "evaluate two such files, or folders that evaluate.py or train.py wrote for the same data, and tell whether AP "
        "differs by more than chance in the choice of images explains",
        unit="FILE",
    )
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(None, "class names of a .weights file, one per line (default: COCO's 80)", unit="FILE")
    trust: tuple[str, ...] = trust_knob()
    domain: str | None = knob(None, DOMAIN, unit="NAME")
    data: str = knob("digits", DATA, unit="PATH")
    split: str = knob("val", "split to evaluate on; 'all' of a set that nothing divides", unit="NAME")
    val_fraction: float = knob(
        0.0, "of a data set without a split 'val', evaluate on what train.py holds out by this", low=0, high=0.9
    )
    classes: tuple[str, ...] = knob((), "evaluate on these classes only, by name: a,b", unit="NAMES", parse=parse_names)
    image_size: tuple[int, int] | None = image_size_knob("network input: 416, or HEIGHTxWIDTH (default: as trained)")
    batch_size: int = knob(16, "images per forward", unit="IMAGES", low=1)
    rect: bool = knob(False, "batch letterboxed images of similar shape, to pad less: faster, slightly other AP")
    norm_stats: str = knob(
        "population", "statistics that norms use: the population's or each batch's", choices=("population", "batch")
    )
    recalibrate_on: str | None = knob(
        None, "recompute norm statistics on PATH's train split; AP before and after, and recalibrated.pt", unit="PATH"
    )
    norm_report: bool = knob(
        False, "report per layer how far mini-batch statistics are from population statistics: norm_report.txt, .png"
    )
    recalibrate_images: int = knob(
        200, "images for recalibrate_on and norm_report", unit="IMAGES", low=1, formerly="recalibrate_pictures"
    )
    eval_backend: str = knob(
        "auto", "library of COCO's metrics, with equal results; auto = faster-coco-eval if there", choices=BACKENDS
    )
    metric: str = knob("coco", "coco: COCO's AP; darknet: darknet's mAP as well", choices=("coco", "darknet"))
    map_points: str = knob(
        "0", "with metric darknet: recall points; 0 is the area under the curve", choices=tuple(map(str, POINTS))
    )
    map_iou: float = knob(0.5, "with metric darknet: IoU above which a detection is a true positive", low=0, high=1)
    out: str | None = knob(
        None, "folder for tables and images (default: runs/eval-DATA-SPLIT)", unit="DIR", formerly="run"
    )
    device: str = knob("auto", "device: auto, cpu, cuda, cuda:1 (or 1), mps")
    precision: str = knob(
        "float32",
        "type to compute in; auto: what the device is fast with, AP differs a little",
        choices=TORCH_PRECISIONS,
    )
    workers: int = knob(2, "worker processes that load images; 0 = load in the main process", low=0)
    detection: DetectionOptions = field(default_factory=DetectionOptions, metadata={"title": "detections"})

    def __post_init__(self) -> None:
        if bool(self.weights) == bool(self.compare) or len(self.compare) not in (0, 2):
            raise UserError("name what to evaluate: --weights FILE, or two with --compare A B")
        if self.compare and (self.norm_report or self.recalibrate_on or self.metric != "coco"):
            raise UserError("--norm-report, --recalibrate-on and --metric darknet are of one file: --weights FILE")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectOptions:
    """python detect.py

    Find objects in images and videos and write annotated copies.
    """

    sources: tuple[str, ...] = knob(
        MISSING,
        "images, folders, globs, videos, addresses (http://, rtsp://, udp://), or the number of a webcam",
        unit="SOURCE",
    )
    weights: str = knob(
        MISSING,
        "checkpoint, darknet's .weights (with --cfg), or a published name, as yolov4",
        unit="FILE",
    )
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(None, "class names of a .weights file, one per line (default: COCO's 80)", unit="FILE")
    trust: tuple[str, ...] = trust_knob()
    domain: str | None = knob(None, DOMAIN, unit="NAME")
    classes: tuple[str, ...] = knob((), "keep these classes only, by name: a,b", unit="NAMES", parse=parse_names)
    image_size: tuple[int, int] | None = image_size_knob("network input: 416, or HEIGHTxWIDTH (default: as trained)")
    out: str | None = knob(None, "folder for annotated copies (default: runs/detect)", unit="DIR", formerly="run")
    save_json: bool = knob(False, "write detections.json: one entry per image, boxes as x, y, width, height in px")
    save_txt: bool = knob(
        False,
        "write a data set: data.yaml, images/ (links, and frames), labels/ (a darknet label file each: class x y w h "
        "score, in relative coordinates)",
    )
    save_crops: bool = knob(False, "write a crop of each detected object")
    save_video: bool = knob(False, "write the annotated video of live streams and webcams, too")
    show: bool = knob(False, "show annotated images in a window; q ends")
    track: bool = knob(False, "number each object of a video, the same one in all frames (pip install .[track])")
    max_frames: int | None = knob(None, "stop a video, stream or webcam after detecting in this many frames", low=1)
    stride_frames: int = knob(1, "detect in every N-th frame of a video, stream or webcam only", unit="N", low=1)
    device: str = knob("auto", "device: auto, cpu, cuda, cuda:1 (or 1), mps")
    precision: str = knob(
        "auto", "type to compute in; auto: bf16 or fp16 where the device is fast with it", choices=TORCH_PRECISIONS
    )
    batch_size: int | str = knob(
        "auto",
        "images of a folder per forward; auto: 4 on a CPU, 16 on a GPU, 1 with tile or a live stream",
        parse=parse_count,
    )
    tiling: TilingOptions = field(default_factory=TilingOptions, metadata={"title": "large images"})
    detection: DetectionOptions = field(default_factory=DrawnDetectionOptions, metadata={"title": "detections"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """python export.py

    Write a trained network as files for other runtimes, and prove on images that they detect the same.
    """

    weights: str = knob(MISSING, "checkpoint to export, or darknet's .weights (with --cfg)", unit="FILE")
    to: tuple[str, ...] = knob(
        ("onnx",), f"formats to write, of {', '.join(FORMATS)} (default onnx)", unit="FORMAT", choices=FORMATS
    )
    cfg: str | None = knob(None, "network of a .weights file: a darknet .cfg, or the name of one in cfg/")
    names: str | None = knob(None, "class names of a .weights file, one per line (default: COCO's 80)", unit="FILE")
    trust: tuple[str, ...] = trust_knob()
    domain: str | None = knob(None, DOMAIN, unit="NAME")
    outputs: str = knob(
        "decoded",
        "decoded: one tensor (N, S, 4 + 1 + C) of boxes xyxy in px, objectness, classes; heads: logits of each [yolo]; "
        "nms: suppression in the graph, rows of image, box, score, class",
        choices=OUTPUTS,
    )
    precision: str = knob("float32", "number format of the weights; int8 needs --calibrate-on", choices=PRECISIONS)
    calibrate_on: str | None = knob(None, "find int8's scales on PATH's train split", unit="PATH")
    calibrate_images: int = knob(100, "images for calibrate_on", unit="IMAGES", low=1)
    image_size: tuple[int, int] | None = image_size_knob("network input: 416, or HEIGHTxWIDTH (default: as trained)")
    batch_size: int = knob(1, "images of one call", unit="IMAGES", low=1, high=MAX_BATCH)
    dynamic: bool = knob(False, "take any number of images, of any size whose sides the network's strides divide")
    check: str | None = knob(
        None, "evaluate the network and its files on this data set; exit code 1 where AP differs", unit="PATH"
    )
    split: str = knob("val", "split for check; 'all' of a set that nothing divides", unit="NAME")
    val_fraction: float = knob(
        0.0, "of a data set without a split 'val', check on what train.py holds out by this", low=0, high=0.9
    )
    ap_tolerance: float | None = knob(
        None, "with check: the difference in AP that is allowed (default 0.001; int8: 0.02)", low=0, high=1
    )
    out: str | None = knob(None, "folder for the files (default: runs/export)", unit="DIR")
    workers: int = knob(2, "worker processes that load images; 0 = load in the main process", low=0)
    detection: DetectionOptions = field(default_factory=DetectionOptions, metadata={"title": "detections"})

    def __post_init__(self) -> None:
        if "ncnn" in self.to and (self.dynamic or self.batch_size > 1):
            raise UserError("--to ncnn writes files for one image of one size: leave --dynamic and --batch-size out")
        if self.dynamic and self.batch_size > 1:
            raise UserError("--dynamic takes any number of images: leave --batch-size out")
        if (self.precision == "int8") != (self.calibrate_on is not None):
            raise UserError("--precision int8 and --calibrate-on PATH go together: int8's scales are found on images")
        for kind in self.to:
            if kind in ("torchscript", "ncnn", "darknet") and (self.precision == "int8" or self.outputs == "nms"):
                raise UserError(f"--to {kind} has neither --precision int8 nor --outputs nms: onnx and openvino have")
        if "darknet" in self.to and self.precision != "float32":
            raise UserError(f"--to darknet: a .weights file is float32, not {self.precision}")
        if self.ap_tolerance is not None and self.check is None:
            raise UserError("--ap-tolerance is read with --check only")


# Flags of other detectors and of earlier versions, and what to write here (see `parse_flags`).
FOREIGN_FLAGS = (
    ("--imgsz --img --img-size", "write --image-size"),
    ("--project --name", "--out DIR is the folder of everything this run writes"),
    ("--exist-ok", "a folder that holds files is never written into, name another one with --out"),
    ("--conf --conf-thres", "write --confidence"),
    ("--iou --iou-thres", "write --nms-iou"),
    ("--conf --conf-thres --iou --iou-thres", "only evaluate.py and detect.py have it"),
    ("--max-det", "write --max-detections"),
    ("--source", "write --data"),
    ("--source", "sources are given without a flag: python detect.py --weights FILE SOURCE ..."),
    ("--batch", "--batch-size is the images of one optimizer step, --subdivisions the forwards they are split into"),
    ("--batch", "write --batch-size"),
    ("--model", "--weights is the checkpoint, --cfg the network (to train, or of a darknet .weights file)"),
    ("--lr0 --lr", "write --learning-rate"),
    ("--lrf", "write --final-learning-rate, which is a rate and not a share of the first one"),
    ("--cos-lr", "write --lr-policy cosine"),
    ("--warmup-epochs", "write --burn-in-steps, in optimizer steps"),
    ("--no-channels-last", "write --channels-last off"),
    ("--hyp", "its settings are flags of train.py, or keys of the cfg file"),
    *removed_flags().items(),
)
