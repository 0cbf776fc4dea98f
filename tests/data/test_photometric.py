import numpy as np
import pytest

from data.augment_options import AugmentOptions
from data.photometric import HsvJitter, photometric_transforms


def changed(image: np.ndarray, saturation: float = 1, exposure: float = 1, hue: float = 0) -> np.ndarray:
    jitter = HsvJitter(saturation=1, exposure=1, hue=0)
    return jitter.apply(image, saturation_factor=saturation, exposure_factor=exposure, hue_shift=hue)


def colour(*rgb: int) -> np.ndarray:
    return np.full((2, 2, 3), rgb, np.uint8)


def test_nothing_drawn_nothing_changed() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(changed(grey), grey)


def test_exposure_scales_and_saturates() -> None:
    assert changed(colour(100, 50, 20), exposure=1.5)[0, 0].tolist() == pytest.approx([150, 75, 30], abs=2)
    assert changed(colour(200, 200, 200), exposure=1.5)[0, 0].tolist() == [255, 255, 255]


def test_saturation_moves_towards_grey_and_keeps_grey() -> None:
    assert changed(colour(200, 100, 100), saturation=0.5)[0, 0].tolist() == pytest.approx([200, 150, 150], abs=2)
    assert changed(colour(90, 90, 90), saturation=1.5)[0, 0].tolist() == [90, 90, 90]


def test_hue_goes_round_in_both_directions() -> None:
    red = colour(255, 0, 0)
    assert changed(red, hue=1 / 3)[0, 0].tolist() == [0, 255, 0]
    assert changed(red, hue=-1 / 3)[0, 0].tolist() == [0, 0, 255]


def test_factors_lie_between_inverse_and_limit_on_both_sides_of_one() -> None:
    jitter = HsvJitter(saturation=1.5, exposure=2, hue=0.1)
    jitter.set_random_seed(0)
    drawn = [jitter.get_params() for _ in range(300)]
    for name, limit in (("saturation_factor", 1.5), ("exposure_factor", 2)):
        values = np.array([each[name] for each in drawn])
        assert 1 / limit <= values.min() < 1 / limit + 0.05
        assert limit - 0.05 < values.max() <= limit
        assert 0.4 < (values > 1).mean() < 0.6
    assert np.abs([each["hue_shift"] for each in drawn]).max() <= 0.1


def test_only_what_is_asked_for_is_built() -> None:
    off = {"saturation": 1.0, "exposure": 1.0, "hue": 0.0, "blur": 0.0, "noise": 0.0}
    assert photometric_transforms(AugmentOptions(**off)) == []
    for name, value in (("hue", 0.1), ("blur", 0.5), ("noise", 0.5)):
        (transform,) = photometric_transforms(AugmentOptions(**{**off, name: value}))
        assert isinstance(transform, HsvJitter) == (name == "hue")
