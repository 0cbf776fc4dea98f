"""Two domains in one training: mini-batches, statistics and affine part of all images or of each domain.

    OMP_NUM_THREADS=1 python -m benchmarks.domains [--data digits bccd] [--bccd PATH] [--seeds 3] [--steps 800]
        [--report-only]

Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 5: what matters is that training and inference agree. The
domains are the built-in digits at shift 0 and 1 (data/digits_scene.py); or BCCD and a copy of its images with their
channels exchanged and half as bright. A cell is a training of the small net with bn and SGD: batches of 16 images in
two forwards, without mosaics. Its best weights by the mean AP of both val splits are measured on both test splits. Rows
go to benchmarks/results/domains.jsonl, a line per cell: a grid that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import train
from benchmarks.measured import RESULTS, Row, circumstances
from data.annotation_formats import open_image_set
from data.digits import make_digits
from data.image_set import as_instances
from engine.job import job_of
from evaluation.domains import DomainEvaluator, DomainTable
from evaluation.evaluator import Evaluator
from models.detector import Detector
from models.predictor import TorchPredictor
from models.stored_network import build_network
from models.yolo.postprocess import DetectionOptions
from study.presets import HERE, MADE
from study.rows import RowFile, read_rows
from study.statistics import gain
from utils.checkpoint import Checkpoint
from utils.draw import write_png
from utils.environment import pick_device
from utils.errors import UserError, exit_on_error
from utils.image_file import read_image

SPLITS = ("train", "val", "test")
SCENES = {"train": 512, "val": 100, "test": 300}
# Mini-batches, statistics and affine part, by what train.py calls them; whether it is used as it was trained.
SCHEMES = {
    "mixed, shared, shared": "consistent",
    "one, shared, shared": "inconsistent",
    "one, own, shared": "consistent",
    "mixed, own, shared": "consistent",
    "one, own, own": "consistent",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], choices=("digits", "bccd"))
    parser.add_argument("--bccd", metavar="PATH", help="the BCCD data set, with splits train, val and test")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=800, metavar="N")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "domains.jsonl"
    if not args.report_only:
        with RowFile(path) as file:
            done = {name_of(row) for row in file.rows}
            for cell in cells(args):
                if name_of(cell) not in done:
                    row = run(cell, args.bccd)
                    file.append(row)
                    print(f"{row['data']}: {row['scheme']}, seed {row['seed']}: test AP {row['test_AP']}", flush=True)
    print(table_of(read_rows(path)))


def cells(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the grid, seed by seed, so that a stopped one has the same seeds of all schemes."""
    for data in args.data:
        for seed in range(args.seeds):
            for scheme in SCHEMES:
                yield {"data": data, "scheme": scheme, "seed": seed, "steps": args.steps}


def name_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("data", "scheme", "seed", "steps"))


