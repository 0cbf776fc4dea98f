"""Drawing of boxes, captions and contact sheets. All images are (H, W, 3) uint8 RGB."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.structures import Batch, Detections, Targets

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_READABLE_PX = 480  # longer side from which captions of several objects fit
_GAP_PX = 4  # between the images of a contact sheet
_GOLDEN = 0.6180339887  # steps by the golden ratio stay far from all earlier hues


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the RGB colour (0..255) of a label: the same in every image, and far from those of nearby labels."""
    saturation, value = ((0.85, 1.0), (0.55, 0.95), (0.95, 0.7))[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * _GOLDEN) % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    scores: Sequence[float] | np.ndarray | None = None,
    tracks: Sequence[int | None] = (),
) -> np.ndarray:
    """Return a copy of the image with its boxes, (K, 4) xyxy in pixels, outlined and captioned: `#3 cat 0.87`.

    Line width and font size grow with the image's shorter side. boxes[0] is drawn on top and captioned first; a caption
    without a free place at its box is left out.
    """
    canvas = np.ascontiguousarray(image).copy()
    line_px = max(1, round(min(canvas.shape[:2]) / 300))
    captions = [class_names[int(label)] for label in labels]
    if scores is not None:
        captions = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores, strict=True)]
    if tracks:
        numbers = ["" if track is None else f"#{track} " for track in tracks]
        captions = [number + caption for number, caption in zip(numbers, captions, strict=True)]
    last = np.array([canvas.shape[1], canvas.shape[0]] * 2) - 1  # keeps edges on the border visible
    corners = np.rint(np.asarray(boxes, np.float64).reshape(-1, 4)).clip(0, last).astype(int).tolist()
    boxed = list(zip(corners, [class_colour(int(label)) for label in labels], captions, strict=True))
    for (left, top, right, bottom), colour, _ in reversed(boxed):
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, line_px)
    occupied = np.zeros(canvas.shape[:2], bool)
    for box, colour, caption in boxed:
        _write_caption(canvas, occupied, box, colour, caption)
    return canvas


def _write_caption(
    canvas: np.ndarray, occupied: np.ndarray, box: list[int], colour: tuple[int, int, int], caption: str
) -> None:
    """Write on a filled plate above the box, else inside its top, else below it, wherever the place is free.

    The plate is moved into the image and marked in `occupied`, (H, W) bool.
    """
    height, width = canvas.shape[:2]
    scale = max(0.32, min(height, width) / 1300)
    thick_px = max(1, round(scale * 1.6))
    (text_width, text_height), below = cv2.getTextSize(caption, _FONT, scale, thick_px)
    margin = max(1, text_height // 4)
    plate_width, plate_height = text_width + 2 * margin, text_height + below // 2 + 2 * margin
    left = max(0, min(box[0], width - plate_width))
    for place in (box[1] - plate_height, box[1], box[3]):
        top = max(0, min(place, height - plate_height))
        plate = np.s_[top : top + plate_height, left : left + plate_width]
        if not occupied[plate].any():
            break
    else:
        return
    occupied[plate] = True
    canvas[plate] = colour
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if brightness > 120 else (255, 255, 255)
    origin = (left + margin, top + margin + text_height)
    cv2.putText(canvas, caption, origin, _FONT, scale, ink, thick_px, cv2.LINE_AA)


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Arrange images (N, H, W, 3) in rows of four, with white between and around them."""
    count, height, width = images.shape[:3]
    columns = min(4, count)
    absent = -count % columns
    cells = np.pad(images, ((0, absent), (0, _GAP_PX), (0, _GAP_PX), (0, 0)), constant_values=255)
    rows = cells.reshape(-1, columns, height + _GAP_PX, width + _GAP_PX, 3).swapaxes(1, 2)
    sheet = rows.reshape(-1, columns * (width + _GAP_PX), 3)
    return np.pad(sheet, ((_GAP_PX, 0), (_GAP_PX, 0), (0, 0)), constant_values=255)


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write an RGB image, creating its folder. Raises OSError, and leaves no part of the file then."""
    write_image(path, rgb, ".png")


def write_image(path: Path, rgb: np.ndarray, form: str) -> None:
    """Write an RGB image as `write_png` does. form: .png or .jpg, which takes a tenth of the time and loses little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(form, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    assert done, "any uint8 image can be encoded"
    try:
        path.write_bytes(encoded.tobytes())  # cv2.imwrite returns False on a bad path, without an error
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def draw_batch(batch: Batch, class_names: Sequence[str], detections: Sequence[Detections] | None = None) -> np.ndarray:
    """Draw the network's input images with their targets, or with `detections`, on a contact sheet.

    Small images are enlarged by a whole number, so that captions do not cover the objects.
    """
    images = (batch.pixels().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    zoom = max(1, _READABLE_PX // max(images.shape[1:3]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    drawn = []
    for index, image in enumerate(images):
        targets = batch.targets.of_images(index, index + 1)
        here: Detections | Targets = targets if detections is None else detections[index]
        scores = here.scores.numpy() if isinstance(here, Detections) else None
        drawn.append(draw_boxes(image, here.boxes.numpy() * zoom, here.labels.numpy(), class_names, scores))
    return contact_sheet(np.stack(drawn))
