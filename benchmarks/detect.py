"""Time of detection: ours beside OpenCV's dnn, onnxruntime and OpenVINO, as they are installed.

    python -m benchmarks.detect [--opencv4 DIR] [--rounds 7] [--only yolov4-tiny] [--weights FILE --cfg FILE]

All take turns in every round, because the speed of a machine changes; a ratio is the median over rounds of
t(ours in float32) / t(this), so that above 1 it is faster. A time is process time, which other processes change little.
The weights are random, but for --weights. "network": from its input in float32 to its raw heads. "whole": from a JPEG
file to boxes after suppression, with `Detector.detect`, of the checkpoint or of exported files of it. OpenCV 5 reads no
darknet cfg: --opencv4 names a folder that `pip install --no-deps --target DIR opencv-python-headless==4.11.0.86` made,
and a process of its own uses it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.measured import RESULTS, Row, against, circumstances, write
from cfg.plan import load_plan
from models.detector import Detector
from models.export.formats import write_file
from models.export.metadata import Metadata
from models.network import Network
from models.norms.factory import norm_factory
from models.norms.fold import fold
from models.norms.options import NormOptions
from models.predictor import TorchPredictor, fast_predictor
from models.stored_network import build_network
from models.weights.trained import read_trained
from models.weights.writer import write_weights
from utils.errors import UserError, exit_on_error
from utils.image_file import read_image

SIZES_PX = {"yolov4-tiny": 416, "yolo-fastest-1.1-xl": 320, "yolov4": 608}
OURS = "ours, float32"
Run = Callable[[], object]

# Answers each line on stdin with the milliseconds of one forward.
OPENCV = """
import sys, time, cv2, numpy
cfg, weights, side, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cv2.setNumThreads(threads)
net = cv2.dnn.readNetFromDarknet(cfg, weights)
names = net.getUnconnectedOutLayersNames()
blob = numpy.random.default_rng(0).random((1, 3, side, side), numpy.float32)
print(cv2.__version__, flush=True)
for line in sys.stdin:
    start = time.process_time()
    net.setInput(blob)
    net.forward(names)
    print(1000 * (time.process_time() - start), flush=True)
"""


class Heads(torch.nn.Module):
    """A network that returns plain tensors, for exporting."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(head.logits for head in self.network(images))


def network_runs(network: Network, images: Tensor, folder: Path, threads: int) -> dict[str, Run]:
    """Return what runs the network on the images, by name."""
    runs: dict[str, Run] = {}

    def ours(predictor: TorchPredictor) -> Run:
        return lambda: predictor.network(images.to(predictor.dtype, memory_format=predictor.memory_format))

    folded = fold(network)
    last = torch.channels_last
    runs[OURS] = ours(fast_predictor(network, "float32"))
    runs["ours, bf16"] = ours(fast_predictor(network, "bf16"))
    runs["folded only, float32"] = ours(TorchPredictor(network=folded))
    runs["channels last, float32"] = ours(
        TorchPredictor(network=fold(network).to(memory_format=last), memory_format=last)
    )
    half = fold(network).to(torch.bfloat16).to(memory_format=last)
    runs["channels last, bf16"] = ours(TorchPredictor(network=half, memory_format=last, dtype=torch.bfloat16))
    path, array = folder / "network.onnx", images.numpy()
    torch.onnx.export(Heads(folded), (images,), path, dynamo=False, input_names=["images"], opset_version=17)
    with suppress(ImportError):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        runs["onnxruntime, float32"] = partial(session.run, None, {"images": array})
    with suppress(ImportError):
        import openvino

        core = openvino.Core()
        for name, precision in (("float32", "f32"), ("bf16", "bf16")):
            settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
            request = core.compile_model(path, "CPU", settings).create_infer_request()
            runs[f"OpenVINO, {name}"] = partial(request.infer, {0: array})
    return runs


