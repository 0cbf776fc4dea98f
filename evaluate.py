"""COCO mAP of a trained detector: `python evaluate.py --weights runs/NAME/best.pt --data PATH`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cfg.parse import CfgError
from data.image_set import ImageSet
from data.source import open_image_set
from evaluation.build import (
    TRAINED_ON_VAL2017,
    make_evaluator,
    may_have_trained_on,
    measure_as_darknet,
    places_of,
    recalibrate_on,
    sample_images,
)
from evaluation.darknet_map import WHY_NOT_COCO
from evaluation.plots import plot_layer_gaps
from models.detector import Detector, detector_of
from models.norms.effective_batch import describe_norm, effective_images
from models.norms.freeze_stats import use_batch_statistics
from models.norms.report import measure_norms
from models.norms.running_stats import norms_with_statistics
from models.norms.table import NormOptions
from models.weights.trained import read_trained
from options import FOREIGN_FLAGS, EvaluateOptions
from utils.checkpoint import Checkpoint
from utils.environment import pick_device
from utils.errors import UserError
from utils.flags import parse_flags, resolve
from utils.page import run_page
from utils.run_folder import free_folder


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(EvaluateOptions, argv, foreign=FOREIGN_FLAGS[EvaluateOptions])
    options = resolve(EvaluateOptions, given)
    trained, origin = read_trained(options.weights, cfg=options.cfg, names=options.names)
    detector = detector_of(
        trained,
        path=options.weights,
        device=pick_device(options.device),
        confidence=options.confidence,
        nms_iou=options.nms_iou,
        max_detections=options.max_detections,
        nms=options.nms,
        resize=options.resize,
        input_hw=options.image_size,
    )
    check_statistics(options, given, detector)
    check_metric(given)
    loading = {"batch_size": options.batch_size, "workers": options.workers}
    image_set = open_image_set(options.data, options.split)
    evaluator = make_evaluator(detector, image_set, **loading, rect=options.rect, backend=options.eval_backend)
    domain = open_image_set(options.recalibrate_on, "train") if options.recalibrate_on else None
    folder = free_folder(options.out, default=f"eval-{image_set.name}-{image_set.split}")
    for line in origin:
        print(line)
    print(f"data      {image_set.name} {image_set.split}: {len(image_set)} images")
    for line in image_set.problems.summary():
        print(f"          {line}")
    if trained.is_darknet and may_have_trained_on(trained.cfg_name, len(detector.class_names), places_of(image_set)):
        print(f"warning: {TRAINED_ON_VAL2017}")
    if options.norm_report:
        images = sample_images(image_set, detector, image_count=options.recalibrate_images, **loading)
        print(write_norm_report(folder, trained, detector, images))
    if options.norm_stats == "batch":
        use_batch_statistics(detector.network)
    change = ""
    if domain is not None:
        change = f"AP {evaluator.measure().AP:.3f} with the statistics of {options.weights}, "
        said = recalibrate_on(domain, detector, image_count=options.recalibrate_images, **loading)
        write_recalibrated(folder / "recalibrated.pt", trained, detector)
    table = evaluator.report(folder)
    print(table.summary(), table.class_table(), sep="\n\n")
    truth = image_set.coco_json or folder / "ground_truth.json"
    print(f"\nthese are COCOeval's numbers for {truth} and {folder / 'detections.json'}; curves are in {folder}")
    if options.metric == "darknet":
        print(write_darknet_map(folder, options, detector, image_set))
    if change:
        print(f"{change}{table.AP:.3f} with {said}: {folder / 'recalibrated.pt'}")


def check_metric(given: dict[str, Any]) -> None:
    """UserError for a flag of darknet's metric without it."""
    unread = [name for name in ("map_points", "map_iou") if name in given]
    if unread and given.get("metric") != "darknet":
        raise UserError(f"--{unread[0].replace('_', '-')} is read with --metric darknet only")


def check_statistics(options: EvaluateOptions, given: dict[str, Any], detector: Detector) -> None:
    """UserError for flags that contradict each other or that the network's norms have no use for."""
    wanted = options.norm_report or options.recalibrate_on is not None
    if "recalibrate_images" in given and not wanted:
        raise UserError("--recalibrate-images is read with --recalibrate-on and --norm-report only")
    if options.norm_stats == "batch" and wanted:
        raise UserError("--norm-stats batch leaves the population's statistics out, so nothing can be said of them")
    if options.norm_stats == "batch" or wanted:
        norms_with_statistics(detector.network)


def write_norm_report(folder: Path, checkpoint: Checkpoint, detector: Detector, images: Sequence[Tensor]) -> str:
    """norm_report.txt and norm_report.png -> the text."""
    batch, parts = (checkpoint.settings.get(name, 1) for name in ("batch_size", "subdivisions"))
    mini_batch = checkpoint.mini_batch or batch // parts  # what is stored is one rank's
    norm, cut = NormOptions(**checkpoint.norm), {"mini_batch": mini_batch, "subdivisions": parts}
    report = measure_norms(detector.network, images)
    verdict = report.verdict(mini_batch=mini_batch, effective=effective_images(norm, **cut))
    text = f"{report.table()}\n\ntrained with {describe_norm(norm, **cut)}\n{verdict}\n"
    (folder / "norm_report.txt").write_text(text)
    panels = {
        title: np.array([[*gaps(layer).values(), stale(layer)] for layer in report.layers])
        for title, gaps, stale in (
            ("deviations differ from the population's by", lambda gap: gap.sigma, lambda gap: gap.stale_sigma),
            ("means differ by, in deviations", lambda gap: gap.mean, lambda gap: gap.stale_mean),
        )
    }
    names = [f"{layer.layer}  {layer.name}  {layer.channels}" for layer in report.layers]
    plot_layer_gaps(panels, names, [*map(str, report.sizes), "all"], folder / "norm_report.png")
    return text


def write_darknet_map(folder: Path, options: EvaluateOptions, detector: Detector, image_set: ImageSet) -> str:
    """darknet_map.txt -> the text."""
    table = measure_as_darknet(
        detector,
        image_set,
        iou=options.map_iou,
        points=int(options.map_points),
        batch_size=options.batch_size,
        workers=options.workers,
    )
    text = f"\n{table.summary()}\n\n{WHY_NOT_COCO}\n"
    (folder / "darknet_map.txt").write_text(text.lstrip())
    return text


def write_recalibrated(path: Path, checkpoint: Checkpoint, detector: Detector) -> None:
    """The checkpoint with the detector's norms, for the input size they have the statistics of."""
    weights = detector.network.state_dict()
    replace(checkpoint, input_hw=detector.input_hw, weights=weights, training=None).to_file(path)


if __name__ == "__main__":
    run_page(main, CfgError)
