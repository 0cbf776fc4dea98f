import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.albumentations_import import albumentations as A
from data.augment import Augmenter
from data.augment_options import AugmentOptions
from data.user_pipeline import UserPipeline, read_pipeline, transform_names
from tests.utils.test_letterbox import extent, rectangle
from utils.errors import UserError
from utils.structures import Sample

# Of those whose boxes albumentations moves by formula; the distortions among its transforms follow to 2 px.
GEOMETRY = [
    A.HorizontalFlip(p=1),
    A.VerticalFlip(p=1),
    A.Transpose(p=1),
    A.D4(p=1),
    A.RandomRotate90(p=1),
    A.Rotate(limit=90, p=1),
    A.SafeRotate(limit=90, p=1),
    A.Affine(scale=(0.8, 1.2), rotate=(-30, 30), shear=(-10, 10), p=1),
    A.Perspective(p=1),
    A.RandomSizedBBoxSafeCrop(height=90, width=70, p=1),
    A.RandomCrop(height=90, width=90, p=1),
    A.Resize(height=77, width=99, p=1),
    A.PadIfNeeded(min_height=200, min_width=200, p=1),
    A.OneOf([A.Resize(60, 90, p=1), A.Compose([A.Transpose(p=0.5), A.RandomScale(p=1)])], p=1),
]


def sample(*boxes: tuple[int, int, int, int], crowd: bool = False, hw: tuple[int, int] = (120, 160)) -> Sample:
    image = np.zeros((*hw, 3), np.uint8)
    for box in boxes:
        image |= rectangle(hw, box)
    return Sample(
        image=image,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes)) + 3,
        is_crowd=np.full(len(boxes), crowd),
        image_id=5,
        path="5.png",
    )


def text_of(folder: Path, pipeline: object, kind: str = "json") -> str:
    file = folder / f"pipeline.{kind}"
    A.save(pipeline, file, data_format=kind)
    return read_pipeline(str(file))


@pytest.mark.parametrize("transform", GEOMETRY, ids=lambda transform: type(transform).__name__)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(left=st.integers(0, 150), top=st.integers(0, 110), side=st.integers(8, 60), seed=st.integers(0, 2**32))
def test_a_box_goes_where_its_pixels_go(
    transform: object, tmp_path: Path, left: int, top: int, side: int, seed: int
) -> None:
    pipeline = UserPipeline(text_of(tmp_path, transform), min_visibility=0.2)
    before = sample((left, top, min(left + side, 160), min(top + side, 120)))
    after = pipeline(before, np.random.default_rng(seed))
    is_upright = not isinstance(transform, A.Affine | A.Rotate | A.Perspective | A.SafeRotate)
    height, width = after.image.shape[:2]
    for moved in after.boxes:  # of a slanted object that is cut, the box is not cut to what is left
        if not is_upright and ((moved[:2] < 1).any() or (moved[2:] > np.array([width, height]) - 1).any()):
            continue
        np.testing.assert_allclose(moved, extent(after.image), atol=2)
        assert after.labels.tolist() == [3]
    again = UserPipeline(text_of(tmp_path, transform), 0.2)
    again(sample(), np.random.default_rng(1))  # what came before leaves no trace
    again = again(before, np.random.default_rng(seed))
    np.testing.assert_array_equal(again.image, after.image)
    np.testing.assert_array_equal(again.boxes, after.boxes)


def test_labels_and_crowds_follow_their_boxes(tmp_path: Path) -> None:
    """The left half is cut off, and with it the first box; of a crowd region any remainder counts."""
    half = UserPipeline(text_of(tmp_path, A.Crop(x_min=80, y_min=0, x_max=160, y_max=120, p=1)), min_visibility=0.2)
    boxes = (10, 10, 30, 30), (100, 50, 140, 90), (40, 80, 84, 100)  # the last one is 4 of 44 px inside
    for crowd in (False, True):
        after = half(sample(*boxes, crowd=crowd), np.random.default_rng(0))
        assert after.labels.tolist() == [4, 5] if crowd else [4]
        assert after.is_crowd.tolist() == [True, True] if crowd else [False]
        np.testing.assert_allclose(after.boxes[0], [20, 50, 60, 90], atol=1e-3)


