"""ONNX files: written by torch's exporter, slimmed by onnxslim, quantized and run by onnxruntime."""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.export.graph import ExportGraph
from models.export.library import library
from models.export.metadata import KEY, Metadata, Suppression
from models.network import Network
from utils.atomic_file import atomic_write
from utils.errors import UserError

OPSET = 17  # the last whose operators OpenCV's dnn, TensorRT 8.6 and others all read
MAX_BYTES = 2**31 - 1  # of a protobuf
MAX_TENSOR_BYTES = 2**32  # between two layers; the largest of yolov4 at 608 px has 47 MB an image
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")

# The rest of the graph, from decoded (N, S, 5 + C) to rows of image, x0, y0, x1, y1, score, label.
_SUPPRESSION = """
<ir_version: 8, opset_import: ["" : {opset}]>
suppression (float[n, s, f] decoded) => (float[k, 7] detections)
<int64[1] four = {{4}}, int64[1] five = {{5}}, int64[1] last = {{{columns}}}, int64[1] axis = {{2}},
 int64[1] zero = {{0}}, int64[2] image_and_box = {{0, 2}}, int64[1] image = {{0}}, int64[1] label = {{1}},
 int64[1] most = {{{most}}}, float[1] iou = {{{iou}}}, float[1] confidence = {{{confidence}}}>
{{
  boxes = Slice(decoded, zero, four, axis)
  objectness = Slice(decoded, four, five, axis)
  classes = Slice(decoded, five, last, axis)
  products = Mul(objectness, classes)
  scores = Transpose<perm = [0, 2, 1]>(products)
  kept = NonMaxSuppression(boxes, scores, most, iou, confidence)
  box_index = Gather<axis = 1>(kept, image_and_box)
  kept_boxes = GatherND(boxes, box_index)
  flat_scores = GatherND(scores, kept)
  kept_scores = Unsqueeze(flat_scores, label)
  image_index = Gather<axis = 1>(kept, image)
  label_index = Gather<axis = 1>(kept, label)
  images = Cast<to = 1>(image_index)
  labels = Cast<to = 1>(label_index)
  detections = Concat<axis = 1>(images, kept_boxes, kept_scores, labels)
}}
"""


def make_onnx(network: Network, metadata: Metadata, calibration: Iterable[Tensor] = ()) -> Any:
    """Return the onnx.ModelProto of a folded network in float32, or in float16 as its parameters are.

    calibration: batches (N, 3, H, W) float32 in 0..1 of the file's own batch size; precision int8 needs them.
    """
    onnx, slim = library("onnx"), library("onnxslim").slim
    graph = ExportGraph(network, decoded=metadata.outputs != "heads", is_dynamic=metadata.is_dynamic).eval()
    outputs = ["decoded"] if graph.decoded else [f"head_{index}" for index in network.plan.heads]
    names = {0: "n", 2: "h", 3: "w"}
    dynamic = {"images": names, **{name: {0: "n", 1: "s"} if graph.decoded else names for name in outputs}}
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Its successor (dynamo=True) needs minutes where this takes seconds, and writes the same operators.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (example_images(metadata),),
            file,  # type: ignore[arg-type]  # it writes into an open one, too
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=outputs,
            dynamic_axes=dynamic if metadata.is_dynamic else None,
        )
    model = slim(onnx.load_model_from_string(file.getvalue()))
    if metadata.precision == "int8":
        heads = [f"/network/layers.{index}/conv/Conv" for index in network.head_inputs]
        model = _quantized(model, calibration, in_float=heads)
    if metadata.suppression is not None:
        model = _with_suppression(model, metadata.suppression, columns=5 + network.plan.classes)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
    model.producer_name, model.doc_string = "yolov4-norms", "images: RGB in 0..1"
    return model


def write_onnx(path: Path, model: Any) -> list[Path]:
    with atomic_write(path) as file:
        file.write(model.SerializeToString())
    return [path]


def example_images(metadata: Metadata) -> Tensor:
    return torch.zeros(metadata.batch or 2, 3, *metadata.input_hw)


def _with_suppression(model: Any, rule: Suppression, *, columns: int) -> Any:
    onnx = library("onnx")
    opset = next(each.version for each in model.opset_import if not each.domain)
    values = {"most": rule.max_per_class, "iou": rule.iou, "confidence": rule.confidence, "columns": columns}
    tail = onnx.parser.parse_model(_SUPPRESSION.format(opset=opset, **values))
    tail.ir_version = model.ir_version
    tail = onnx.compose.add_prefix(tail, "suppression/")
    merged = onnx.compose.merge_models(model, tail, io_map=[("decoded", "suppression/decoded")])
    for node in merged.graph.node:
        node.output[:] = ["detections" if name == "suppression/detections" else name for name in node.output]
    merged.graph.output[0].name = "detections"
    return merged


def _quantized(model: Any, calibration: Iterable[Tensor], *, in_float: list[str]) -> Any:
    """Return the model with its convolutions in int8, between pairs of QuantizeLinear and DequantizeLinear.

    in_float: names of those that stay as they are: a head's logits, which have one scale for objectness, classes and
    boxes, need more than 8 bits.
    """
    quantization, onnx = library("onnxruntime.quantization", package="onnxruntime"), library("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantization.quantize_static(
            model,
            str(path),
            _Calibration(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=in_float,
            per_channel=True,
            extra_options={"CalibMovingAverage": True},  # the images' mean range, which no single outlier widens
        )
        return onnx.load_model(str(path))


class _Calibration:
    """Images as onnxruntime's quantization asks for them (its CalibrationDataReader)."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def open_onnx(path: Path) -> tuple[Metadata, Callable[[np.ndarray], list[np.ndarray]]]:
    """Open a file of ours with onnxruntime. Raises UserError if it is damaged, foreign or reaches beyond itself."""
    onnx, onnxruntime = library("onnx"), library("onnxruntime")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than an onnx file of {MAX_BYTES} bytes can be")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)  # reads no other file
    except Exception as error:  # protobuf's
        raise UserError(f"{path}: is no onnx file, or damaged ({type(error).__name__})") from error
    metadata = Metadata.from_json({each.key: each.value for each in model.metadata_props}.get(KEY), path)
    if wrong := _danger(onnx, model):
        raise UserError(f"{path}: {wrong}, which export.py does not write: it is not opened")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's
        raise UserError(f"{path}: onnxruntime cannot open it: {str(error).partition(chr(10))[0]}") from error
    if [each.name for each in session.get_inputs()] != ["images"]:
        raise UserError(f"{path}: has other inputs than the `images` of a file that export.py wrote")
    return metadata, lambda images: session.run(None, {"images": images})


def _danger(onnx: Any, model: Any) -> str:
    """Return what in a model may read other files, run other code, or take all memory; "" if nothing does."""
    graph = model.graph
    if graph.sparse_initializer or model.functions or model.training_info:
        return "it has functions, training or sparse tensors"
    for tensor in (*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))):
        if tensor.external_data or tensor.data_location != onnx.TensorProto.DEFAULT:
            return f"'{tensor.name}' refers to data in another file"
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            return f"it has an operator '{node.op_type}' of '{node.domain}'"
        if node.op_type in _CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
            return f"it has an operator '{node.op_type}', which runs a graph of its own"
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # onnx's
        return f"its shapes do not fit each other ({str(error).partition(chr(10))[0]})"
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        shape = [each.dim_value for each in value.type.tensor_type.shape.dim]
        if 4 * math.prod(side or 1 for side in shape) > MAX_TENSOR_BYTES:
            return f"'{value.name}' is a tensor of {' x '.join(map(str, shape))}"
    return ""
