"""The size that an annotation file gives an image, which the image may not have."""

from __future__ import annotations

from data.problems import OTHER_SIZE, SWAPPED_SIZE, Problems, other_size
from utils.image_file import is_transposed, lies_on_its_side


def hw_of_annotation(
    image: str, hw: tuple[int, int], written_hw: tuple[int, int] | None, place: str, problems: Problems
) -> tuple[int, int]:
    """Return the size that boxes refer to: the written one, if any; images may have been resized afterwards.

    hw: of the upright image. Where EXIF turns an image that was annotated unturned, the written size is the stored one;
    where it lies on its side without that, its sides are swapped. That is a problem, and any other difference, too.
    """
    if written_hw is None or written_hw == hw:
        return hw
    is_turned = is_transposed(image)
    if is_turned and written_hw == hw[::-1]:
        return written_hw
    is_swapped = lies_on_its_side(hw, written_hw) and not is_turned
    problems.add(SWAPPED_SIZE if is_swapped else OTHER_SIZE, other_size(place, written_hw, hw))
    return written_hw[::-1] if is_swapped else written_hw
