"""COCO mAP of a trained detector: `python evaluate.py --weights runs/NAME/best.pt --data PATH`; or of two, compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from cfg.parse import CfgError
from data.annotation_formats import open_image_set
from data.doctor.checkup import quick_findings
from data.image_set import ImageSet
from evaluation.coco_map import CocoTable, per_cent
from evaluation.comparison import Comparison, measure_detections
from evaluation.darknet_map import WHY_NOT_COCO, measure_as_darknet
from evaluation.evaluator import Evaluator
from evaluation.norm_report import write_norm_report
from evaluation.recalibration import recalibrate_on, sample_images
from evaluation.report.report import write_report
from models.detector import Detector, is_exported
from models.norms.freeze_stats import use_batch_statistics
from models.norms.running_stats import norms_with_statistics
from models.predictor import fast_predictor
from models.weights.trained import read_trained
from options import FOREIGN_FLAGS, EvaluateOptions
from utils.atomic_file import warn_on_disk_error, write_text
from utils.checkpoint import Checkpoint
from utils.console import counted, say, warn
from utils.environment import describe, pick_device
from utils.errors import UserError
from utils.flags import flatten, parse_flags, resolve
from utils.page import run_page
from utils.run_folder import free_folder

WHAT_P_IS = (
    "95 % intervals and p are of the choice of images. Another seed of a training changes AP, too: to compare ways to\n"
    "train, train several of each (python -m study)"
)


class _Loading(TypedDict):
    batch_size: int
    workers: int


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(EvaluateOptions, argv, foreign=FOREIGN_FLAGS)
    options = resolve(EvaluateOptions, given)
    if options.compare:
        compare(options, given)
        return
    detector, checkpoint = load(options)
    check_flags(options, given, detector)
    image_set = open_images(options)
    loading: _Loading = {"batch_size": options.batch_size, "workers": options.workers}
    evaluator = Evaluator(detector, image_set, **loading, rect=options.rect, backend=options.eval_backend)
    population = None
    if options.recalibrate_on:
        population = open_image_set(options.recalibrate_on, "train", val_fraction=options.val_fraction)
    folder = free_folder(options.out, default=f"eval-{image_set.name}-{image_set.split}")
    announce(checkpoint, detector.origin, image_set)
    if options.norm_report:
        assert checkpoint is not None, "an exported file has no norms"
        images = sample_images(image_set, detector, image_count=options.recalibrate_images, **loading)
        print(write_norm_report(folder, checkpoint, detector, images))
    if options.norm_stats == "batch":
        use_batch_statistics(detector.network)
    if population is not None:
        assert checkpoint is not None, "an exported file has no norms"
        before = evaluator.measure()
        source = recalibrate_on(population, detector, image_count=options.recalibrate_images, **loading)
        weights = detector.network.state_dict()  # statistics depend on the input size
        recalibrated = replace(checkpoint, input_hw=detector.input_hw, weights=weights, thresholds={}, training=None)
        recalibrated.to_file(folder / "recalibrated.pt")
    table = evaluator.report(folder)
    print(table.text())
    truth = image_set.coco_json or folder / "ground_truth.json"
    is_complete = (folder / "detections.json").is_file()
    if is_complete:
        print(f"\nthese are COCOeval's numbers for {truth} and {folder / 'detections.json'}; curves are in {folder}")
    if options.metric == "darknet":
        points = int(options.map_points)
        darknet = measure_as_darknet(detector, evaluator.image_set, iou=options.map_iou, points=points, **loading)
        text = f"{darknet.summary()}\n\n{WHY_NOT_COCO}\n"
        print(f"\n{text}")
        with warn_on_disk_error(folder / "darknet_map.txt"):
            write_text(folder / "darknet_map.txt", text)
    if population is not None:
        change = (
            f"AP {per_cent(before.AP)} with the statistics of {options.weights}, {per_cent(table.AP)} with {source}"
        )
        print(f"{change}: {folder / 'recalibrated.pt'}")
    settings = {**flatten(options), "environment": describe(detector.device)}
    with warn_on_disk_error(folder / "settings.json"):
        write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    write_report(folder, flatten(EvaluateOptions(weights=options.weights)))
    if not is_complete:
        raise UserError(f"{folder / 'detections.json'}: was not written; the numbers above are those of its detections")


def compare(options: EvaluateOptions, given: dict[str, Any]) -> None:
    """Evaluate two files on the same images, and tell how they differ; writes comparison.json."""
    image_set = open_images(options)
    # Here, because bad ones end it before files are there.
    sides = [side(path, options, given, image_set) for path in options.compare]
    folder = free_folder(options.out, default=f"compare-{image_set.name}-{image_set.split}")
    announce(None, (), image_set)
    tables = []
    for name, path, measure in zip("AB", options.compare, sides, strict=True):
        tables.append(measure(folder / name))
        say(name, f"{path}: {tables[-1].words()}")
    found = Comparison.of(*tables)
    print(f"\n{found.text()}\n\n{WHAT_P_IS}")
    with warn_on_disk_error(folder / "comparison.json"):
        content = {"files": options.compare, "images": len(image_set), **found.to_json()}
        write_text(folder / "comparison.json", json.dumps(content, indent=2))
    print(f"all of it is in {folder / 'comparison.json'}")


def side(
    path: str, options: EvaluateOptions, given: dict[str, Any], image_set: ImageSet
) -> Callable[[Path], CocoTable]:
    """Return what measures a file, and writes its report into a folder; or measures what a folder has."""
    if Path(path).is_dir():
        table = measure_detections(Path(path), image_set, backend=options.eval_backend)
        return lambda folder: table
    own = replace(options, weights=path, compare=())
    if not path.endswith(".weights"):
        own = replace(own, cfg=None, names=None)  # the flags are the other file's
    detector, _ = load(own)
    check_flags(own, given, detector)
    loading: _Loading = {"batch_size": options.batch_size, "workers": options.workers}
    return Evaluator(detector, image_set, **loading, rect=options.rect, backend=options.eval_backend).report


def open_images(options: EvaluateOptions) -> ImageSet:
    """Return the images to evaluate on, and their objects of the wanted classes."""
    image_set = open_image_set(options.data, options.split, val_fraction=options.val_fraction)
    if options.classes:
        image_set = image_set.of_classes(options.classes)
    image_set.require_objects(options.data)
    return image_set


def load(options: EvaluateOptions) -> tuple[Detector, Checkpoint | None]:
    """Return the detector with its norms, and its checkpoint; without either for an exported file."""
    if is_exported(options.weights):
        detector = Detector.load(
            options.weights,
            cfg=options.cfg,
            names=options.names,
            domain=options.domain,
            device=options.device,
            input_hw=options.image_size,
            options=options.detection,
        )
        return detector, None
    checkpoint, origin = read_trained(options.weights, cfg=options.cfg, names=options.names, domain=options.domain)
    detector = Detector.from_checkpoint(
        checkpoint,
        options.detection,
        path=options.weights,
        device=pick_device(options.device),
        input_hw=options.image_size,
    )
    if not (options.norm_report or options.recalibrate_on or options.norm_stats == "batch"):  # which need the norms
        detector = replace(detector, predictor=fast_predictor(detector.network, options.precision))
    return replace(detector, origin=origin), checkpoint


def check_flags(options: EvaluateOptions, given: dict[str, Any], detector: Detector) -> None:
    """Raise UserError for flags that contradict each other, or that another flag or the network's norms do not read."""
    needs_population = options.norm_report or options.recalibrate_on is not None
    if "recalibrate_images" in given and not needs_population:
        raise UserError("--recalibrate-images is read with --recalibrate-on and --norm-report only")
    if options.norm_stats == "batch" and needs_population:
        raise UserError(
            "--norm-stats batch ignores the population's statistics, which --norm-report and --recalibrate-on need"
        )
    if options.norm_stats == "batch" or needs_population:
        norms_with_statistics(detector.network)
    unread = [name for name in ("map_points", "map_iou") if name in given]
    if unread and options.metric != "darknet":
        raise UserError(f"--{unread[0].replace('_', '-')} is read with --metric darknet only")


def announce(checkpoint: Checkpoint | None, origin: Sequence[str], image_set: ImageSet) -> None:
    """Print what is evaluated. origin: lines about darknet's files."""
    for text in origin:
        print(text)
    say("data", f"{image_set.name} {image_set.split}: {counted(len(image_set), 'image')}")
    for finding in quick_findings(image_set):
        warn(finding)
    for note in image_set.problems.notes():
        say("", note)
    if checkpoint is None:
        return
    is_official = checkpoint.is_darknet and "yolov4" in checkpoint.cfg_name and len(checkpoint.class_names) == 80
    places = (image_set.name, image_set.coco_json or "", os.path.dirname(image_set[0].path))
    if is_official and any("val2017" in place for place in places):
        warn(
            "official YOLOv4 weights were trained on a part of val2017 (darknet's trainvalno5k holds 35,000 of the "
            "validation images of 2014): AP is too high here"
        )


if __name__ == "__main__":
    run_page(main, CfgError)
