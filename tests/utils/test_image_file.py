import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.sets import with_orientation, write_image
from utils.image_file import SUFFIXES, hw_of_boxes, image_hw, is_transposed, read_image

SHORT_SEGMENTS = [b"\xff\xd8\xff\xe0\x00" + bytes([length]) + bytes(40) for length in (0, 1)]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_size_from_the_header_is_that_of_the_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"naïve{suffix}"
    write_image(path, (37, 53))
    assert image_hw(str(path)) == (37, 53)
    image = read_image(str(path))
    assert image is not None
    assert image.shape == (37, 53, 3)


def test_real_images(shared: Path) -> None:
    paths = [
        str(path) for name in ("bccd", "coco_tiny") for path in sorted((shared / "data" / name).rglob("*.jpg"))[:30]
    ]
    assert len(paths) == 60
    for path in paths:
        image = read_image(path)
        assert image is not None
        assert image_hw(path) == image.shape[:2]


def test_channels_are_rgb(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 5, 3), (10, 20, 200), np.uint8))  # written as BGR
    image = read_image(str(tmp_path / "a.png"))
    assert image is not None
    assert image[0, 0].tolist() == [200, 20, 10]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 4)])
def test_grey_and_transparent_images_have_three_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full(shape, 77, np.uint8))
    image = read_image(str(tmp_path / "a.png"))
    assert image is not None
    assert image.shape == (6, 8, 3)
    assert (image == 77).all()


