"""Find objects: `python detect.py --weights runs/NAME/best.pt IMAGES`.

A pipeline of generators: sources -> frames -> batches -> detections -> tracks; the loop in `main` writes the files.
Except for live streams, a thread reads frames ahead while the main one detects in them and writes the files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from cfg.parse import CfgError
from data.inference_sources import Frame, Source, find_sources
from models.detector import Detector
from models.tiling import detect_tiled
from models.tracking import FAINT, Tracker, libraries
from options import FOREIGN_FLAGS, DetectOptions
from utils.ahead import ahead
from utils.console import counted
from utils.errors import UserError
from utils.flags import parse_flags, resolve
from utils.page import run_page
from utils.printable import printable
from utils.progress import Progress
from utils.run_folder import free_folder
from utils.save_detections import DetectionFiles
from utils.stop import Stop
from utils.structures import Detections
from utils.window import Window

Detect = Callable[[Sequence[np.ndarray]], list[Detections]]  # images of one forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A frame and what is found in it, in its own pixels; None without an image. tracks: each object's, or ()."""

    frame: Frame
    found: Detections | None
    milliseconds: float = 0.0
    tracks: Sequence[int | None] = ()

    def describe(self, class_names: Sequence[str]) -> str:
        """name: 640x480, 12 RBC, 1 WBC, 8.1 ms"""
        source, image, found = self.frame.source, self.frame.image, self.found
        if image is None or found is None:
            return f"warning: {source.name}: cannot be read, skipped"
        counts = Counter(class_names[label] for label in found.labels.tolist())
        objects = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        name = f"{source.name} frame {self.frame.number}" if source.is_video else source.name
        height, width = image.shape[:2]
        return f"{name}: {width}x{height}, {objects}, {self.milliseconds:.1f} ms"


def frames_of(
    sources: Sequence[Source], options: DetectOptions, stop: Stop, say: Callable[[str], None]
) -> Generator[Frame, None, None]:
    """Yield the frames of all sources in their order."""
    for source in sources:
        frames = source.read(stride=options.stride_frames, say=say, is_stopped=lambda: stop.requested)
        yield from islice(frames, options.max_frames if source.is_video else None)


