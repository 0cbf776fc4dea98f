"""Several data sets in one training, each of them a domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.image_set import ImageSet
from data.problems import Problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One of a training's data sets."""

    name: str
    train_set: ImageSet
    val_set: ImageSet


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, with a number behind those that an earlier one has: digits, digits-2."""
    unique: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, len(names) + 1))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return tuple(unique)


def joined(sets: Sequence[ImageSet]) -> ImageSet:
    """Return the images of all sets, one set after the other, with `domains`; a single set as it is.

    Classes are the union by name, in order of first appearance; category ids count them from 1, image ids are new.
    Problems stay with the sets.
    """
    if len(sets) == 1:
        return sets[0]
    names = tuple(dict.fromkeys(name for each in sets for name in each.class_names))
    label_of = {name: label for label, name in enumerate(names)}
    labels = [np.array([label_of[name] for name in each.class_names], np.int64)[each.labels] for each in sets]
    counts = np.concatenate([np.diff(each.starts) for each in sets])
    sizes = [len(each) for each in sets]
    return replace(
        sets[0],
        name="+".join(unique_names([each.name for each in sets])),
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        problems=Problems(),
        paths=np.concatenate([each.paths for each in sets]),
        hws=np.concatenate([each.hws for each in sets]),
        boxes=np.concatenate([each.boxes for each in sets]),
        is_crowd=np.concatenate([each.is_crowd for each in sets]),
        ids=np.arange(1, sum(sizes) + 1),
        labels=np.concatenate(labels),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        source=", ".join(each.source for each in sets),
        coco_json=None,
        mirror_safe=all(each.mirror_safe for each in sets),
        domains=np.repeat(np.arange(len(sets)), sizes),
    )


def interleaved(order: np.ndarray, domains: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reorder (N,) images so that each stretch has every domain's share of them; those of a domain keep their order.

    domains: of each image of the set, by the numbers in `order`.
    """
    of, places = domains[order], np.empty(len(order))
    for domain in np.unique(of):
        mine = np.flatnonzero(of == domain)
        places[mine] = (np.arange(len(mine)) + rng.random()) / len(mine)
    return order[np.argsort(places, kind="stable")]
