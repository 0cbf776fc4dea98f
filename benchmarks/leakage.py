"""What batch norm learns where a rank's mini-batch is one scene, and what --shuffle-bn and syncbn mend.

    torchrun --nproc-per-node 2 -m benchmarks.leakage [--seeds 3] [--steps 150] [--report-only]

A scene is a video: a digit in the ink of the scene's class, one of four colours, on plain backgrounds. Half of its
frames are dark, with grey ink, but labelled like the others, because a label follows its object through a video. In
`scenes` every mini-batch of a rank has frames of one scene, in `mixed` the same frames are dealt at random. Batch
statistics of one scene tell the class of its dark frames. In inference nothing does, so what was learned of that is of
no use: the loss of the same training frames is then higher, and the AP on test frames, none of them dark, lower.

A cell is a training by train.py's own parts. Rows go to benchmarks/results/leakage.jsonl, a line per cell: a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.datasets import load_digits

from benchmarks.measured import RESULTS, ROOT, Row, circumstances
from data.annotation_formats import open_image_set
from data.dataset import SampleKey
from data.digits import digit_pools
from data.image_set import ImageSet, Record, as_instances
from data.loader import TrainBatchSampler
from engine.job import job_of
from engine.trainer import Trainer
from evaluation.evaluator import Evaluator
from evaluation.inference import image_batches
from study.rows import RowFile, read_rows
from utils import ranks
from utils.errors import exit_on_error
from utils.stop import Stop

FOLDER = ROOT / "datasets" / "leakage"  # ignored by git
CFG = ROOT / "benchmarks" / "leakage.cfg"
RESULT = RESULTS / "leakage.jsonl"
SIDE_PX = 32
INKS = {"red": (1, -0.5, -0.5), "green": (-0.5, 1, -0.5), "blue": (-0.5, -0.5, 1), "yellow": (0.5, 0.5, -1)}
FRAMES = 16  # of a scene
SCENES = {"train": 240, "val": 4, "test": 20}
MINI_BATCH, SUBDIVISIONS = 4, 8  # frames, on each rank
LAST_STEPS = 25  # over which the loss in training is averaged
TREATMENTS: dict[str, tuple[str, dict[str, object]]] = {
    "mixed, bn": ("mixed", {"norm": "bn"}),
    "scenes, bn": ("scenes", {"norm": "bn"}),
    "scenes, bn --shuffle-bn": ("scenes", {"norm": "bn", "shuffle_bn": True}),
    "scenes, syncbn": ("scenes", {"norm": "syncbn"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training. treatment: of TREATMENTS."""

    treatment: str
    ranks: int
    steps: int
    seed: int


@dataclass(eq=False)
class SceneBatches(TrainBatchSampler):
    """Batches whose mini-batches have frames of one scene each. In an epoch every frame is shown once."""

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng, share = np.random.default_rng([self.seed, self.epoch]), self.batch_size // self.ranks
        scenes = np.arange(self.images).reshape(-1, FRAMES)
        order = rng.permutation(rng.permuted(scenes, axis=1).reshape(-1, MINI_BATCH)).ravel().tolist()
        for batch in range(self.start_batch, len(self)):
            start = batch * self.batch_size + self.rank * share
            yield [SampleKey(self.epoch, at, order[at], self.sizes.base_hw) for at in range(start, start + share)]


def main() -> None:
    args = parse()
    with ranks.process_group():
        if not args.report_only:
            run_missing(args)
        if ranks.is_rank_zero():
            print(table(read_rows(RESULT)))


