"""Training samples per second: ours, with images decoded each time or kept, beside a plain baseline.

    python -m benchmarks.loader --bccd PATH --coco PATH [--size 416] [--workers 2] [--rounds 7]
    python -m benchmarks.loader --memory [--entries 100000] [--epochs 5] [--workers 2] [--cache ram]

All make mosaics of four images, with jitter, mirroring and colour. The baseline is what one would write first: a torch
DataLoader with a dataset that reads four whole images by cv2.imread, gives each to an albumentations pipeline
(RandomResizedCrop, HorizontalFlip, HueSaturationValue) and pastes quarters. `cold` decodes (--cache off); `ram` and
`disk` find all images in their cache. All take turns in every round, because the speed of a machine changes; a ratio is
the median over rounds of (samples/s) / (samples/s of the baseline) in the same round.

--memory: memory of the workers and the main process, in epochs over a synthetic index of many entries that name a few
small images, by /proc/PID/smaps_rollup: each process counts its part of shared memory (PSS).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measured import RESULTS, Row, against, circumstances, write
from data.albumentations_import import albumentations as A
from data.annotation_formats import open_image_set
from data.augment_options import AugmentOptions
from data.image_cache import CACHES
from data.image_set import ImageSet, Record, pack
from data.loader import InputSizes, TrainLoader, make_train_loader
from data.problems import Problems

BATCH = 8
NAMES = ("baseline", "cold", "ram", "disk")
MOSAICS = AugmentOptions(mosaic=1.0)


class Baseline(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Data set of mosaics (3, S, S) uint8 and their objects (M, 5): box, label."""

    def __init__(self, image_set: ImageSet, size: int) -> None:
        self.records = [image_set[index] for index in range(len(image_set))]
        self.size = size
        self.pipeline = A.Compose(
            [
                A.RandomResizedCrop(size=(size, size), scale=(0.4, 1.0)),
                A.HorizontalFlip(p=0.5),
                A.HueSaturationValue(p=1.0),
            ],
            bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"], min_visibility=0.2, clip=True),
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        objects = [np.empty((0, 5), np.float32)]
        cut_x, cut_y = np.random.randint(int(0.2 * self.size), int(0.8 * self.size), 2)
        others = np.random.randint(len(self), size=3)
        for tile, record in enumerate(self.records[at] for at in (index, *others)):
            row, column = divmod(tile, 2)
            left, right = ((0, cut_x), (cut_x, self.size))[column]
            top, bottom = ((0, cut_y), (cut_y, self.size))[row]
            image = cv2.cvtColor(np.asarray(cv2.imread(record.path)), cv2.COLOR_BGR2RGB)
            augmented = self.pipeline(image=image, bboxes=record.boxes, labels=record.labels)
            canvas[top:bottom, left:right] = augmented["image"][top:bottom, left:right]
            boxes = np.array(augmented["bboxes"], np.float32).reshape(-1, 4)
            boxes = boxes.clip([left, top, left, top], [right, bottom, right, bottom])
            seen = (boxes[:, 2:] - boxes[:, :2] >= 2).all(axis=1)
            labels = np.array(augmented["labels"], np.float32)
            objects.append(np.concatenate([boxes, labels[:, None]], axis=1)[seen])
        return torch.from_numpy(canvas.transpose(2, 0, 1).copy()), torch.from_numpy(np.concatenate(objects))


def baseline_batches(image_set: ImageSet, size: int, workers: int) -> Generator[object, None, None]:
    """Yield batches without end."""
    loader = DataLoader(
        Baseline(image_set, size),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=list_of_objects,
        worker_init_fn=one_thread,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def list_of_objects(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.stack([image for image, _ in samples]), [objects for _, objects in samples]


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def our_batches(image_set: ImageSet, size: int, workers: int, cache: str) -> Generator[object, None, None]:
    """Yield batches without end; the cache, if any, is filled before the first."""
    loader = make_train_loader(
        image_set,
        InputSizes((size, size)),
        batch_size=BATCH,
        augment=MOSAICS,
        seed=0,
        workers=workers,
        cache="off" if cache == "cold" else cache,
    )
    filling = 0 if cache == "cold" else 4  # epochs: one alone leaves out the last few images, and mosaics draw others
    for epoch in count():
        loader.set_epoch(epoch)
        if epoch < filling:
            deque(loader, maxlen=0)
        else:
            yield from loader


def measure(image_set: ImageSet, *, size: int, workers: int, rounds: int, batches: int) -> list[Row]:
    """Return one row per contestant. Between turns its workers wait, with a few batches made ahead."""
    contestants = {"baseline": baseline_batches(image_set, size, workers)}
    for cache in NAMES[1:]:
        contestants[cache] = our_batches(image_set, size, workers, cache)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, batches_of in contestants.items():
            rates[name].append(rate_of(batches_of, batches, ahead=3 * max(1, workers)))
    for batches_of in contestants.values():
        batches_of.close()
    rows = []
    for name, of_rounds in rates.items():
        rows.append(
            {
                "data": image_set.name,
                "images": len(image_set),
                "loader": name,
                "workers": workers,
                "size": size,
                "samples_per_s": round(statistics.median(of_rounds), 1),
                **against(rates["baseline"], of_rounds, name="ratio"),
            }
        )
    return rows


def rate_of(source: Iterator[object], batches: int, *, ahead: int) -> float:
    """Return samples per second, once the batches made ahead are used up."""
    for _ in islice(source, ahead):
        pass
    start = time.perf_counter()
    for _ in islice(source, batches):
        pass
    seconds = time.perf_counter() - start
    return batches * BATCH / seconds


def synthetic_set(folder: Path, entries: int) -> ImageSet:
    """Return an index of `entries` names of 16 small images, with three objects each."""
    rng = np.random.default_rng(0)
    for number in range(16):
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    boxes = np.array([[2, 2, 20, 20], [8, 4, 30, 22], [10, 10, 16, 18]], np.float32)
    fields: dict[str, Any] = {
        "boxes": boxes,
        "labels": np.array([0, 1, 2]),
        "is_crowd": np.zeros(3, bool),
        "hw": (24, 32),
    }
    records = [
        # As many and as long names as in a real index.
        Record(path=f"{folder}/{'./' * (number % 40)}{number % 16:02d}.jpg", image_id=number, **fields)
        for number in range(entries)
    ]
    names = ("one", "two", "three")
    return pack(
        records,
        name="synthetic",
        split="train",
        class_names=names,
        category_ids=range(3),
        problems=Problems(),
        source=str(folder),
    )


def memory_by_epoch(image_set: ImageSet, *, epochs: int, workers: int, cache: str) -> list[Row]:
    """Return one row per epoch: MiB of workers and main process, of the workers, and of their private memory.

    The second epoch is the first that maps a whole cache.
    """
    loader = make_train_loader(
        image_set,
        InputSizes((32, 32)),
        batch_size=64,
        augment=replace(MOSAICS, mosaic=0.0),
        seed=0,
        workers=workers,
        cache=cache,
    )
    rows = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        rows.append({"epoch": epoch + 1, "cache": cache, **held_after(loader)})
    return rows


def held_after(loader: TrainLoader) -> dict[str, float]:
    """Return MiB at the end of the epoch, while its workers still run."""
    deque(loader, maxlen=0)
    shared, private = zip(*map(held_mib, [os.getpid(), *loader.worker_pids]), strict=True)
    return {
        "all_mib": round(sum(shared), 1),
        "workers_mib": round(sum(shared[1:]), 1),
        "workers_private_mib": round(sum(private[1:]), 1),
    }


def held_mib(pid: int) -> tuple[float, float]:
    """Return PSS and private memory in MiB, without libraries, which other programs may share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) / 1024, kib["Private_Dirty"] / 1024


def table(rows: list[Row]) -> str:
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines.append(f"{data}: mosaics per second, and relative to the baseline (quartiles over rounds)")
        for row in rows:
            if row["data"] == data:
                low, high = row["ratio_quartiles"]
                lines.append(f"  {row['loader']:<10}{row['samples_per_s']:>8.1f}{row['ratio']:>8.2f}  [{low}, {high}]")
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    names = list(rows[0])
    lines = [" ".join(f"{name:>20}" for name in names)]
    lines += [" ".join(f"{row[name]:>20}" for name in names) for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--size", type=int, default=416)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=24, help=f"of {BATCH} samples, timed in each turn")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cache", default="ram", choices=CACHES, help="of --memory")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="(default: loader.json or loader_memory.json in benchmarks/results)")
    args = parser.parse_args()
    if not args.memory and not (args.bccd or args.coco):
        parser.error("name a data set, --bccd or --coco, or choose --memory")
    cv2.setNumThreads(0)
    rows: list[Row] = []
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if args.memory:
            image_set = synthetic_set(Path(scratch), args.entries)
            rows = memory_by_epoch(image_set, epochs=args.epochs, workers=args.workers, cache=args.cache)
            found["entries"] = args.entries
            print(memory_table(rows))
        else:
            os.environ["XDG_CACHE_HOME"] = scratch  # for the cache on disk
            for path in filter(None, (args.bccd, args.coco)):
                rows += measure(
                    open_image_set(path, "train"),
                    size=args.size,
                    workers=args.workers,
                    rounds=args.rounds,
                    batches=args.batches,
                )
            print(table(rows))
    path = args.out or RESULTS / ("loader_memory.json" if args.memory else "loader.json")
    write(path, {"rows": rows, **found}, circumstances(torch.device("cpu")))


if __name__ == "__main__":
    main()
