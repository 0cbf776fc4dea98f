"""OpenVINO's files, .xml and .bin: converted from our onnx graph, quantized by nncf."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from models.export.library import library
from models.export.metadata import KEY, Metadata
from utils.errors import UserError

MAX_XML_BYTES = 64 * 2**20
_CONTROL_FLOW = ("If", "Loop", "TensorIterator")
# What follows the network's layers, in the names that torch's exporter and `onnx_file` give: coordinates in pixels need
# more than 8 bits.
_NOT_IN_INT8 = r"^(/(?!network/)|suppression/).*"


def make_openvino(onnx_model: Any, metadata: Metadata, calibration: Iterable[Tensor] = ()) -> Any:
    """Return the openvino.Model of an onnx.ModelProto in float32, in int8 if its metadata says so.

    calibration: batches (N, 3, H, W) float32 in 0..1 of the file's own batch size.
    """
    model = library("openvino").Core().read_model(onnx_model.SerializeToString())
    if metadata.precision == "int8":
        nncf = library("nncf")
        images = [batch.numpy() for batch in calibration]
        dataset, ignored = nncf.Dataset(images), nncf.IgnoredScope(patterns=[_NOT_IN_INT8], validate=False)
        model = nncf.quantize(model, dataset, ignored_scope=ignored, subset_size=len(images))
    model.set_rt_info(metadata.to_json(), [KEY])
    return model


def write_openvino(path: Path, model: Any, metadata: Metadata) -> list[Path]:
    library("openvino").save_model(model, str(path), compress_to_fp16=metadata.precision == "float16")
    return [path, path.with_suffix(".bin")]


def open_openvino(path: Path) -> tuple[Metadata, Callable[[np.ndarray], list[np.ndarray]]]:
    """Open a file of ours with OpenVINO. Raises UserError if it is damaged, foreign or runs what we do not write."""
    openvino = library("openvino")
    metadata = _checked_metadata(path)
    if not (binary := path.with_suffix(".bin")).is_file():
        raise UserError(f"{binary}: no such file; {path.name} needs it beside it")
    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if metadata.precision == "float32":
        hints["INFERENCE_PRECISION_HINT"] = "f32"  # else bf16 where the CPU has it
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(path), str(binary)), "CPU", hints)
    except Exception as error:  # OpenVINO's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: OpenVINO cannot open it, damaged? {lines[-1] if lines else ''}") from error
    requests = threading.local()  # a request runs once at a time

    def run(images: np.ndarray) -> list[np.ndarray]:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        requests.own.infer([images])
        return [np.array(requests.own.get_output_tensor(index).data) for index in range(len(compiled.outputs))]

    return metadata, run


def _checked_metadata(path: Path) -> Metadata:
    content = path.read_bytes() if path.stat().st_size <= MAX_XML_BYTES else b""
    if not content or b"<!" in re.sub(rb"<!--.*?-->", b"", content, flags=re.DOTALL):  # entities may grow without end
        raise UserError(f"{path}: is no xml of OpenVINO")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is no xml, or damaged ({error})") from error
    entry = root.find(f"rt_info/{KEY}")
    metadata = Metadata.from_json(None if entry is None else entry.get("value"), path)
    for layer in root.iter("layer"):
        kind, opset = layer.get("type", ""), layer.get("version", "")
        if kind in _CONTROL_FLOW or not re.fullmatch(r"opset\d+", opset):
            wrong = f"it has a layer '{kind}' of '{opset}', which export.py does not write"
            raise UserError(f"{path}: {wrong}: it is not opened")
    return metadata
