"""Running a detector over an image set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from data.image_set import ImageSet
from data.loader import InputLayout, make_eval_loader
from models.detector import Detector
from utils import ranks
from utils.memory import empty_cache, is_out_of_memory
from utils.progress import Progress
from utils.structures import Batch, Detections


def image_batches(
    detector: Detector,
    image_set: ImageSet,
    *,
    batch_size: int,
    workers: int,
    is_sharded: bool = False,
    rect: bool = False,
) -> Iterable[Batch]:
    """Return all images as `detector` needs them. is_sharded: only this rank's share. rect: see `make_eval_loader`."""
    layout = InputLayout(detector.input_hw, detector.letterbox, detector.options.resize, rect, detector.size_step_px)
    rank, world_size = (ranks.rank(), ranks.world_size()) if is_sharded else (0, 1)
    return make_eval_loader(image_set, layout, batch_size=batch_size, workers=workers, rank=rank, ranks=world_size)


def detect_batches(
    detector: Detector, batches: Iterable[Batch], *, relative: bool = False, shown_of: int | None = None
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Yield each batch with its detections, on the CPU. Each image must have its placement.

    relative: NMS measures distances as fractions of the image's sides, as darknet's `map` and `test` do, instead of in
    the image's pixels, as darknet's `valid` does (`detector.c`, the arguments of get_network_boxes).

    shown_of: the number of images, to show the progress; None shows nothing.
    """
    with Progress(shown_of, label="evaluating", is_shown=shown_of is not None) as progress:
        for batch in batches:
            placements = [placement for placement in batch.placements if placement is not None]
            assert len(placements) == len(batch), "only whole images can be evaluated"
            units_px = [placement.image_px if relative else placement.pixel_px for placement in placements]
            images = batch.to(detector.device, non_blocking=True).pixels()
            yield batch, [detections.cpu() for detections in _detect_in_parts(detector, images, units_px)]
            progress.advance(len(batch))


def _detect_in_parts(detector: Detector, images: Tensor, units_px: Sequence[tuple[float, float]]) -> list[Detections]:
    """Detect in all images at once or, if memory runs out, in one half after the other."""
    try:
        return detector.detect_batch(images, units_px)
    except RuntimeError as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    empty_cache()
    half = len(images) // 2
    first = _detect_in_parts(detector, images[:half], units_px[:half])
    return first + _detect_in_parts(detector, images[half:], units_px[half:])
