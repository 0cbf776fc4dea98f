from pathlib import Path

import pytest

from data.image_set import ImageSet
from tests.data.sets import noise_image_set


@pytest.fixture
def noise_set(tmp_path: Path) -> ImageSet:
    return noise_image_set(tmp_path / "noise", 11)
