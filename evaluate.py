"""COCO mAP of a trained detector: `python evaluate.py --weights runs/NAME/best.pt --data PATH`."""

from __future__ import annotations

from collections.abc import Sequence

# First, because it checks that torchvision fits torch before anything else imports it.
from options import EvaluateOptions, given_flags, run_page, settle

# isort: split
from data.loader import make_eval_loader
from data.source import open_image_set
from models.detector import load_detector
from utils.environment import pick_device
from utils.runlog import free_folder
from utils.scoring import Examiner, category_of_label


def main(argv: Sequence[str] | None = None) -> None:
    options = settle(EvaluateOptions, given_flags(EvaluateOptions, argv))
    device = pick_device(options.device)
    detector = load_detector(
        options.weights,
        device=device,
        confidence=options.confidence,
        nms_iou=options.nms_iou,
        max_detections=options.max_detections,
        input_hw=options.image_size,
    )
    image_set = open_image_set(options.data, options.split)
    categories = category_of_label(detector.class_names, image_set.class_names, image_set.category_ids)
    folder = free_folder(options.run, default=f"eval-{image_set.name}-{image_set.split}")
    print(f"data      {image_set.name} {image_set.split}: {len(image_set)} pictures")
    for line in image_set.problems.summary():
        print(f"          {line}")
    loader = make_eval_loader(
        image_set,
        batch_size=options.batch_size,
        input_hw=detector.input_hw,
        letterbox=detector.letterbox,
        workers=options.workers,
    )
    examiner = Examiner(
        detect=detector,
        batches=loader,
        class_names=detector.class_names,
        ground_truth=image_set.ground_truth(),
        image_ids=image_set.image_ids,
        categories=categories,
        device=device,
        is_coco=image_set.coco_json is not None,
    )
    table = examiner.report(folder)
    print(table.summary(), table.class_table(), sep="\n\n")
    truth = image_set.coco_json or folder / "ground_truth.json"
    print(f"\nthese are COCOeval's numbers for {truth} and {folder / 'detections.json'}; curves are in {folder}")


if __name__ == "__main__":
    run_page(main)
