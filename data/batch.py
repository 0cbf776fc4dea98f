"""Collating Samples (numpy) into a Batch (torch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from utils.structures import Batch, Sample, Targets


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate Samples of one size; images (N, 3, H, W) RGB keep the samples' type. Samples may have no objects."""
    images = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    boxes = np.concatenate([sample.boxes for sample in samples])
    labels = np.concatenate([sample.labels for sample in samples])
    is_crowd = np.concatenate([sample.is_crowd for sample in samples])
    image_index = np.repeat(np.arange(len(samples)), [len(sample.labels) for sample in samples])
    return Batch(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        targets=Targets(
            boxes=torch.from_numpy(boxes.astype(np.float32)),
            labels=torch.from_numpy(labels.astype(np.int64)),
            image_index=torch.from_numpy(image_index.astype(np.int64)),
            is_crowd=torch.from_numpy(is_crowd.astype(bool)),
        ),
        image_ids=tuple(sample.image_id for sample in samples),
        paths=tuple(sample.path for sample in samples),
        placements=tuple(sample.placement for sample in samples),
    )
