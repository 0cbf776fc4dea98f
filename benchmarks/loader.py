"""Training samples per second: ours, with images decoded each time or kept, beside a plain baseline.

    python benchmarks/loader.py --bccd PATH --coco PATH [--size 416] [--workers 2] [--rounds 7]
    python benchmarks/loader.py --memory [--entries 100000] [--epochs 5] [--workers 2] [--cache ram]

All make mosaics of four images, with jitter, mirroring and colour. The baseline does what one would write first: a
torch DataLoader whose dataset reads four whole images by cv2.imread, gives each to an albumentations pipeline
(RandomResizedCrop, HorizontalFlip, HueSaturationValue) and pastes quarters. `cold` decodes (--cache off); `ram` and
`disk` find all images in their cache. All take turns in every round, so that a machine's moods hit them alike; a
ratio is the median over rounds of (samples/s) / (samples/s of the baseline) in the same round.

--memory: what the workers and the main process hold, in epochs over a synthetic index of many entries that name a few
small images, by /proc/PID/smaps_rollup: of memory that processes share, each counts its part (PSS).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from benchmarks.measured import RESULTS, against, circumstances, write  # noqa: E402
from data.albumentations_import import albumentations as A  # noqa: E402
from data.augment_options import AugmentOptions  # noqa: E402
from data.image_cache import CACHES  # noqa: E402
from data.image_set import ImageSet, Record, pack  # noqa: E402
from data.loader import InputSizes, TrainLoader, make_train_loader  # noqa: E402
from data.problems import Problems  # noqa: E402
from data.source import open_image_set  # noqa: E402

BATCH = 8
NAMES = ("baseline", "cold", "ram", "disk")
MOSAICS = AugmentOptions(mosaic=1.0)


class Baseline(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """index -> a mosaic (3, S, S) uint8 and its objects (M, 5): box, label."""

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
            image = cv2.cvtColor(cv2.imread(record.path), cv2.COLOR_BGR2RGB)
            made = self.pipeline(image=image, bboxes=record.boxes, labels=record.labels)
            canvas[top:bottom, left:right] = made["image"][top:bottom, left:right]
            boxes = np.array(made["bboxes"], np.float32).reshape(-1, 4)
            boxes = boxes.clip([left, top, left, top], [right, bottom, right, bottom])
            seen = (boxes[:, 2:] - boxes[:, :2] >= 2).all(axis=1)
            labels = np.array(made["labels"], np.float32)
            objects.append(np.concatenate([boxes, labels[:, None]], axis=1)[seen])
        return torch.from_numpy(canvas.transpose(2, 0, 1).copy()), torch.from_numpy(np.concatenate(objects))


def baseline_batches(image_set: ImageSet, size: int, workers: int) -> Generator[object, None, None]:
    """Without end."""
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
    """Without end; the cache, if there is one, is filled before the first."""
    loader = make_train_loader(
        image_set,
        InputSizes((size, size)),
        batch_size=BATCH,
        augment=MOSAICS,
        seed=0,
        workers=workers,
        cache="off" if cache == "cold" else cache,
    )
    filling = 0 if cache == "cold" else 4  # epochs: each shows all images but the last few, and mosaics draw others
    for epoch in count():
        loader.set_epoch(epoch)
        if epoch < filling:
            deque(loader, maxlen=0)
        else:
            yield from loader


def measure(image_set: ImageSet, *, size: int, workers: int, rounds: int, batches: int) -> list[dict]:
    """One row a contestant. Between turns its workers wait, with a few batches made ahead."""
    contestants = {"baseline": baseline_batches(image_set, size, workers)}
    for cache in NAMES[1:]:
        contestants[cache] = our_batches(image_set, size, workers, cache)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, made in contestants.items():
            rates[name].append(rate_of(made, batches, ahead=3 * max(1, workers)))
    for made in contestants.values():
        made.close()
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


def rate_of(made: Iterator[object], batches: int, *, ahead: int) -> float:
    """Samples per second, once what was made ahead of time is used up."""
    for _ in islice(made, ahead):
        pass
    begun = time.perf_counter()
    for _ in islice(made, batches):
        pass
    seconds = time.perf_counter() - begun
    return batches * BATCH / seconds


def synthetic_set(folder: Path, entries: int) -> ImageSet:
    """An index with so many entries, in many names, of 16 small images, with three objects each."""
    rng = np.random.default_rng(0)
    for number in range(16):
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    boxes = np.array([[2, 2, 20, 20], [8, 4, 30, 22], [10, 10, 16, 18]], np.float32)
    fields = {"boxes": boxes, "labels": np.array([0, 1, 2]), "is_crowd": np.zeros(3, bool), "hw": (24, 32)}
    records = [
        # Names as many and as long as a real index has.
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


def memory_by_epoch(image_set: ImageSet, *, epochs: int, workers: int, cache: str) -> list[dict]:
    """A row an epoch: MiB of workers and main process, of the workers, and of what no other process shares with them.

    The second epoch is the first that maps a cache as a whole.
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
    """MiB at the end of the epoch, while its workers still run."""
    deque(loader, maxlen=0)
    shared, private = zip(*map(held_mib, [os.getpid(), *loader.worker_pids]), strict=True)
    return {
        "all_mib": round(sum(shared), 1),
        "workers_mib": round(sum(shared[1:]), 1),
        "workers_private_mib": round(sum(private[1:]), 1),
    }


def held_mib(pid: int) -> tuple[float, float]:
    """PSS and what is written to and unshared; libraries are left out, whose parts depend on who else has them open."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) / 1024, kib["Private_Dirty"] / 1024


def table(rows: list[dict]) -> str:
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines.append(f"{data}: mosaics per second, and relative to the baseline (quartiles over rounds)")
        for row in rows:
            if row["data"] == data:
                low, high = row["ratio_quartiles"]
                lines.append(f"  {row['loader']:<10}{row['samples_per_s']:>8.1f}{row['ratio']:>8.2f}  [{low}, {high}]")
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
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
    asked = parser.parse_args()
    if not asked.memory and not (asked.bccd or asked.coco):
        parser.error("name a data set, --bccd or --coco, or ask for --memory")
    cv2.setNumThreads(0)
    rows: list[dict] = []
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.memory:
            image_set = synthetic_set(Path(scratch), asked.entries)
            rows = memory_by_epoch(image_set, epochs=asked.epochs, workers=asked.workers, cache=asked.cache)
            found["entries"] = asked.entries
            print(memory_table(rows))
        else:
            os.environ["XDG_CACHE_HOME"] = scratch  # for the cache on disk
            for path in filter(None, (asked.bccd, asked.coco)):
                rows += measure(
                    open_image_set(path, "train"),
                    size=asked.size,
                    workers=asked.workers,
                    rounds=asked.rounds,
                    batches=asked.batches,
                )
            print(table(rows))
    path = asked.out or RESULTS / ("loader_memory.json" if asked.memory else "loader.json")
    write(path, {"rows": rows, **found}, circumstances(torch.device("cpu")))


if __name__ == "__main__":
    main()
