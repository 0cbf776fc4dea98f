"""Each image exists, can be read and is not blank. Whether it is good, an eye must say."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation.coco_map import evaluate_coco
from evaluation.plots import plot_confusion, plot_layer_gaps, plot_pr_curves, plot_range_test, plot_results
from tests.reference.coco_rows import results_from

HEADER = "step,epoch,lr,loss,box,objectness,class,AP,AP50,seconds"


def ink(path: Path) -> float:
    """The share of pixels that are not the background."""
    image = cv2.imread(str(path))
    assert image is not None and min(image.shape[:2]) > 100
    return float((image != image[0, 0]).any(axis=2).mean())


@pytest.mark.parametrize("classes", [0, 1, 3, 30])
def test_pr_curves(tmp_path: Path, classes: int) -> None:
    ground_truth = {
        "images": [{"id": 0}],
        "annotations": [
            {"id": place, "image_id": 0, "category_id": place, "bbox": [20 * place, 0, 10, 10]}
            for place in range(classes)
        ],
        "categories": [{"id": place, "name": str(place)} for place in range(max(classes, 1))],
    }
    results = [{**row, "score": 0.5} for row in ground_truth["annotations"][::2]]
    table = evaluate_coco(ground_truth, results_from(results))
    path = tmp_path / "new" / "pr.png"
    plot_pr_curves(table, path)
    assert ink(path) > 0.01


@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("empty", [False, True])
def test_confusion(tmp_path: Path, classes: int, empty: bool) -> None:
    matrix = np.diag(np.arange(classes + 1)) * (not empty)
    plot_confusion(matrix, [f"class {place}" for place in range(classes)], tmp_path / "confusion.png")
    assert ink(tmp_path / "confusion.png") > 0.01


@pytest.mark.parametrize("name", [r"a$\foo$", "$", "$$", r"\$x$", r"a\$\foo\$", "$5 or $6", "^_{%#"])
def test_a_class_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Two dollars begin a formula in matplotlib, and a bad one is an exception."""
    plot_confusion(np.eye(3, dtype=int), [name, "plain"], tmp_path / "confusion.png")
    ground_truth = {
        "images": [{"id": 0}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 10, 10]}],
        "categories": [{"id": 0, "name": name}],
    }
    table = evaluate_coco(ground_truth, results_from([{**ground_truth["annotations"][0], "score": 0.5}]))
    plot_pr_curves(table, tmp_path / "pr.png")
    assert ink(tmp_path / "confusion.png") > 0.01 and ink(tmp_path / "pr.png") > 0.01


@pytest.mark.parametrize("layers", [1, 40])
def test_layer_gaps(tmp_path: Path, layers: int) -> None:
    gaps = np.linspace(0, 2.5, 6 * layers).reshape(layers, 6)
    names = [f"{layer}  conv 3x3/2  $128$" for layer in range(layers)]
    plot_layer_gaps({"sigma": gaps, "mean": gaps[::-1]}, names, ["1", "2", "4", "8", "16", "all"], tmp_path / "g.png")
    assert ink(tmp_path / "g.png") > 0.01


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n" + "".join(f"{s},0,0.1,{500 / s},1,1,1,{'' if s % 50 else 0.5},,{s}\n" for s in range(1, 301)),
        f"{HEADER}\n1,0,0.1,nan,1,1,1,,,3\n2,0,0.1,inf,1,1,1,,,3\n",
        f"{HEADER}\n1,0,0.1,0,1,1,1,-1,,3\n",
    ],
    ids=["a long run", "not finite", "one row"],
)
def test_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert ink(tmp_path / "results.png") > 0.005


def test_without_results_there_is_no_plot(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(f"{HEADER}\n")
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_results(tmp_path / "absent.csv", tmp_path / "results.png")


@pytest.mark.parametrize("losses", [[100.0], [100.0, 50.0, 1e23]])
def test_a_range_test(tmp_path: Path, losses: list[float]) -> None:
    curve = np.array(losses)
    plot_range_test(np.geomspace(1e-6, 1e-4, len(curve)), curve, curve, 2e-5, tmp_path / "rate_test.png")
    assert ink(tmp_path / "rate_test.png") > 0.005