def run(cell: Row, bccd: str | None) -> Row:
    """Train and test one cell. Returns its row, with AP by domain."""
    paths, start = domain_paths(cell["data"], bccd), time.process_time()
    batches, statistics, affine = cell["scheme"].split(", ")
    job = job_of(
        {
            "data": tuple(map(str, paths)),
            "cfg": str(HERE / "small.cfg"),
            "image_size": (96, 128) if cell["data"] == "bccd" else (80, 80),
            "domain_batches": batches,
            "domain_statistics": statistics,
            "domain_affine": affine,
            "seed": cell["seed"],
            "device": "cpu",
            "amp": "off",
            "workers": 0,
            "evals": 2,
            "max_steps": cell["steps"],
            "optimizer": "sgd",
            "batch_size": 16,
            "subdivisions": 2,
            "learning_rate": 0.01,
            "final_learning_rate": 0.0001,
            "lr_policy": "cosine",
            "burn_in_steps": cell["steps"] // 10,
            "mosaic": 0.0,
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train.train(job, folder)
        val = train.finish(job, folder).measure()
        best = Checkpoint.from_file(folder / "best.pt")
    detector = Detector(
        predictor=TorchPredictor(network=build_network(best)),
        class_names=best.class_names,
        letterbox=best.letterbox,
        options=DetectionOptions(),
    )
    tests = {path.name: open_image_set(path, "test") for path in paths}
    test = DomainEvaluator(
        {name: Evaluator(detector, image_set, batch_size=16, workers=0) for name, image_set in tests.items()}
    ).measure()
    assert isinstance(val, DomainTable)
    found: Row = {}
    for split, table in (("val", val), ("test", test)):
        found[f"{split}_AP"] = round(table.AP, 4)
        found |= {f"{split}_AP_{number}": round(each.AP, 4) for number, each in enumerate(table.tables.values())}
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    return {**cell, **found, **circumstances(pick_device("cpu"))}


def domain_paths(data: str, bccd: str | None) -> tuple[Path, Path]:
    """Return the folders of both domains, which are made here on first use."""
    if data == "digits":
        first, second = (
            make_digits(MADE / f"domain-digits-{shift:g}", counts=SCENES, hw=(80, 80), shift=shift)
            for shift in (0.0, 1.0)
        )
        return first, second
    if bccd is None:
        raise UserError("--data bccd: name its folder by --bccd")
    return Path(bccd), recoloured(Path(bccd), MADE / "domain-bccd-recoloured")


def recoloured(source: Path, folder: Path) -> Path:
    """Write a copy of a data set, in COCO's format, with blue, red and green in place of RGB and half as bright."""
    if (folder / "annotations" / f"instances_{SPLITS[-1]}.json").is_file():
        return folder
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        image_set = open_image_set(source, split)
        (folder / split).mkdir(exist_ok=True)
        content = as_instances(
            (image_set[index] for index in range(len(image_set))), image_set.class_names, image_set.category_ids
        )
        for index, entry in enumerate(content["images"]):
            image = read_image(image_set[index].path)
            assert image is not None, image_set[index].path
            entry["file_name"] = Path(entry["file_name"]).stem + ".png"
            write_png(folder / split / entry["file_name"], np.ascontiguousarray(image[..., [2, 0, 1]] // 2))
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def table_of(rows: Sequence[Row]) -> str:
    """Return means over seeds as Markdown, and each scheme's gain over the first one, paired by seed."""
    lines = []
    for data, steps in dict.fromkeys((row["data"], row["steps"]) for row in rows):
        here = [row for row in rows if (row["data"], row["steps"]) == (data, steps)]
        reference = by_seed(here, next(iter(SCHEMES)))
        lines += [
            "",
            f"| {data}, {steps} steps: mini-batches, statistics, affine part | used as it was trained | seeds "
            "| val AP: first, second | test AP: first, second | mean | gain, 95 % interval |",
            "|---|---|---|---|---|---|---|",
        ]
        for scheme, is_consistent in SCHEMES.items():
            group = [row for row in here if row["scheme"] == scheme]
            if not group:
                continue
            val, test = (
                ", ".join(f"{100 * fmean(row[f'{split}_AP_{number}'] for row in group):.1f}" for number in (0, 1))
                for split in ("val", "test")
            )
            mean = f"{100 * fmean(row['test_AP'] for row in group):.1f}"
            found = None if scheme == next(iter(SCHEMES)) else gain(by_seed(group, scheme), reference)
            gained = "" if found is None else f"{found.value:+.1f}"
            if found is not None and found.seeds > 1:
                gained += f" [{found.low:+.1f}, {found.high:+.1f}]"
            columns = (scheme, is_consistent, len(group), val, test, mean, gained)
            lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines[1:])


def by_seed(rows: Sequence[Row], scheme: str) -> dict[int, float]:
    return {row["seed"]: 100 * row["test_AP"] for row in rows if row["scheme"] == scheme}


if __name__ == "__main__":
    exit_on_error(main)
