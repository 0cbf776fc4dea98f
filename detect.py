"""Find objects: `python detect.py --weights runs/NAME/best.pt IMAGES`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch
from tqdm import tqdm

from cfg.parse import CfgError
from data.inference_sources import Frame, find_sources
from models.detector import Detector
from options import FOREIGN_FLAGS, DetectOptions
from utils.console import counted
from utils.errors import UserError
from utils.flags import parse_flags, resolve
from utils.page import run_page
from utils.printable import printable
from utils.run_folder import free_folder
from utils.save_detections import DetectionFiles
from utils.structures import Detections


def describe_frame(frame: Frame, found: Detections, class_names: Sequence[str], milliseconds: float) -> str:
    """name: 640x480, 12 RBC, 1 WBC, 8.1 ms"""
    assert frame.image is not None
    counts = Counter(class_names[label] for label in found.labels.tolist())
    objects = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
    name = f"{frame.source.path} frame {frame.number}" if frame.source.is_video else str(frame.source.path)
    height, width = frame.image.shape[:2]
    return f"{name}: {width}x{height}, {objects}, {milliseconds:.1f} ms"


def labels_of(classes: Sequence[str], class_names: Sequence[str]) -> torch.Tensor | None:
    """Return the labels of the named classes; None for no name: all. Raises UserError for an unknown one."""
    unknown = [name for name in classes if name not in class_names]
    if unknown:
        raise UserError(f"--classes: the network knows no '{unknown[0]}', but {', '.join(class_names[:20])}")
    return torch.tensor([class_names.index(name) for name in classes]) if classes else None


def main(argv: Sequence[str] | None = None) -> None:
    options = resolve(DetectOptions, parse_flags(DetectOptions, argv, foreign=FOREIGN_FLAGS))
    other_files: Counter[str] = Counter()
    sources = find_sources(options.sources, other_files)
    detector = Detector.load(
        options.weights,
        cfg=options.cfg,
        names=options.names,
        domain=options.domain,
        device=options.device,
        precision=options.precision,
        input_hw=options.image_size,
        options=options.detection,
    )
    kept = labels_of(options.classes, detector.class_names)
    for line in detector.origin:
        print(line)
    folder = free_folder(options.out, default="detect")
    files = DetectionFiles(
        folder,
        detector.class_names,
        save_json=options.save_json,
        save_txt=options.save_txt,
        save_crops=options.save_crops,
    )
    total, unreadable = sum(source.frames for source in sources), 0
    with files, tqdm(total=total, unit="image", disable=total < 2, leave=False) as bar:
        for source in sources:
            for frame in islice(source.read(), options.max_frames if source.is_video else None):
                bar.update()
                if frame.image is None:
                    unreadable += 1
                    bar.write(printable(f"warning: {source.path}: cannot be read, skipped"))
                    continue
                started = time.perf_counter()
                (found,) = detector.detect([frame.image])
                found = found if kept is None else found.where(torch.isin(found.labels, kept))
                milliseconds = 1000 * (time.perf_counter() - started)
                bar.write(printable(describe_frame(frame, found, detector.class_names, milliseconds)))
                video_fps = source.fps if source.is_video else None
                files.add(source.path, frame.image, found, number=frame.number, video_fps=video_fps)
    if unreadable and not files.written:
        raise UserError(f"none of the {counted(unreadable, 'image')} can be read")
    skipped = f", {unreadable} unreadable" if unreadable else ""
    if other_files:
        endings = ", ".join(f"{count} {ending}" for ending, count in other_files.most_common())
        print(f"skipped files, neither images nor videos by their endings: {endings}")
    print(f"{counted(files.written, 'image')} annotated{skipped}; they are in {folder}")


if __name__ == "__main__":
    run_page(main, CfgError)
