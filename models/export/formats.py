"""The formats, and how a file of each is written."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models.export.metadata import Metadata
from models.export.ncnn_file import write_ncnn
from models.export.onnx_file import make_onnx, write_onnx
from models.export.openvino_file import make_openvino, write_openvino
from models.export.torchscript_file import make_torchscript, write_torchscript
from models.network import Network

FORMATS = ("onnx", "openvino", "torchscript", "ncnn", "darknet")


def write_file(
    kind: str, network: Network, metadata: Metadata, stem: Path, calibration: Sequence[Tensor] = ()
) -> list[Path]:
    """Write the file of one of FORMATS but darknet, `stem` with its ending. Returns it, and those that belong to it.

    network: folded, float32. calibration: see `make_onnx`. Raises UserError for a library that is not installed.
    """
    if metadata.precision == "float16" and kind in ("onnx", "torchscript"):
        network = copy.deepcopy(network).half()
    with _quiet_libraries():
        match kind:
            case "onnx":
                return write_onnx(with_ending(stem, ".onnx"), make_onnx(network, metadata, calibration))
            case "openvino":
                onnx_model = make_onnx(network, replace(metadata, precision="float32"))
                model = make_openvino(onnx_model, metadata, calibration)
                return write_openvino(with_ending(stem, ".xml"), model, metadata)
            case "torchscript":
                module = make_torchscript(network, metadata)
                return write_torchscript(with_ending(stem, ".torchscript"), module, metadata)
            case _:
                return write_ncnn(stem, network, metadata)


def with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)  # a name may have points: yolo-fastest-1.1


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hold back what quantizers log of each operator."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
