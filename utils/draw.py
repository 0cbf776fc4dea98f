"""Drawing of boxes, captions and contact sheets. All images are (H, W, 3) uint8 RGB."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.structures import Batch, Detections

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_READABLE_PX = 480  # longer side from which captions of several objects fit
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
) -> np.ndarray:
    """Return a copy of the image with its boxes, (K, 4) xyxy in pixels, outlined and captioned.

    Line width and font size grow with the image's shorter side. boxes[0] is drawn on top and captioned first; a caption
    without a free place at its box is left out.
    """
    canvas = np.ascontiguousarray(image).copy()
    line_px = max(1, round(min(canvas.shape[:2]) / 300))
    captions = [class_names[int(label)] for label in labels]
    if scores is not None:
        captions = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores, strict=True)]
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


def contact_sheet(images: Sequence[np.ndarray], columns: int, pad: int = 4) -> np.ndarray:
    """Arrange images in rows of `columns`, each centred in a cell of the largest height and width, `pad` px apart.

    Raises ValueError without images or columns.
    """
    if not images or columns < 1:
        raise ValueError(f"a contact sheet of {len(images)} images in {columns} columns")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_height = max(image.shape[0] for image in images)
    cell_width = max(image.shape[1] for image in images)
    shape = (rows * (cell_height + pad) + pad, columns * (cell_width + pad) + pad, 3)
    sheet = np.full(shape, 255, np.uint8)
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        top = pad + row * (cell_height + pad) + (cell_height - image.shape[0]) // 2
        left = pad + column * (cell_width + pad) + (cell_width - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def write_png(path: str | Path, rgb: np.ndarray) -> None:
    """Write an RGB image, creating its folder. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    assert done, "any uint8 image can be encoded"
    path.write_bytes(encoded.tobytes())  # cv2.imwrite returns False on a bad path, without an error


def draw_batch(
    batch: Batch,
    class_names: Sequence[str],
    detections: Sequence[Detections] | None = None,
    *,
    columns: int = 4,
) -> np.ndarray:
    """Draw the network's input images with their targets, or with `detections`, on a contact sheet.

    Small images are enlarged by a whole number, so that captions do not cover the objects.
    """
    images = (batch.pixels().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    zoom = max(1, _READABLE_PX // max(images.shape[1:3]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    drawn = []
    for index, image in enumerate(images):
        if detections is None:
            here = batch.targets.of_images(index, index + 1)
            boxes = here.boxes.cpu().numpy() * zoom
            drawn.append(draw_boxes(image, boxes, here.labels.cpu().numpy(), class_names))
        else:
            found = detections[index].cpu()
            boxes, labels, scores = (part.numpy() for part in (found.boxes, found.labels, found.scores))
            drawn.append(draw_boxes(image, boxes * zoom, labels, class_names, scores))
    return contact_sheet(drawn, columns)
