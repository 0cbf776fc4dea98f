"""python -m tests.chaos.flips: flip single bits of checkpoints; each file must load equal, or be refused in a sentence.

Prints a tally for each kind of file. Half of the bits are of tensors, half of all else, which is a small part of a
real file: names, sizes, settings, pickles, directories.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.chaos.chaos import SETUPS, Chaos
from tests.e2e import children
from utils.checkpoint import Checkpoint
from utils.errors import UserError

FILES = ("best.pt", "last.pt", "best.safetensors")


def tensor_bytes(intact: bytes, checkpoint: Checkpoint) -> list[range]:
    """Where the weights are in the file; others look the same to its reader."""
    places = []
    for tensor in checkpoint.weights.values():
        content = tensor.contiguous().numpy().tobytes()
        if len(content) >= 64 and (at := intact.find(content)) >= 0:
            places.append(range(at, at + len(content)))
    return places


def flip(path: Path, count: int, seed: int) -> Counter[str]:
    """Tally what `count` flipped bits of the file come to, one at a time."""
    intact, whole, rng = path.read_bytes(), Checkpoint.from_file(path), random.Random(seed)
    tally, fields = Counter(flips=0, refused=0, equal=0, wrong=0, tracebacks=0), asdict(whole)
    tensors = tensor_bytes(intact, whole)
    inside = [at for place in tensors for at in place]
    outside = sorted(set(range(len(intact))) - set(inside))
    broken = path.with_name(f"flipped-{path.name}")
    for number in range(count):
        content = bytearray(intact)
        content[rng.choice(outside if number % 2 else inside)] ^= 1 << rng.randrange(8)
        broken.write_bytes(content)
        tally["flips"] += 1
        try:
            children.same(asdict(Checkpoint.from_file(broken)), fields, path.name)
            tally["equal"] += 1
        except UserError:
            tally["refused"] += 1
        except AssertionError as error:
            tally["wrong"] += 1
            print(f"{path.name}, bit flip {number}: {error} differs")
        except Exception as error:
            tally["tracebacks"] += 1
            print(f"{path.name}, bit flip {number}: {type(error).__name__} {error}")
    broken.unlink()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="of `python -m tests.chaos`")
    parser.add_argument("--count", type=int, default=2000, help="flips of each file")
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Chaos(typed.folder or Path(scratch)).whole(SETUPS[0])
        for name in FILES:
            tally = flip(run / name, typed.count, typed.seed)
            print(name, " ".join(f"{what} {count}" for what, count in tally.items()))


if __name__ == "__main__":
    main()
