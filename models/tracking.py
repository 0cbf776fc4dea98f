"""Which detection of a video is the same object as one before: ByteTrack, from the library `trackers`.

Source: Zhang et al. 2022, "ByteTrack: Multi-Object Tracking by Associating Every Detection Box", arXiv:2110.06864.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.structures import Detections

FAINT = 0.1  # a track goes on through detections down to this score, as in the paper
# Without --no-deps it would bring opencv-python, which overwrites opencv-python-headless.
INSTALL = 'run `pip install -e ".[track]"`, then `pip install --no-deps trackers`'


class Tracker:
    """The tracks of one video. Objects of different classes are never one track, so labels stay as detected.

    confidences: of each class, the score from which a detection begins a track. A track ends that is not seen for a
    second. Raises UserError if the library is not installed.
    """

    def __init__(self, *, confidences: Sequence[float], fps: float) -> None:
        self._supervision, self._library = libraries()
        self._confidences, self._fps = np.array(confidences), fps
        self._of_class: dict[int, Any] = {}
        self._ids: dict[tuple[int, int], int] = {}  # of a class's tracker -> in this video

    def follow(self, found: Detections, time_s: float) -> tuple[Detections, list[int | None]]:
        """Return the detections of the next frame that reach the confidence or continue a track, and their tracks' ids.

        found: with scores from FAINT on, best first. ids: from 1; None of what is seen for the first time. time_s: of
        the frame, rising.
        """
        labels, scores = found.labels.numpy(), found.scores.numpy()
        tracks = np.full(len(found), -1)
        for label in sorted({*self._of_class, *labels.tolist()}):
            if label not in self._of_class:
                self._of_class[label] = self._library.ByteTrackTracker(
                    frame_rate=self._fps,
                    track_activation_threshold=float(self._confidences[label]),
                    high_conf_det_threshold=float(self._confidences[label]),
                )
            (index,) = np.nonzero(labels == label)
            boxes = self._supervision.Detections(
                xyxy=found.boxes.numpy()[index].astype(float), confidence=scores[index], data={"index": index}
            )
            followed = self._of_class[label].update(boxes, timestamp=time_s)
            known = followed.tracker_id >= 0
            own = zip(followed.data.get("index", index)[known], followed.tracker_id[known], strict=True)
            for each, track in own:
                tracks[each] = self._ids.setdefault((label, int(track)), len(self._ids) + 1)
        (kept,) = np.nonzero((scores >= self._confidences[labels]) | (tracks > 0))
        return found.where(torch.from_numpy(kept)), [int(track) if track > 0 else None for track in tracks[kept]]


def libraries() -> tuple[Any, Any]:
    """Return the modules supervision and trackers, whose first import takes seconds. Raises UserError if absent."""
    try:
        return importlib.import_module("supervision"), importlib.import_module("trackers")
    except ImportError as error:
        raise UserError(f"--track needs the libraries supervision and trackers ({error}): {INSTALL}") from error
