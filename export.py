"""Write a network for other runtimes: `python export.py --weights runs/NAME/best.pt --to onnx --check PATH`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cfg.parse import CfgError
from data.annotation_formats import open_image_set
from evaluation.evaluator import Evaluator
from evaluation.export_check import check_file, check_table
from evaluation.recalibration import sample_images
from models.detector import Detector, stored_thresholds
from models.export.darknet_file import why_not_run
from models.export.formats import with_ending, write_file
from models.export.load import load_exported
from models.export.metadata import Metadata, Suppression
from models.network import Network
from models.norms.fold import fold, unfoldable
from models.predictor import TorchPredictor, fast_predictor
from models.weights.convert import write_darknet
from models.weights.trained import read_trained
from options import FOREIGN_FLAGS, ExportOptions
from utils.checkpoint import Checkpoint
from utils.console import counted, say
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import parse_flags, resolve
from utils.page import run_page
from utils.run_folder import free_folder
from utils.structures import pixels_of

AP_TOLERANCE = {"float32": 0.001, "float16": 0.001, "int8": 0.02}
NO_SUPPRESSION_LIMIT = 1000  # boxes per class that the graph keeps without --max-detections


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(ExportOptions, parse_flags(ExportOptions, argv, foreign=FOREIGN_FLAGS))
    checkpoint, origin = read_trained(options.weights, cfg=options.cfg, names=options.names, domain=options.domain)
    detector = folded_detector(checkpoint, options)
    evaluators = make_evaluators(detector, options)  # bad data ends it before files are there
    metadata = describe(checkpoint, detector, options)
    calibration = calibration_images(detector, options)
    folder = free_folder(options.out, default="export")
    for line in origin:
        print(line)
    announce(detector.network, metadata, options)
    files: list[Path] = []
    stem = folder / Path(options.weights).stem
    for kind in options.to:
        if kind == "darknet":
            own = replace(checkpoint, input_hw=detector.input_hw)
            written = [*write_darknet(with_ending(stem, ".weights"), own, source=options.weights)]
        else:
            written = write_file(kind, detector.network, metadata, stem, calibration)
        say("file", " ".join(map(str, written)))
        if kind == "darknet" and evaluators and (why := why_not_run()):
            say("", f"not checked: {why}; `pip install opencv-python-headless==4.11.0.86` in another environment")
        else:
            files.append(written[-1] if kind == "ncnn" else written[0])
    if evaluators and files and not check(evaluators, files, options):
        raise SystemExit(1)


def folded_detector(checkpoint: Checkpoint, options: ExportOptions) -> Detector:
    """Return the detector to be exported, on the CPU, with its norms merged into its convolutions where they can be."""
    detector = Detector.from_checkpoint(
        checkpoint,
        options.detection,
        path=options.weights,
        device=pick_device("cpu"),
        input_hw=options.image_size,
    )
    step, (height, width) = detector.size_step_px, detector.input_hw
    if options.dynamic and (height % step or width % step):
        raise UserError(f"--dynamic: {height}x{width} px are not multiples of the network's {step}: give --image-size")
    return replace(detector, predictor=TorchPredictor(network=fold(detector.network, partly=True)))


def describe(checkpoint: Checkpoint, detector: Detector, options: ExportOptions) -> Metadata:
    """Return what the files say about themselves."""
    rule = options.detection
    suppression = Suppression(
        iou=rule.nms_iou, confidence=rule.confidence, max_per_class=rule.max_detections or NO_SUPPRESSION_LIMIT
    )
    thresholds = stored_thresholds(checkpoint, options.weights)
    lowest = 1.0 if thresholds is None else min(thresholds.confidences(checkpoint.class_names))
    if options.outputs == "nms" and lowest < rule.confidence:
        thresholds = None  # the graph drops what they would let through
    return Metadata(
        cfg_name=checkpoint.cfg_name,
        cfg_text=checkpoint.cfg_text,
        class_names=checkpoint.class_names,
        input_hw=detector.input_hw,
        letterbox=checkpoint.letterbox,
        resize=rule.resize,
        norm=str(checkpoint.norm.get("norm", "")),
        outputs=options.outputs,
        precision=options.precision,
        batch=None if options.dynamic else options.batch_size,
        suppression=suppression if options.outputs == "nms" else None,
        thresholds=thresholds,
    )


def calibration_images(detector: Detector, options: ExportOptions) -> list[Tensor]:
    """Return images for int8's scales, in batches (N, 3, H, W) float32 of the file's batch size."""
    if options.calibrate_on is None:
        return []
    image_set = open_image_set(options.calibrate_on, "train", val_fraction=options.val_fraction)
    count = max(options.calibrate_images // options.batch_size, 1) * options.batch_size
    size, workers = options.batch_size, options.workers
    images = sample_images(image_set, detector, image_count=count, batch_size=size, workers=workers)
    if not (whole := [pixels_of(batch) for batch in images if len(batch) == size]):
        raise UserError(f"{options.calibrate_on}: has fewer images than --batch-size {size}")
    return whole


def announce(network: Network, metadata: Metadata, options: ExportOptions) -> None:
    """Print what is written, and what of it is not as in torch."""
    height, width = metadata.input_hw
    size = f"any number of images, such as {height}x{width} px" if metadata.is_dynamic else f"{height}x{width} px"
    batch = f", {counted(metadata.batch, 'image')} a call" if metadata.batch else ""
    say("export", f"{metadata.cfg_name}, {metadata.precision}, outputs {metadata.outputs}, {size}{batch}")
    if stuck := unfoldable(network):
        kinds = ", ".join(sorted({type(norm).__name__ for norm in stuck}))
        say("norm", f"{counted(len(stuck), 'layer')} of {kinds} stay in the graph: they are computed for each image,")
        say("", "which takes time that a norm with running statistics does not (ms/image of --check)")
    if metadata.suppression is not None and (kind := nms_kind(network, options)) != "default":
        say("nms", f"the graph suppresses by IoU alone, the network's [yolo] by {kind}: --check shows what it costs")


def nms_kind(network: Network, options: ExportOptions) -> str:
    return network.plan.head_specs[-1].nms_kind if options.detection.nms == "cfg" else options.detection.nms


def make_evaluators(detector: Detector, options: ExportOptions) -> dict[str, Evaluator]:
    """Return what measures the network in torch, by the name of its row: first as the files are to agree with it.

    Suppression in their graph is by IoU, so torch's is, too; the next row has the network's own, for comparison.
    """
    if options.check is None:
        return {}
    image_set = open_image_set(options.check, options.split, val_fraction=options.val_fraction)
    image_set.require_objects(options.check)
    detector = replace(detector, predictor=fast_predictor(detector.network, "float32"))
    detectors = {"torch": detector}
    if options.outputs == "nms" and (kind := nms_kind(detector.network, options)) != "default":
        detectors = {"torch": detector.with_options(nms="default"), f"torch, {kind}": detector}
    size, workers = options.batch_size, options.workers
    return {name: Evaluator(each, image_set, batch_size=size, workers=workers) for name, each in detectors.items()}


def check(evaluators: Mapping[str, Evaluator], files: Sequence[Path], options: ExportOptions) -> bool:
    """Print the network and its files side by side. Returns whether no file's AP differs by more than is allowed."""
    reference, image_set = evaluators["torch"].detector, evaluators["torch"].image_set
    tables = {name: evaluator.measure() for name, evaluator in evaluators.items()}
    expected = tables["torch"]
    loading = {"batch_size": options.batch_size, "workers": options.workers}
    checks = [
        check_file(file.name, reference, replace(reference, predictor=load_exported(file)), image_set, **loading)
        for file in files
    ]
    say("check", f"{image_set.name} {image_set.split}: {counted(len(image_set), 'image')}")
    print(f"\n{check_table(tables, checks)}\n")
    candidates = max(each.compared for each in checks)
    print(f"box px, score: the largest difference of {candidates:,} candidates from torch's nearest of their class")
    allowed = AP_TOLERANCE[options.precision] if options.ap_tolerance is None else options.ap_tolerance
    wrong = [each for each in checks if not abs(each.AP - expected.AP) <= allowed]
    for each in wrong:
        print(f"{each.name}: AP differs by {each.AP - expected.AP:+.4f}, more than {allowed:g} (--ap-tolerance)")
    if not wrong:
        print(f"AP differs by at most {allowed:g}")
    return not wrong


if __name__ == "__main__":
    run_page(main, CfgError)
