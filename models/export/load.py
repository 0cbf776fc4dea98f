"""Exported files as predictors: a file's outputs become candidates, whichever library runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfg.plan import Plan
from models.export.darknet_file import open_darknet
from models.export.metadata import Metadata
from models.export.ncnn_file import open_ncnn
from models.export.onnx_file import open_onnx
from models.export.openvino_file import open_openvino
from models.export.torchscript_file import open_torchscript
from models.thresholds import Thresholds
from models.yolo.head import RawHead
from models.yolo.postprocess import DetectionOptions, candidates
from utils.errors import UserError
from utils.structures import Detections

Run = Callable[[np.ndarray], Sequence[np.ndarray]]  # (N, 3, H, W) float32 -> the file's outputs
# Each opens a file after it has looked for what a stranger may have put into it. Raises UserError.
OPENERS: dict[str, Callable[[Path], tuple[Metadata, Run]]] = {
    ".onnx": open_onnx,
    ".xml": open_openvino,
    ".torchscript": open_torchscript,
    ".json": open_ncnn,
    ".weights": open_darknet,
}


def load_exported(path: Path, *, device: str = "auto", input_hw: tuple[int, int] | None = None) -> FilePredictor:
    """Open an exported file, by its ending. input_hw: (height, width) in pixels, of a file with dynamic size.

    Raises UserError for a file that is missing, damaged, foreign or malicious, for a missing library, and for a device
    other than the CPU.
    """
    if device not in ("auto", "cpu"):
        raise UserError(f"{path}: exported files run on the CPU here: --device {device} is of checkpoints")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        metadata, run = OPENERS[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error
    return FilePredictor(path, metadata, run, metadata.plan(path, input_hw))


class FilePredictor:
    """An ExportedPredictor of a file that is open, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, path: Path, metadata: Metadata, run: Run, plan: Plan) -> None:
        self.path, self.metadata, self.plan, self._run = path, metadata, plan, run

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.metadata.class_names

    @property
    def letterbox(self) -> bool:
        return self.metadata.letterbox

    @property
    def thresholds(self) -> Thresholds | None:
        return self.metadata.thresholds

    @property
    def resize(self) -> str:
        return self.metadata.resize

    def check(self, options: DetectionOptions) -> None:
        """Raise UserError for thresholds that let through what the graph's own suppression has dropped."""
        rule = self.metadata.suppression
        if rule is not None and (options.confidence < rule.confidence or options.nms_iou > rule.iou):
            raise UserError(
                f"{self.path}: its graph drops scores below {rule.confidence:g} and suppresses from an overlap of "
                f"{rule.iou:g}: confidence {options.confidence:g} and nms_iou {options.nms_iou:g} need another export"
            )

    @torch.no_grad()
    def candidates(self, images: Tensor, *, confidence: float) -> list[Detections]:
        """(N, 3, H, W) float in 0..1 -> per image the boxes and classes above `confidence`, in input pixels.

        Before suppression, unless it is in the file's graph. Raises UserError for another size than the file's, and
        if it computes something else than its metadata says.
        """
        input_hw = (images.shape[-2], images.shape[-1])
        plan = self.plan if input_hw == self.plan.net.input_hw else self.metadata.plan(self.path, input_hw)
        batch = self.metadata.batch or len(images)
        found: list[Detections] = []
        for part in torch.split(images.float().cpu(), batch):
            padded = torch.cat((part, part.new_zeros(batch - len(part), *part.shape[1:])))
            outputs = self._outputs(padded)
            self._check(outputs, self._promised(plan, outputs, batch))
            found += self._found(outputs, plan, batch, confidence)[: len(part)]
        return found

    def _outputs(self, images: Tensor) -> list[Tensor]:
        try:
            return [torch.from_numpy(np.asarray(output)) for output in self._run(images.contiguous().numpy())]
        except Exception as error:  # each library has its own
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.path}: cannot be run: {reason or type(error).__name__}") from error

    def _promised(self, plan: Plan, outputs: Sequence[Tensor], batch: int) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs that the metadata promises."""
        if self.metadata.outputs == "nms":
            return [(len(outputs[0]) if outputs and outputs[0].ndim else 0, 7)]
        heads = [(plan.nodes[index].shape, spec) for index, spec in zip(plan.heads, plan.head_specs, strict=True)]
        if self.metadata.outputs == "heads":
            return [(batch, spec.channels, shape.height, shape.width) for shape, spec in heads]
        boxes = sum(shape.height * shape.width * len(spec.mask) for shape, spec in heads)
        return [(batch, boxes, 5 + plan.classes)]

    def _check(self, outputs: Sequence[Tensor], promised: Sequence[tuple[int, ...]]) -> None:
        shapes = [tuple(output.shape) for output in outputs]
        is_sound = shapes == promised and all(output.dtype == torch.float32 for output in outputs)
        if is_sound and self.metadata.outputs == "nms":
            labels = outputs[0][:, 6]
            is_sound = bool(((labels >= 0) & (labels < len(self.metadata.class_names))).all())
        if not is_sound:
            raise UserError(f"{self.path}: its outputs, {shapes}, are not those of its metadata, {promised}")

    def _found(self, outputs: Sequence[Tensor], plan: Plan, batch: int, confidence: float) -> list[Detections]:
        if self.metadata.outputs == "heads":
            pairs = zip(outputs, plan.head_specs, strict=True)
            heads = [RawHead.from_output(output, spec, torch.Size(plan.net.input_hw)) for output, spec in pairs]
            return candidates(heads, confidence=confidence)
        if self.metadata.outputs == "decoded":
            return [_above(image, confidence) for image in outputs[0]]
        rows = outputs[0][outputs[0][:, 5] > confidence]
        of_images = [rows[rows[:, 0] == image] for image in range(batch)]
        return [Detections(boxes=each[:, 1:5], scores=each[:, 5], labels=each[:, 6].long()) for each in of_images]


def _above(decoded: Tensor, confidence: float) -> Detections:
    """(S, 4 + 1 + C) -> the boxes and classes that score above `confidence`, in the order of the rows."""
    scores = decoded[:, 4:5] * decoded[:, 5:]
    index, label = (scores > confidence).nonzero(as_tuple=True)
    return Detections(boxes=decoded[index, :4], scores=scores[index, label], labels=label)