def run_missing(args: argparse.Namespace) -> None:
    """Run the cells that have no row, on all ranks; rank 0 writes."""
    if ranks.is_rank_zero():
        make_scenes()
    done = ranks.broadcast([{name: row[name] for name in Cell.__slots__} for row in read_rows(RESULT)])
    for cell in cells(args):
        if asdict(cell) not in done:
            row = run(cell)
            if ranks.is_rank_zero():
                with RowFile(RESULT) as file:
                    file.append(row)
                print(json.dumps(row), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=150, metavar="N")
    parser.add_argument("--report-only", action="store_true", help="print the table of the existing rows")
    return parser.parse_args()


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the grid, seed by seed, so that a stopped one has the same seeds of all treatments."""
    for seed in range(args.seeds):
        for treatment in TREATMENTS:
            yield Cell(treatment=treatment, ranks=ranks.world_size(), steps=args.steps, seed=seed)


def make_scenes() -> None:
    """Write the data set as COCO, unless it is there. Frame i is of scene i // FRAMES."""
    if (FOLDER / "annotations" / f"instances_{list(SCENES)[-1]}.json").exists():
        return
    (FOLDER / "annotations").mkdir(parents=True, exist_ok=True)
    digits, pools = load_digits().images.astype(np.float32) / 16, digit_pools()
    for number, (split, scenes) in enumerate(SCENES.items()):
        (FOLDER / split).mkdir(exist_ok=True)
        records = []
        for frame in range(scenes * FRAMES):
            rng, label = np.random.default_rng([number, frame]), frame // FRAMES % len(INKS)
            is_dark = split == "train" and rng.random() < 0.5
            digit = digits[rng.choice(pools[split])]
            image, box = draw_frame(rng, digit, np.zeros(3) if is_dark else np.array(list(INKS.values())[label]))
            path = str(FOLDER / split / f"{frame:06d}.png")
            cv2.imwrite(path, image[..., ::-1])
            records.append(
                Record(
                    path=path,
                    image_id=frame + 1,
                    boxes=box[None],
                    labels=np.array([label]),
                    is_crowd=np.zeros(1, bool),
                    hw=(SIDE_PX, SIDE_PX),
                )
            )
        content = {"info": {"mirror_safe": False}, **as_instances(records, list(INKS), range(1, len(INKS) + 1))}
        (FOLDER / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def draw_frame(rng: np.random.Generator, digit: np.ndarray, tint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) uint8 RGB of a digit (8, 8), lighter or darker than its ground, and its box (4,)."""
    size = int(rng.integers(16, 25))
    ink = cv2.resize(digit, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    columns = np.flatnonzero((ink > 0.35).any(axis=0))
    ink = ink[:, columns[0] : columns[-1] + 1]
    top, left = (int(rng.integers(SIDE_PX - side + 1)) for side in ink.shape)
    image = np.full((SIDE_PX, SIDE_PX, 3), rng.uniform(0.3, 0.7))
    colour = rng.choice([-1, 1]) * rng.uniform(0.2, 0.3) + 0.35 * tint
    image[top : top + ink.shape[0], left : left + ink.shape[1]] += ink[..., None] * colour
    image += 0.05 * rng.standard_normal((SIDE_PX, SIDE_PX, 1))
    box = np.array([left, top, left + ink.shape[1], top + ink.shape[0]], np.float32)
    return (255 * image).clip(0, 255).round().astype(np.uint8), box


def run(cell: Cell) -> Row:
    """Train and measure."""
    start = time.perf_counter()
    batches, typed = TREATMENTS[cell.treatment]
    images = MINI_BATCH * SUBDIVISIONS * cell.ranks
    given = {"data": str(FOLDER), "cfg": str(CFG), "multi_scale": 1.0, "mosaic": 0.0, "seed": cell.seed, "workers": 0}
    given |= {"batch_size": images, "subdivisions": SUBDIVISIONS, "max_steps": cell.steps, "learning_rate": 0.006}
    given |= {"optimizer": "adamw", "amp": "off", "device": "cpu", **typed}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(job_of(given), Path(scratch), Stop())
        if batches == "scenes":
            keys = trainer.loader.keys
            trainer.loader.keys = SceneBatches(**{f.name: getattr(keys, f.name) for f in fields(keys)})
        row = {**asdict(cell), "train_class_loss": round(train(trainer, cell.steps), 4)}
        trained_s = time.perf_counter() - start
        row |= measure(trainer)
    seconds = {"train_seconds": round(trained_s, 1), "seconds": round(time.perf_counter() - start, 1)}
    return {**row, **seconds, **circumstances(trainer.device)}


def train(trainer: Trainer, steps: int) -> float:
    """Train as train.py's loop does, without evaluating. Returns the class loss of an image in the last steps."""
    losses: list[float] = []
    trainer.network.train()
    while len(losses) < steps:
        trainer.loader.set_epoch(len(losses) // len(trainer.loader))
        for batch, _ in zip(trainer.loader, range(steps - len(losses)), strict=False):
            trainer.step.set_rate(trainer.schedule.rate(len(losses)))
            losses.append(float(trainer.step(batch)[2]))
            trainer.ema.update(trainer.network, step=len(losses))
    trainer.ema.agree()
    return statistics.mean(losses[-LAST_STEPS:])


def measure(trainer: Trainer) -> Row:
    """Return the class loss of the training images in inference, and AP on test images, with the averaged weights."""
    detector, criterion = trainer.evaluator.detector, trainer.step.criterion
    some: ImageSet = trainer.job.train_set.sample(800)
    with torch.no_grad():
        losses = [
            criterion(detector.network(batch.pixels()), batch.targets).classes
            for batch in image_batches(detector, some, batch_size=50, workers=0)
        ]
    test_set = open_image_set(trainer.job.options.data[0], "test")
    found = Evaluator(detector, test_set, batch_size=50, workers=0).measure()
    return {
        "inference_class_loss": round(float(sum(losses)) / len(some), 4),
        "test_AP": round(found.AP, 4),
        "test_AP50": round(found.AP50, 4),
    }


def table(rows: Sequence[Row]) -> str:
    """Return means over seeds in Markdown, with the lowest and highest AP; a line per treatment and number of ranks."""
    lines = ["| mini-batches, norm | ranks | seeds | class loss in training | in inference | test AP | AP50 |"]
    lines.append("|---|---|---|---|---|---|---|")
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["ranks"], row["treatment"]), []).append(row)
    for (world_size, treatment), group in sorted(groups.items(), key=lambda item: item[0][0]):
        mean = {name: statistics.mean(row[name] for row in group) for name in group[0] if name.endswith(("loss", "50"))}
        test = [100 * row["test_AP"] for row in group]
        lines.append(
            f"| {treatment} | {world_size} | {len(group)} | {mean['train_class_loss']:.2f} "
            f"| {mean['inference_class_loss']:.2f} | {statistics.mean(test):.1f} ({min(test):.1f} to {max(test):.1f}) "
            f"| {100 * mean['test_AP50']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_error(main)
