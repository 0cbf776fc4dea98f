"""Rooms may import only what is to the right: pages -> models, data -> utils; models -> cfg -> nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGES = {"train", "evaluate", "detect", "options"}
ARROWS = {  # room or page -> what of ours it may import
    **{page: {"options", "examination", "models", "data", "cfg", "utils"} for page in PAGES},
    "train": {"options", "preparation", "fitting", "training", "examination", "models", "data", "cfg", "utils"},
    "fitting": {"preparation", "training", "models", "data", "utils"},
    "training": {"preparation", "examination", "models", "data", "cfg", "utils"},
    "preparation": {"options", "models", "data", "cfg", "utils"},
    "examination": {"models", "data", "utils"},
    "models": {"models", "cfg", "utils"},
    "data": {"data", "utils"},
    "utils": {"utils"},
    "cfg": {"cfg"},
}
STANDARD_LIBRARY_ONLY = {"cfg"}
# The pages that stand in a room: both look at a data set's boxes for a cfg, so they have to know both, and
# `python -m data.anchors` says where it belongs. Like any page they are imported by nobody.
PAGES_IN_ROOMS = {
    "data/anchors.py": {"options", "data", "cfg", "utils"},
    "data/doctor/__main__.py": {"options", "data", "cfg", "utils"},
}


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import at any depth, relative ones resolved against `package`.

    `from a.b import c` is a.b.c, because c may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)


def broken_arrows(root: Path) -> list[str]:
    """One line, file:line and the import, for each that goes against the arrows."""
    found = []
    for path in sorted([*root.glob("*.py"), *(p for room in ARROWS for p in (root / room).rglob("*.py"))]):
        place = path.relative_to(root)
        room = place.parts[0].removesuffix(".py")
        allowed = PAGES_IN_ROOMS.get(place.as_posix(), ARROWS.get(room, set()))
        for line, dotted in imported(ast.parse(path.read_text()), place.parts[:-1]):
            name = dotted.split(".")[0]
            ours = name in ARROWS
            outside = not ours and room in STANDARD_LIBRARY_ONLY and name not in sys.stdlib_module_names
            page = next((page for page in map(module_name, PAGES_IN_ROOMS) if f"{dotted}.".startswith(f"{page}.")), "")
            if outside or page or (ours and name not in allowed):
                found.append(f"{place}:{line} imports {page or name}")
    return list(dict.fromkeys(found))


def module_name(place: str) -> str:
    return place.removesuffix(".py").replace("/", ".")


def test_the_house_keeps_its_arrows(root: Path) -> None:
    assert broken_arrows(root) == []


@pytest.mark.parametrize(
    ("place", "source", "name"),
    [
        ("utils/clock.py", "import models", "models"),
        ("utils/clock.py", "def f():\n    from data.coco import read", "data"),
        ("data/loader.py", "import numpy, models.norms.table as t", "models"),
        ("data/loader.py", "from cfg import plan", "cfg"),
        ("models/yolo/loss.py", "from ...data import coco", "data"),
        ("models/yolo/loss.py", "if True:\n    from ... import data", "data"),
        ("models/network.py", "import train", "train"),
        ("cfg/parse.py", "import torch", "torch"),
        ("cfg/parse.py", "from utils.errors import UserError", "utils"),
        ("options.py", "from train import main", "train"),
        ("evaluation.build.py", "import options", "options"),
        ("models/detector.py", "from evaluation.build import make_evaluator", "examination"),
        ("detect.py", "try:\n    import evaluate\nexcept ImportError:\n    pass", "evaluate"),
        ("data/anchors.py", "from models.network import Network", "models"),
        ("data/loader.py", "from data import anchors", "data.anchors"),
        ("data/loader.py", "import data.anchors as a", "data.anchors"),
        ("data/loader.py", "from .anchors import deal_masks", "data.anchors"),
        ("train.py", "from data.anchors import deal_masks", "data.anchors"),
        ("data/other.py", "import cfg.plan", "cfg"),
        ("data/doctor/charts.py", "import cfg.plan", "cfg"),
        ("data/doctor/charts.py", "from .__main__ import main", "data.doctor.__main__"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, place: str, source: str, name: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = broken_arrows(tmp_path)
    assert [line.split(":")[0] for line in found] == [place]
    assert found[0].endswith(f"imports {name}")


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("train.py", "import options, cfg.plan, models.network, data.loader, utils.clock, torch"),
        ("models/yolo/loss.py", "from . import coder\nfrom ..blocks import A\nimport cfg.spec, torchvision"),
        ("cfg/plan.py", "from . import spec\nimport dataclasses"),
        ("utils/draw.py", "from utils.errors import UserError\nimport cv2"),
        ("data/anchors.py", "import options, cfg.plan, utils.errors\nfrom data import clusters"),
        ("data/doctor/__main__.py", "import options, cfg.plan, utils.errors\nfrom data.doctor import charts"),
    ],
)
def test_an_import_to_the_right_passes(tmp_path: Path, place: str, source: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert broken_arrows(tmp_path) == []
