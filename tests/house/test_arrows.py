"""Rooms may import only what is to the right, and no files import each other in a circle.

study -> train -> engine -> options -> evaluation -> models, data -> utils; models -> cfg -> nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PAGES = ("train", "evaluate", "detect", "export", "hubconf")
ARROWS = {  # room or page -> the rooms it may import
    **{page: {"engine", "options", "evaluation", "models", "data", "cfg", "utils"} for page in PAGES},
    "study": {"study", "train", "engine", "options", "evaluation", "models", "data", "cfg", "utils"},
    "demo": {"demo", "options", "models", "cfg", "utils"},
    "engine": {"engine", "options", "evaluation", "models", "data", "cfg", "utils"},
    "options": {"evaluation", "models", "data", "cfg", "utils"},
    "evaluation": {"evaluation", "models", "data", "utils"},
    "models": {"models", "cfg", "utils"},
    "data": {"data", "utils"},
    "utils": {"utils"},
    "cfg": {"cfg"},
}
STANDARD_LIBRARY_ONLY = {"cfg"}
# Pages inside a room, run as `python -m data.anchors`; like any page they are imported by nobody.
PAGES_IN_ROOMS = {
    "data/anchors.py": {"data", "cfg", "utils"},
    "data/convert.py": {"data", "utils"},
    "data/doctor/__main__.py": {"data", "cfg", "utils"},
    "evaluation/report/__main__.py": {"evaluation", "options", "utils"},
    "demo/__main__.py": {"demo", "options", "models", "cfg", "utils"},
    "models/weights/__main__.py": {"models", "cfg", "utils"},
    "study/__main__.py": {"study", "cfg", "utils"},
}


def imported(nodes: Iterable[ast.AST], package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import, relative ones resolved against `package`.

    `from a.b import c` is a.b.c, because c may be a module.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)


def outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run on import, and those that only type checkers read."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def product_files(root: Path) -> list[Path]:
    return sorted([*root.glob("*.py"), *(path for room in ARROWS for path in (root / room).rglob("*.py"))])


def broken_arrows(root: Path) -> list[str]:
    """Return one line, file:line and the import, for each import against the arrows."""
    found = []
    for path in product_files(root):
        place = path.relative_to(root)
        room = place.parts[0].removesuffix(".py")
        allowed = PAGES_IN_ROOMS.get(place.as_posix(), ARROWS.get(room, set()))
        for line, dotted in imported(ast.walk(ast.parse(path.read_text())), place.parts[:-1]):
            name = dotted.split(".")[0]
            ours = name in ARROWS
            outside = not ours and room in STANDARD_LIBRARY_ONLY and name not in sys.stdlib_module_names
            page = next((page for page in map(module_name, PAGES_IN_ROOMS) if f"{dotted}.".startswith(f"{page}.")), "")
            if outside or page or (ours and name not in allowed):
                found.append(f"{place}:{line} imports {page or name}")
    return list(dict.fromkeys(found))


def circle(root: Path) -> list[str]:
    """Return the modules of one circle of imports outside functions, `if TYPE_CHECKING` included; [] if none."""
    paths = {module_name(path.relative_to(root).as_posix()): path for path in product_files(root)}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = path.relative_to(root).parts[:-1]
        names = [name for _, name in imported(outside_functions(ast.parse(path.read_text())), package)]
        graph[module] = {name for name in [*names, *(name.rpartition(".")[0] for name in names)] if name in paths}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def module_name(place: str) -> str:
    return place.removesuffix(".py").replace("/", ".")


def test_the_house_keeps_its_arrows(root: Path) -> None:
    assert broken_arrows(root) == []


def test_the_house_has_no_circle(root: Path) -> None:
    assert len(product_files(root)) > 100
    assert circle(root) == []


@pytest.mark.parametrize(
    ("files", "modules"),
    [
        ({"utils/a.py": "import utils.b", "utils/b.py": "from utils import a"}, {"utils.a", "utils.b"}),
        ({"utils/a.py": "from utils.b import x", "utils/b.py": "from .a import y"}, {"utils.a", "utils.b"}),
        (
            {
                "data/a.py": "from data.b import B",
                "data/b.py": "if TYPE_CHECKING:\n    from data.c import C",
                "data/c.py": "try:\n    import data.a\nexcept ImportError:\n    pass",
            },
            {"data.a", "data.b", "data.c"},
        ),
        ({"options.py": "import data.a", "data/a.py": "class A:\n    import options"}, {"options", "data.a"}),
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, files: dict[str, str], modules: set[str]) -> None:
    write(tmp_path, files)
    assert set(circle(tmp_path)) == modules


@pytest.mark.parametrize(
    "files",
    [
        {"utils/a.py": "import utils.b", "utils/b.py": "def f():\n    import utils.a"},
        {"utils/a.py": "import utils.b, utils.c", "utils/b.py": "import utils.c", "utils/c.py": "import json"},
        {"data/a.py": "import utils.a", "utils/a.py": "from a import data"},
    ],
)
def test_imports_without_a_circle_pass(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    assert circle(tmp_path) == []


def write(root: Path, files: dict[str, str]) -> None:
    for place, source in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(source)


@pytest.mark.parametrize(
    ("place", "source", "name"),
    [
        ("utils/clock.py", "import models", "models"),
        ("utils/clock.py", "def f():\n    from data.coco import read", "data"),
        ("utils/clock.py", "if TYPE_CHECKING:\n    import engine.step", "engine"),
        ("data/loader.py", "import numpy, models.norms.table as t", "models"),
        ("data/loader.py", "from cfg import plan", "cfg"),
        ("data/loader.py", "import options", "options"),
        ("models/yolo/loss.py", "from ...data import coco", "data"),
        ("models/yolo/loss.py", "if True:\n    from ... import data", "data"),
        ("models/network.py", "import train", "train"),
        ("models/detector.py", "from evaluation.build import make_evaluator", "evaluation"),
        ("models/detector.py", "import engine.step", "engine"),
        ("cfg/parse.py", "import torch", "torch"),
        ("cfg/parse.py", "from utils.errors import UserError", "utils"),
        ("options.py", "from train import main", "train"),
        ("options.py", "from engine.job import Job", "engine"),
        ("evaluation/build.py", "import options", "options"),
        ("evaluation/build.py", "from engine import step", "engine"),
        ("evaluation/build.py", "import cfg.plan", "cfg"),
        ("engine/trainer.py", "from train import train", "train"),
        ("detect.py", "try:\n    import evaluate\nexcept ImportError:\n    pass", "evaluate"),
        ("data/anchors.py", "from models.network import Network", "models"),
        ("data/anchors.py", "import options", "options"),
        ("data/loader.py", "from data import anchors", "data.anchors"),
        ("data/loader.py", "import data.anchors as a", "data.anchors"),
        ("data/loader.py", "from .anchors import deal_masks", "data.anchors"),
        ("train.py", "from data.anchors import deal_masks", "data.anchors"),
        ("data/other.py", "import cfg.plan", "cfg"),
        ("data/doctor/charts.py", "import cfg.plan", "cfg"),
        ("data/doctor/charts.py", "from .__main__ import main", "data.doctor.__main__"),
        ("models/weights/writer.py", "from models.weights.__main__ import convert", "models.weights.__main__"),
        ("models/weights/__main__.py", "import data.coco", "data"),
        ("engine/step.py", "from study.rows import RowFile", "study"),
        ("train.py", "import study.grid", "study"),
        ("study/cell.py", "import detect", "detect"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, place: str, source: str, name: str) -> None:
    write(tmp_path, {place: source})
    found = broken_arrows(tmp_path)
    assert [line.split(":")[0] for line in found] == [place]
    assert found[0].endswith(f"imports {name}")


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("train.py", "import options, engine.step, evaluation.build, cfg.plan, models.network, data.loader, torch"),
        ("engine/step.py", "import options, evaluation.build, models.network, data.loader, cfg.plan, utils.clock"),
        ("options.py", "import evaluation.darknet_map, data.augment, models.norms.table, cfg.yolo, utils.knob"),
        ("evaluation/build.py", "from . import evaluator\nimport models.detector, data.loader, utils.stop"),
        ("models/yolo/loss.py", "from . import coder\nfrom ..blocks import A\nimport cfg.spec, torchvision"),
        ("cfg/plan.py", "from . import spec\nimport dataclasses"),
        ("utils/draw.py", "from utils.errors import UserError\nimport cv2"),
        ("data/anchors.py", "import cfg.plan, utils.errors\nfrom data import clusters"),
        ("data/doctor/__main__.py", "import cfg.plan, utils.errors\nfrom data.doctor import charts"),
        ("models/weights/__main__.py", "import cfg.plan, utils.errors\nfrom models.weights import writer"),
        ("study/cell.py", "import train, engine.job, options, data.loader, study.grid"),
    ],
)
def test_an_import_to_the_right_passes(tmp_path: Path, place: str, source: str) -> None:
    write(tmp_path, {place: source})
    assert broken_arrows(tmp_path) == []