def batches_of(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Group frames by `size`; a batch ends with a frame of a video, which is detected in without waiting."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if frame.source.is_video or len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def detections_of(batches: Iterable[Sequence[Frame]], detect: Detect) -> Generator[Seen, None, None]:
    for batch in batches:
        started = time.perf_counter()
        images = [frame.image for frame in batch if frame.image is not None]
        found = iter(detect(images) if images else [])
        milliseconds = 1000 * (time.perf_counter() - started) / max(1, len(images))
        for frame in batch:
            yield Seen(frame=frame, found=None if frame.image is None else next(found), milliseconds=milliseconds)


def tracked(seen: Iterable[Seen], options: DetectOptions, confidences: torch.Tensor) -> Generator[Seen, None, None]:
    """Number the objects of each video. Of images, keep what reaches the confidence of its class, of (C,)."""
    tracker, source = None, None
    for each in seen:
        if each.found is None:
            yield each
        elif not each.frame.source.is_video:
            yield replace(each, found=each.found.where(each.found.scores >= confidences[each.found.labels]))
        else:
            if tracker is None or each.frame.source is not source:
                source = each.frame.source
                tracker = Tracker(confidences=confidences.tolist(), fps=source.fps / options.stride_frames)
            found, tracks = tracker.follow(each.found, each.frame.time_s)
            yield replace(each, found=found, tracks=tracks)


def labels_of(classes: Sequence[str], class_names: Sequence[str]) -> torch.Tensor | None:
    """Return the labels of the named classes; None for no name: all. Raises UserError for an unknown one."""
    unknown = [name for name in classes if name not in class_names]
    if unknown:
        raise UserError(f"--classes: the network knows no '{unknown[0]}', but {', '.join(class_names[:20])}")
    return torch.tensor([class_names.index(name) for name in classes]) if classes else None


def make_detect(detector: Detector, options: DetectOptions) -> Detect:
    """Return the function that detects the chosen classes in images (H, W, 3) uint8 RGB, in tiles if so asked."""
    kept, tiling, rule = labels_of(options.classes, detector.class_names), options.tiling, options.detection
    if options.track:
        detector = detector.with_options(confidence=min(FAINT, detector.options.confidence))
    if tiling.tile is not None or kept is not None:
        detector = detector.with_options(max_detections=None)  # it counts in an image, not in a tile, and what is kept

    def detect(images: Sequence[np.ndarray]) -> list[Detections]:
        if tiling.tile is None:
            found = detector.detect(images)
        else:
            found = [detect_tiled(detector.detect, image, tiling, rule.nms_iou) for image in images]
        if kept is not None:
            found = [each.where(torch.isin(each.labels, kept)) for each in found]
        return [each.where(torch.arange(len(each))[: rule.max_detections]) for each in found]

    return detect


def see(
    sources: Sequence[Source],
    detect: Detect,
    options: DetectOptions,
    confidences: torch.Tensor,
    images_per_forward: int,
    stop: Stop,
    say: Callable[[str], None],
) -> Generator[Seen, None, None]:
    """Yield what is found in all sources, frame by frame, until the user stops."""
    is_live = any(source.live for source in sources)  # then no frame waits for a later one, or is read early
    size = 1 if is_live or options.tiling.tile is not None else images_per_forward
    frames = frames_of(sources, options, stop, say)
    wanted = stop.until_requested(frames if is_live else ahead(frames, size))
    seen = detections_of(batches_of(wanted, size), detect)
    return tracked(seen, options, confidences) if options.track else seen


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(DetectOptions, argv, foreign=FOREIGN_FLAGS)
    options = resolve(DetectOptions, given)
    window = Window("detect.py") if options.show else None
    if options.track:
        libraries()  # before a stream is opened
    other_files: Counter[str] = Counter()
    sources = find_sources(options.sources, other_files)
    if options.track and not any(source.is_video for source in sources):
        raise UserError("--track follows objects through a video or stream, and none of the sources is one")
    detector = Detector.load(
        options.weights,
        cfg=options.cfg,
        names=options.names,
        domain=options.domain,
        device=options.device,
        precision=options.precision,
        input_hw=options.image_size,
        options=options.detection,
        use_thresholds="confidence" not in given,
    )
    detect, lowest = make_detect(detector, options), detector.confidences
    size = detector.images_per_forward if options.batch_size == "auto" else int(options.batch_size)
    for line in detector.origin:
        print(line)
    folder = free_folder(options.out, default="detect")
    files = DetectionFiles(
        folder,
        detector.class_names,
        save_json=options.save_json,
        save_txt=options.save_txt,
        save_crops=options.save_crops,
        stride_frames=options.stride_frames,
    )
    unreadable, total = 0, sum(-(-source.frames // options.stride_frames) for source in sources)
    with (
        files,
        Stop() as stop,
        Progress(total) as progress,
        closing(see(sources, detect, options, lowest, size, stop, lambda text: progress.say(printable(text)))) as seen,
    ):
        for each in seen:
            progress.advance()
            progress.say(printable(each.describe(detector.class_names)))
            source, image = each.frame.source, each.frame.image
            if image is None or each.found is None:
                unreadable += 1
                continue
            drawn = files.add(
                source,
                image,
                each.found,
                number=each.frame.number,
                video_fps=source.fps if source.is_video else None,
                tracks=each.tracks,
                annotate=source.live is None or options.save_video,
            )
            if window is not None:
                window.show(drawn)
                if window.is_closed:
                    break
    if unreadable and not files.written:
        raise UserError(f"none of the {counted(unreadable, 'image')} can be read")
    skipped = f", {unreadable} unreadable" if unreadable else ""
    if other_files:
        endings = ", ".join(f"{count} {ending}" for ending, count in other_files.most_common())
        print(f"skipped files, neither images nor videos by their endings: {endings}")
    print(f"{counted(files.written, 'image')} annotated{skipped}; they are in {folder}")
    if stop.requested and not any(source.live for source in sources):
        raise SystemExit(130)  # as after Ctrl-C: some images are left out


if __name__ == "__main__":
    run_page(main, CfgError)