@pytest.mark.parametrize("boxes", [(), ((7, 8, 8, 9),)])
def test_empty_images_and_single_pixels(tmp_path: Path, boxes: tuple[tuple[int, int, int, int], ...]) -> None:
    pipeline = UserPipeline(text_of(tmp_path, A.Compose([A.HorizontalFlip(p=1), A.GaussNoise(p=1)])), 0.2)
    after = pipeline(sample(*boxes), np.random.default_rng(0))
    assert after.boxes.dtype == np.float32 and after.boxes.shape == (len(boxes), 4)
    assert len(after.labels) == len(after.is_crowd) == len(boxes)
    np.testing.assert_allclose(after.boxes, np.array([[152, 8, 153, 9]])[: len(boxes)], atol=1e-4)


def test_json_and_yaml_are_the_same_and_keep_every_default(tmp_path: Path) -> None:
    pipeline = A.Compose([A.Rotate(limit=(-7, 9), p=0.25), A.OneOf([A.Blur(), A.GaussNoise(std_range=(1e-5, 0.1))])])
    texts = [text_of(tmp_path, pipeline, kind) for kind in ("json", "yaml")]
    assert texts[0] == texts[1]
    assert A.to_dict(A.Compose(A.from_dict(json.loads(texts[0])).transforms)) == A.to_dict(pipeline)
    assert transform_names(texts[0]) == "Rotate, Blur, GaussNoise"


def test_the_source_stays_as_it_is_and_what_follows_is_drawn_anew(tmp_path: Path) -> None:
    """A cached image is the same memory for all; a mosaic's tiles each have a draw of their own."""
    text = text_of(tmp_path, A.Compose([A.PixelDropout(dropout_prob=0.5, p=1), A.Rotate(limit=90, p=1)]))
    sources = [sample((60, 40, 110, 80)) for _ in range(4)]
    for source in sources:
        source.image.setflags(write=False)
    options = AugmentOptions(mosaic=1, flip=False, jitter=0, resize=1, albumentations=text)
    made = Augmenter(options, sources.__getitem__, 4)(0, (64, 64), np.random.default_rng(0))
    assert made.image.shape == (64, 64, 3)
    tiles = [made.image[:12, :12], made.image[:12, -12:], made.image[-12:, :12], made.image[-12:, -12:]]
    assert len({tile.tobytes() for tile in tiles}) == 4


REFUSED = {
    "missing": (None, "cannot be read (No such file or directory)"),
    "not json": ("{", "no pipeline that albumentations .* loads: Expecting property name"),
    "empty": ("null", "no pipeline that albumentations .* loads: the file is empty"),
    "not a pipeline": ("[1, 2]", "no pipeline that albumentations .* loads"),
    "unknown": ({"__class_fullname__": "os.system", "p": 1}, "no pipeline that .* loads: 'os.system' is unknown"),
    "a value": ({"__class_fullname__": "Rotate", "limit": "x", "p": 1}, "no pipeline that .* loads: .*limit"),
    "lambda": ({"__class_fullname__": "Lambda", "__name__": "x", "p": 1}, "loads: 'Lambda' is unknown or missing"),
    "no transform": ({"__class_fullname__": "BboxParams", "format": "coco", "p": 1}, "no pipeline that .* loads"),
    "more images": (
        A.to_dict(A.Mosaic(p=1))["transform"],
        "Mosaic needs mosaic_metadata, which is not there: only images and boxes are",
    ),
    "tensor": (A.to_dict(A.ToTensorV2(p=1))["transform"], "ToTensorV2 does not say where boxes go"),
    "tiles": (A.to_dict(A.RandomGridShuffle(p=1))["transform"], "RandomGridShuffle tears objects apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pipeline_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    file = tmp_path / "mine.json"
    if isinstance(content, dict):
        content = json.dumps({"transform": content})
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as caught:
        read_pipeline(str(file))
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_yaml_runs_no_code_and_other_endings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/x']]")
    with pytest.raises(UserError, match="could not determine a constructor"):
        read_pipeline(str(file))
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"mine\.pkl: write the pipeline to a \.json or \.yaml file"):
        read_pipeline("mine.pkl")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.Normalize(p=1), r"must return 8-bit RGB images, not \(120, 160, 3\) float32"),
        (A.RandomCrop(500, 500, p=1), r"fails on 5\.png: .*[Cc]rop"),
    ],
)
def test_a_pipeline_that_fails_says_so(tmp_path: Path, transform: object, message: str) -> None:
    pipeline = UserPipeline(text_of(tmp_path, transform), 0.2)
    with pytest.raises(UserError, match=message):
        pipeline(sample((1, 1, 20, 20)), np.random.default_rng(0))