@contextmanager
def opencv4(
    place: Path | None, cfg: Path, weights: Path, side_px: int, threads: int
) -> Iterator[Callable[[], float] | None]:
    """Give a function that returns the milliseconds of a forward of OpenCV's dnn, or None without its folder."""
    if place is None:
        yield None
        return
    command = [sys.executable, "-c", OPENCV, str(cfg), str(weights), str(side_px), str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {"PYTHONPATH": str(place)}}
    with subprocess.Popen(command, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdin is not None and child.stdout is not None
        print(f"OpenCV {child.stdout.readline().strip()}")

        def forward() -> float:
            print(file=child.stdin, flush=True)
            return float(child.stdout.readline())

        try:
            yield forward
        finally:
            child.stdin.close()


def milliseconds_of(run: Run) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def measure(name: str, cfg: str, weights: Path | None, rounds: int, threads: int, place: Path | None) -> list[Row]:
    """Return a row per contestant, network alone and whole."""
    torch.manual_seed(0)
    plan, side_px = load_plan(cfg), SIZES_PX[name]
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        folder = Path(made)
        if weights is None:
            weights = folder / "random.weights"
            write_weights(weights, Network(plan, norm_factory(NormOptions(norm="bn"))).eval(), seen=0)
        cfg_file = folder / "network.cfg"
        cfg_file.write_text(plan.source_text, encoding="utf-8")
        loading = {"cfg": cfg, "device": "cpu", "input_hw": (side_px, side_px)}
        detectors = {kind: Detector.load(weights, precision=kind, **loading) for kind in ("float32", "bf16")}  # type: ignore[arg-type]
        network = _plain(weights, cfg, side_px)
        image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
        file = folder / "image.jpg"
        cv2.imwrite(str(file), cv2.GaussianBlur(image, (0, 0), 5))
        runs = network_runs(network, torch.rand(1, 3, side_px, side_px), folder, threads)
        timed: dict[str, Callable[[], float]] = {
            f"network: {key}": partial(milliseconds_of, run) for key, run in runs.items()
        }
        detectors = {f"ours, {kind}": detector for kind, detector in detectors.items()}
        detectors |= exported(network, folder / "exported")
        for kind, detector in detectors.items():
            timed[f"whole: {kind}"] = partial(milliseconds_of, partial(_whole, detector, str(file)))
        with opencv4(place, cfg_file, weights, side_px, threads) as forward:
            if forward is not None:
                timed["network: OpenCV dnn, float32"] = forward
            times: dict[str, list[float]] = {key: [] for key in timed}
            for turn in range(rounds + 1):
                for key, run in timed.items():
                    taken = run()
                    if turn:  # the first round warms up
                        times[key].append(taken)
    base = times[f"network: {OURS}"]
    return [
        {
            "cfg": name,
            "size_px": side_px,
            "run": key,
            "ms": round(statistics.median(taken), 2),
            **against(taken, base, "speed_ratio"),
        }
        for key, taken in times.items()
    ]


def exported(network: Network, stem: Path) -> dict[str, Detector]:
    """Return detectors of exported files, by what runs them, as far as that is installed."""
    plan, detectors = network.plan, {}
    for name, kind, precision in (
        ("onnxruntime, float32", "onnx", "float32"),
        ("OpenVINO, float32", "openvino", "float32"),
        ("OpenVINO, bf16", "openvino", "float16"),  # weights; it computes in bf16 where the CPU is fast with it
    ):
        metadata = Metadata(
            cfg_name=plan.name,
            cfg_text=plan.source_text,
            class_names=tuple(map(str, range(plan.classes))),
            input_hw=plan.net.input_hw,
            letterbox=False,
            resize="opencv",
            norm="bn",
            outputs="decoded",
            precision=precision,
            batch=1,
        )
        with suppress(UserError):  # not installed
            files = write_file(kind, fold(network), metadata, stem.with_name(precision))
            detectors[name] = Detector.load(files[0])
    return detectors


def _plain(weights: Path, cfg: str, side_px: int) -> Network:
    checkpoint, _ = read_trained(str(weights), cfg=cfg, names=None)
    return build_network(checkpoint, input_hw=(side_px, side_px))


def _whole(detector: Detector, path: str) -> object:
    image = read_image(path)
    assert image is not None
    return detector.detect([image])


def table(rows: list[Row]) -> str:
    lines = [f"{'process time of an image; speed / ours, float32':<56}{'ms':>8}{'speed':>8}"]
    for row in rows:
        title = f"{row['cfg']} {row['size_px']}, {row['run']}"
        lines.append(f"{title:<56}{row['ms']:>8.1f}{row['speed_ratio']:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SIZES_PX), default=list(SIZES_PX))
    parser.add_argument("--cfg", help="cfg of the one network of --only that cfg/ does not have")
    parser.add_argument("--weights", type=Path, help="darknet weights of the one network of --only")
    parser.add_argument("--opencv4", type=Path, metavar="DIR", help="folder with an OpenCV 4 for a process of its own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "detect.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.is_file() else []
    for name in args.only:
        found = measure(name, args.cfg or name, args.weights, args.rounds, args.threads, args.opencv4)
        print(table(found), flush=True)
        rows = [row for row in rows if row["cfg"] != name] + found
    versions = {}
    for package in ("onnxruntime", "openvino"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    write(args.out, {"rows": rows}, circumstances(torch.device("cpu"), threads=args.threads, **versions))


if __name__ == "__main__":
    exit_on_error(main)
