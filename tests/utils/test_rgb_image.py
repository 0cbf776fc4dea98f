"""Images in the forms that people have them in, and what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.draw import write_png
from utils.errors import UserError
from utils.rgb_image import rgb_of


def pixels_of(height: int, width: int) -> np.ndarray:
    """A smooth image, so that a JPEG keeps its colours, with different corners."""
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    return np.stack(np.broadcast_arrays(rows, columns, (rows + columns) / 2), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_and_pillows_images_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    image, exif = Image.fromarray(pixels_of(40, 64)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    by_path, by_pillow = rgb_of(tmp_path / "a.jpg"), rgb_of(Image.open(tmp_path / "a.jpg"))
    assert by_path.shape == by_pillow.shape == ((64, 40, 3) if orientation > 4 else (40, 64, 3))
    assert np.abs(by_path.astype(int) - by_pillow).max() <= 3


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_grey_is_the_same_in_all_channels(height: int, width: int, mirrored: bool) -> None:
    grey = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    grey = grey[:, ::-1] if mirrored else grey
    rgb = rgb_of(grey)
    assert rgb.shape == (height, width, 3) and rgb.flags.c_contiguous
    assert (rgb == grey[..., None]).all()
    np.testing.assert_array_equal(rgb_of(rgb), rgb)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_pillows_modes_of_8_bits_are_taken(mode: str) -> None:
    image = Image.fromarray(np.full((3, 4, 3), 255, np.uint8)).convert(mode)
    np.testing.assert_array_equal(rgb_of(image), np.full((3, 4, 3), 255, np.uint8))


def test_transparency_is_dropped_as_from_a_file(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8), "RGBA")
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb_of(image), rgb_of(str(tmp_path / "a.png")))


def test_a_folder_of_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_png(tmp_path / "a.png", pixels_of(2, 3))
    np.testing.assert_array_equal(rgb_of("~/a.png"), pixels_of(2, 3))


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (None, TypeError, "an image is a path, an image of Pillow or a numpy array, not of type NoneType"),
        (["a.jpg"], TypeError, "an image is a path, an image of Pillow or a numpy array, not of type list"),
        (b"a.jpg", TypeError, "an image is a path, an image of Pillow or a numpy array, not of type bytes"),
        (np.zeros((2, 2, 3), np.float32), TypeError, "an array of an image is uint8 in 0..255, not float32"),
        (np.zeros((2, 2, 3), bool), TypeError, "an array of an image is uint8 in 0..255, not bool"),
        (np.zeros((5, 2, 2, 3), np.uint8), ValueError, "an array of shape (5, 2, 2, 3) is several images: give a list"),
        (np.zeros((3, 20, 20), np.uint8), ValueError, "(H, W, 3) RGB or (H, W) grey, not of shape (3, 20, 20)"),
        (np.zeros((2, 2, 4), np.uint8), ValueError, "(H, W, 3) RGB or (H, W) grey, not of shape (2, 2, 4)"),
        (np.zeros(4, np.uint8), ValueError, "(H, W, 3) RGB or (H, W) grey, not of shape (4,)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "an image of shape (0, 4, 3) has no pixels"),
        (np.zeros((0, 4), np.uint8), ValueError, "an image of shape (0, 4, 3) has no pixels"),
        (Image.new("I;16", (2, 2)), ValueError, "Pillow's mode I;16 is not of 8 bits a channel"),
        (Image.new("F", (2, 2)), ValueError, "Pillow's mode F is not of 8 bits a channel"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_told_so(image: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        rgb_of(image)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_path_that_is_no_image_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for path, said in (("absent.jpg", "no such image"), (".", "is a folder"), ("text.jpg", "cannot be read")):
        with pytest.raises(UserError, match=said) as caught:
            rgb_of(tmp_path / path)
        assert str(caught.value).startswith(str(tmp_path / path))
