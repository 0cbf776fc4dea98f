from pathlib import Path

import pytest

from data.image_set import ImageSet
from tests.data.sets import picture_set


@pytest.fixture
def noise_set(tmp_path: Path) -> ImageSet:
    return picture_set(tmp_path / "noise", 11)
