"""Samples of images for the statistics of norms."""

from __future__ import annotations

from pathlib import Path

import torch

from evaluation.recalibration import sample_images
from tests.evaluation.fakes import PerfectDetector, known_images


def test_a_sample_is_of_different_images_in_batches_as_the_detector_sees_them(tmp_path: Path):
    images = known_images(tmp_path / "images")
    for count, sizes in ((3, [2, 1]), (9, [2, 2])):
        batches = sample_images(images, PerfectDetector(), image_count=count, batch_size=2, workers=0)
        assert [len(batch) for batch in batches] == sizes
        assert all(batch.shape[1:] == (3, 40, 40) for batch in batches)
        assert len(torch.cat(batches)[:, 0, 20, 20].unique()) == sum(sizes)