@pytest.mark.parametrize(
    ("enough_px", "expected"), [(400, 400), (201, 400), (200, 200), (100, 100), (60, 100), (10, 50)]
)
def test_reduced_decoding_never_gives_less_than_asked(tmp_path: Path, enough_px: int, expected: int) -> None:
    write_image(tmp_path / "a.jpg", (200, 400))
    image = read_image(str(tmp_path / "a.jpg"), enough_px=enough_px)
    assert image is not None
    assert image.shape[:2] == (expected // 2, expected)


@pytest.mark.parametrize(("hw", "step"), [((397, 803), 2), ((401, 799), 4), ((800, 403), 8)])
def test_reduced_decoding_is_the_image_averaged(tmp_path: Path, hw: tuple[int, int], step: int) -> None:
    """Against full decoding and then averaging; the image is smooth, so that the methods must agree."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), cv2.resize(coarse, hw[::-1], interpolation=cv2.INTER_CUBIC))
    whole, reduced = (read_image(str(tmp_path / "a.jpg"), enough_px=enough) for enough in (None, max(hw) // step))
    assert whole is not None and reduced is not None
    assert reduced.shape[:2] == tuple(-(-side // step) for side in hw)
    inside = tuple(side // step for side in hw)  # blocks that are full
    blocks = whole[: inside[0] * step, : inside[1] * step].reshape(inside[0], step, inside[1], step, 3)
    difference = np.abs(blocks.mean(axis=(1, 3)) - reduced[: inside[0], : inside[1]])
    assert difference.mean() < 1
    assert difference.max() < 12


def test_only_a_jpeg_is_decoded_reduced(tmp_path: Path) -> None:
    """Of other formats OpenCV would decode all and then leave pixels out."""
    write_image(tmp_path / "a.png", (200, 400))
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "a.png"), enough_px=50), read_image(str(tmp_path / "a.png"))
    )


def test_reduced_decoding_goes_by_the_file_not_by_its_annotations(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", (200, 400))
    image = read_image(str(tmp_path / "a.jpg"), source_hw=(1600, 3200), enough_px=300)
    assert image is not None
    assert image.shape == (200, 400, 3)


def test_orientation_tag(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", (30, 50))
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_orientation((tmp_path / "a.jpg").read_bytes(), 6))
    upright = read_image(str(path))
    as_stored = read_image(str(path), source_hw=(30, 50))
    assert upright is not None
    assert as_stored is not None
    assert upright.shape == (50, 30, 3)
    assert image_hw(str(path)) == (50, 30)
    np.testing.assert_array_equal(as_stored, read_image(str(tmp_path / "a.jpg")))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("orientation", "hw"), [(1, (30, 50)), (3, (30, 50)), (6, (50, 30)), (9, (30, 50))])
def test_orientation_chunk_of_a_png(tmp_path: Path, orientation: int, hw: tuple[int, int], is_first: bool) -> None:
    write_image(tmp_path / "a.png", (30, 50))
    path, at = tmp_path / "turned.png", 33 if is_first else -12  # after IHDR or before IEND
    path.write_bytes(with_orientation((tmp_path / "a.png").read_bytes(), orientation, at))
    image = read_image(str(path))
    assert image is not None
    assert image_hw(str(path)) == image.shape[:2] == hw


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(10))
def test_whether_exif_turns_an_image_by_a_quarter(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a{suffix}"
    write_image(path, (30, 50))
    assert not is_transposed(str(path))
    path.write_bytes(with_orientation(path.read_bytes(), orientation))
    upright, stored = read_image(str(path)), read_image(str(path), source_hw=(30, 50))
    assert upright is not None and stored is not None and stored.shape == (30, 50, 3)
    assert is_transposed(str(path)) == (upright.shape != stored.shape) == (orientation in (5, 6, 7, 8))


@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".tif"])
def test_other_formats_are_turned_as_far_as_opencv_does(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", (30, 50))
    assert not is_transposed(str(tmp_path / f"a{suffix}"))
    assert not is_transposed(str(tmp_path / "absent.tif"))


@pytest.mark.parametrize(
    ("annotated_hw", "image_hw", "expected"),
    [
        ((30, 50), (30, 50), (30, 50)),
        ((50, 30), (30, 50), (30, 50)),
        ((60, 100), (30, 50), (60, 100)),
        ((100, 60), (30, 50), (60, 100)),
        ((100, 100), (30, 50), (100, 100)),
        ((50, 30), (40, 40), (50, 30)),
    ],
)
def test_boxes_refer_to_a_size_that_lies_as_the_image_does(
    annotated_hw: tuple[int, int], image_hw: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert hw_of_boxes(annotated_hw, image_hw) == expected


def test_a_chunk_that_lies_about_its_length_takes_no_memory(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (30, 50))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + b"\xff\xff\xff\xffeXIf" + content[33:])
    tracemalloc.start()
    assert image_hw(str(tmp_path / "a.png")) == (30, 50)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00", b"\x89PNG\r\n\x1a\nshort", *SHORT_SEGMENTS]
)
def test_unreadable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert image_hw(str(path)) is None
    assert read_image(str(path)) is None
    assert image_hw(str(tmp_path / "absent.jpg")) is None
    assert read_image(str(tmp_path / "absent.jpg")) is None
    assert read_image(str(tmp_path)) is None


@pytest.mark.parametrize("suffix", [each for each in SUFFIXES if each not in (".jpg", ".png")])
def test_every_ending_that_the_decoder_knows(tmp_path: Path, suffix: str) -> None:
    """And its size without decoding it, where the header is read."""
    image = np.full((40, 60, 3), (200, 30, 90), np.uint8)
    coder = {".jfif": ".jpg"}.get(suffix, suffix)
    try:
        made, content = cv2.imencode(coder, image if suffix not in (".pgm", ".pbm") else image[..., 0])
    except cv2.error:
        made = False
    if not made:
        pytest.skip(f"this OpenCV writes no {suffix}")
    (tmp_path / f"a{suffix}").write_bytes(content.tobytes())
    found = read_image(str(tmp_path / f"a{suffix}"))
    assert found is not None and found.shape == (40, 60, 3)
    assert image_hw(str(tmp_path / f"a{suffix}")) == (40, 60)
    if suffix not in (".pgm", ".pbm"):
        np.testing.assert_allclose(found.mean((0, 1)), (90, 30, 200), atol=12)  # a .gif is dithered


def test_the_first_frame_of_a_gif(tmp_path: Path) -> None:
    frames = [np.full((20, 30, 3), value, np.uint8) for value in (255, 0)]
    if not hasattr(cv2, "Animation"):
        pytest.skip("this OpenCV writes no animations")
    animation = cv2.Animation()
    animation.frames, animation.durations = frames, [100, 100]
    if not cv2.imwriteanimation(str(tmp_path / "a.gif"), animation):
        pytest.skip("this OpenCV writes no animated .gif")
    image = read_image(str(tmp_path / "a.gif"))
    assert image is not None and image.min() > 240
