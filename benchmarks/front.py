"""The image on top of the README, docs/front.png: what a network found, and AP over the images in a forward.

    python -m benchmarks.front --weights runs/NAME/best.pt IMAGE

Left the image with its detections, by `Detector` with its defaults. Right the plot of `benchmarks.small_batch` for
the first setting that has both lines. The network was trained by

    python train.py --data BCCD --weights yolo-fastest-1.1-xl --image-size 160 --epochs 12 --batch-size 16
        --subdivisions 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.measured import RESULTS, ROOT
from benchmarks.small_batch import by_setting, draw, is_plotted
from models.detector import Detector
from study.rows import read_rows
from utils.errors import exit_on_error
from utils.figure import save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("image", metavar="IMAGE")
    args = parser.parse_args()
    settings = by_setting(read_rows(RESULTS / "recipes.jsonl"))
    setting, cells = next((setting, cells) for setting, cells in settings.items() if is_plotted(cells))
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(0.9, 1))
    left.imshow(Detector.load(args.weights)(args.image).plot())
    left.set_axis_off()
    draw(right, setting, cells)
    save_figure(figure, Path(ROOT, "docs", "front.png"), dpi=110)


if __name__ == "__main__":
    exit_on_error(main)
