"""Reports and model cards of run folders, whole and broken, and of names that want to be HTML."""

from __future__ import annotations

import errno
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.confusion import confusion_matrix
from evaluation.report.__main__ import main
from evaluation.report.card import model_card
from evaluation.report.charts import Line, line_chart
from evaluation.report.facts import read_run
from evaluation.report.gallery import best, worst
from evaluation.report.markup import element, markdown, script_json, text
from evaluation.report.report import make_comparison, make_report, single_page, write_report
from evaluation.report.sections import commands
from tests.evaluation.report.runs import HOSTILE, made_run
from utils.errors import UserError

DEFAULTS = {"data": ("digits",), "cfg": None, "norm": "bn", "batch_size": 16, "seed": 0}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, texts and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def page_of(folder: Path) -> Page:
    make_report(folder, DEFAULTS)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_report_says_what_the_files_say(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "run"))
    for part in (
        "43.1",
        "95\N{NO-BREAK SPACE}%: 40.0 to 46.0",
        "61.2",
        "2 epochs",
        "--seed",
        "images a second",
        "pooled mean mismatch",
    ):
        assert part in page.text
    assert "--norm" not in page.text  # as it is the default
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["curves", "classes", "errors", "images", "norm", "data", "speed", "setup", "next"]


def test_names_of_strangers_are_text_in_the_page(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "run"))
    assert HOSTILE in page.text
    assert [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)] == []
    assert [
        attributes["src"] for tag, attributes in page.tags if tag == "img" and "data:" not in attributes["src"]
    ] == []
    assert [tag for tag, _ in page.tags].count("script") == 2


def test_names_of_strangers_are_text_in_the_model_card(tmp_path: Path) -> None:
    make_report(made_run(tmp_path / "run"), DEFAULTS)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    prose = "\n".join(line for line in card.splitlines() if not line.startswith(("    ", "<!--")))
    assert markdown(HOSTILE) in prose
    assert "<img" not in prose.replace("\\<", "")
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 5, 6}  # tables of settings, classes, AP


@given(st.text(), st.text())
def test_text_and_attributes_come_back_as_they_were(content: str, value: str) -> None:
    page = Page(element("p", content, title=value))
    assert page.tags[0][0] == "p" and len(page.tags) == 1
    shown = Page(f"<p title='{text(value)}'>{text(content)}</p>")
    assert shown.text == page.text


@given(st.recursive(st.text() | st.integers(), st.lists))
def test_json_in_a_script_cannot_end_it(value: Any) -> None:
    escaped = script_json(value)
    assert not set("<>&") & set(escaped)
    assert json.loads(escaped) == value


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    make_report(made_run(tmp_path / "run", names=("a", "b", "c")), DEFAULTS)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 5e6


EMPTY: dict[str, Any] = {"annotations": []}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detections": []}, "No object was found."),
        (EMPTY, "The images have no objects"),
        ({**EMPTY, "detections": []}, "Every object was found, and nothing else."),
        ({"images": 0}, "The images have no objects"),
        ({"metrics": {}}, "No confidence was chosen"),
        ({"metrics": {"thresholds": {"confidence": None, "classes": {}}}}, "No confidence was chosen"),
        ({"settings": {}}, "Over the epochs"),
    ],
)
def test_what_is_empty_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in page_of(made_run(tmp_path / "run", **changes)).text


def test_one_image_of_one_class(tmp_path: Path) -> None:
    truth = {"annotations": [{"image_id": 0, "category_id": 1, "bbox": [5, 5, 50, 50], "area": 2500, "iscrowd": 0}]}
    found = [{"image_id": 0, "category_id": 1, "bbox": [5, 5, 50, 50], "score": 0.9}]
    page = page_of(made_run(tmp_path / "run", images=1, names=("cat",), detections=found, **truth))
    assert "1 image with 1 object of 1 class" in page.text


def test_eighty_classes_have_a_list_in_place_of_a_matrix(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "run", names=tuple(f"class {number}" for number in range(80))))
    assert "matrix" not in [attributes.get("class") for _, attributes in page.tags]
    assert "77 classes without objects here not listed" in page.text


def test_images_that_are_gone_are_named_and_their_boxes_stay(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    shutil.rmtree(folder / "images")
    page = page_of(folder)
    assert "cannot be read any more at" in page.text and str(folder / "images" / "0.png") in page.text
    assert any("data-image" in attributes for _, attributes in page.tags)


@pytest.mark.parametrize("name", ["ground_truth.json", "detections.json"])
@pytest.mark.parametrize("content", [None, "", "[1]", '{"images": [1]}', "nonsense"])
def test_without_an_evaluation_there_are_still_the_curves(tmp_path: Path, name: str, content: str | None) -> None:
    folder = made_run(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    page = page_of(folder)
    assert "evaluate again" in page.text and "Over the epochs" in page.text and "43.1" in page.text


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1e308, 10**30, [], [[1]], {"a": 1}, float("nan"), True])
def test_whatever_the_files_hold_there_is_a_report(tmp_path: Path, value: Any) -> None:
    folder = made_run(tmp_path / "run")
    for name, places in {
        "ground_truth.json": [
            *(["info"], ["images", 0, "width"], ["images", 0, "id"], ["categories", 0, "id"]),
            *(["annotations", 0, "bbox"], ["annotations", 0, "bbox", 2], ["annotations", 0, "category_id"]),
        ],
        "detections.json": [["bbox"], ["score"], ["image_id"]],
        "metrics.json": [["AP"], ["AP_M"], ["AP_interval"], ["thresholds"], ["domains"], ["thresholds", "classes"]],
    }.items():
        whole = (folder / name).read_text(encoding="utf-8")
        for place in places:
            content = json.loads(whole)
            inner = content[0] if name == "detections.json" else content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
            read = read_run(folder, DEFAULTS)
            assert "<h2>How to go on</h2>" in single_page(read) and model_card(read)
        (folder / name).write_text(whole, encoding="utf-8")


def test_text_in_place_of_an_epochs_seconds_is_not_counted(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    rows = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join([*rows[:2], rows[2].removesuffix("5") + "soon"]))
    assert read_run(folder, DEFAULTS).seconds == 5
    make_report(folder, DEFAULTS)
    make_comparison([folder, folder], DEFAULTS, tmp_path / "both.html")


def said_commands(folder: Path) -> str:
    return "\n".join(command for _, command in commands(read_run(folder, DEFAULTS)))


def test_commands_have_what_the_weights_need(tmp_path: Path) -> None:
    darknet = {"weights": "a.weights", "data": "digits", "cfg": "my net.cfg", "names": None, "domain": None}
    made_run(tmp_path / "a", settings=darknet)
    (tmp_path / "a" / "results.csv").unlink()
    said = said_commands(tmp_path / "a")
    assert said.count("--weights a.weights --cfg 'my net.cfg'") == 3
    exported = {"weights": "a.onnx", "data": "digits"}
    made_run(tmp_path / "b", settings=exported)
    (tmp_path / "b" / "results.csv").unlink()
    assert "export.py" not in said_commands(tmp_path / "b") and "detect.py" in said_commands(tmp_path / "b")
    own = {"data": ["x", "y"], "run_id": "z", "domain_statistics": "own"}
    made_run(tmp_path / "c", settings=own, metrics={"AP": 0.1, "domains": {"x": {}, "y": {}}})
    assert said_commands(tmp_path / "c").count("best.pt --domain x") == 3


def test_an_evaluation_has_a_report_without_a_training(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", settings={"weights": "best.pt", "data": "digits"})
    for name in ("results.csv", "data_problems.txt", "norm_health.csv"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "best.pt, evaluated on digits" in page.text and "--resume" not in page.text
    assert not (folder / "README.md").exists()


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    make_report(folder, DEFAULTS)
    written = (folder / "README.md").read_text(encoding="utf-8")
    make_report(folder, DEFAULTS)
    assert (folder / "README.md").read_text(encoding="utf-8") == written
    (folder / "README.md").write_text("mine", encoding="utf-8")
    make_report(folder, DEFAULTS)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"


def test_domains_have_reports_of_their_own(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", metrics={"AP": 0.2, "AP50": 0.3, "domains": {"a": {"AP": 0.1, "AP50": 0.2}}})
    for name in ("ground_truth.json", "detections.json"):
        (folder / name).unlink()
    made_run(folder / "a")
    page = page_of(folder)
    assert ("a", {"href": "a/report.html"}) in page.tags and "evaluate again" not in page.text
    assert (folder / "a" / "report.html").is_file()


def test_a_domain_that_is_deleted_or_elsewhere_is_left_out(tmp_path: Path) -> None:
    domains = {name: {"AP": 0.1, "AP50": 0.2} for name in ("gone", "../b", "a#1")}
    folder, elsewhere = made_run(tmp_path / "run", metrics={"AP": 0.2, "domains": domains}), made_run(tmp_path / "b")
    made_run(folder / "a#1")
    page = page_of(folder)
    assert not (elsewhere / "report.html").exists() and (folder / "a#1" / "report.html").is_file()
    assert ("a", {"href": "a%231/report.html"}) in page.tags and "gone" in page.text


def test_a_page_that_was_asked_for_and_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "report.html").mkdir()
    with pytest.raises(OSError, match="report"):
        main([str(folder)])
    with pytest.raises(OSError, match="report"):
        main([str(folder), "--out", str(folder / "report.html")])


def test_failing_to_write_is_a_line(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_run(tmp_path / "run")

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evaluation.report.report.write_text", full)
    write_report(folder, DEFAULTS)
    assert f"error: {folder / 'report.html'} was not written (No space left on device)" in capsys.readouterr().err


def test_a_report_that_cannot_be_made_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    write_report(tmp_path / "run", DEFAULTS)
    assert "report.html was not written (UserError" in capsys.readouterr().err


def test_a_folder_of_no_run_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no settings\.json, metrics\.json or results\.csv"):
        read_run(tmp_path, DEFAULTS)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first, second = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    rows = json.loads((second / "detections.json").read_text())[::2]
    (second / "detections.json").write_text(json.dumps(rows))
    (second / "metrics.json").write_text(json.dumps({"AP": 0.441, "AP50": 0.6}))
    make_comparison([first, second], DEFAULTS, tmp_path / "both.html")
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "+1.0" in page.text and "-1.2" in page.text and "All settings are equal" in page.text
    assert "differs most" in page.text and any("data-image" in attributes for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("svg") == 3


def test_runs_on_different_images_are_compared_without_them(tmp_path: Path) -> None:
    make_comparison([made_run(tmp_path / "a"), made_run(tmp_path / "b", images=4)], DEFAULTS, tmp_path / "both.html")
    assert "measured on different images" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_the_command_makes_a_report_and_a_comparison(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(made_run(tmp_path / name)) for name in "ab"]
    main(runs[:1])
    main([*runs, "--out", "both.html"])
    (tmp_path / "a" / "results.csv").unlink()  # as of evaluate.py
    (tmp_path / "a" / "report.html").unlink()
    main(runs[:1])
    assert (tmp_path / "a" / "report.html").is_file() and (tmp_path / "both.html").is_file()


def test_counts_at_the_threshold_are_those_of_each_image(tmp_path: Path) -> None:
    measured = read_run(made_run(tmp_path / "run"), DEFAULTS).measured
    assert measured is not None
    objects = sum(row.objects for row in measured.classes)
    assert sum(image.found + image.missed for image in measured.images) == objects
    assert all(0 <= image.f1 <= 1 and image.missed >= 0 for image in measured.images)


@given(
    st.lists(
        st.tuples(*[st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda value: round(value, 6))] * 2), max_size=8
    )
)
def test_a_chart_stays_within_its_frame(points: list[tuple[float, float]]) -> None:
    xs, ys = zip(*points, strict=True) if points else ((), ())
    chart = line_chart("title", [Line(name="a", xs=xs, ys=ys)], x="epoch")
    places = [attributes for tag, attributes in Page(chart).tags if tag == "circle"]
    assert len(places) == len(points)
    assert all(0 <= float(each["cx"] or -1) <= 360 and 0 <= float(each["cy"] or -1) <= 230 for each in places)


def test_axes_of_shares_begin_at_zero_and_logarithmic_ones_say_so() -> None:
    line = Line(name="AP", xs=[1, 2], ys=[0.001, 10])
    linear, log = (line_chart("title", [line], x="epoch", y="per cent", from_zero=each) for each in (True, False))
    assert "log scale" in Page(log).text and "log scale" not in Page(linear).text
    ticks = [text for text in Page(linear).texts if text.strip()]
    assert {"0", "2", "10"} <= set(ticks)
    assert "-" not in Page(line_chart("t", [Line(name="AP", xs=[1, 2], ys=[0, 0])], x="epoch", from_zero=True)).text


def test_a_dots_label_does_not_lie_on_the_curve() -> None:
    for recall in (5, 30, 50, 70, 95):
        xs = [float(place) for place in range(101)]
        ys = [100 - 0.9 * place for place in xs]
        dots = [(recall, 100 - 0.9 * recall, "confidence 22 %")]
        chart = line_chart(
            "t", [Line(name="mean", xs=xs, ys=ys)], x="r", x_limits=(0, 100), y_limits=(0, 100), dots=dots
        )
        at = next(attributes for _, attributes in Page(chart).tags if attributes.get("class") == "said")
        left, base = float(at["x"] or 0), float(at["y"] or 0)
        assert 44 <= left <= 360 - 15 * 6.5
        beside = [(left + step - 44) / 304 * 100 for step in range(0, 98, 7)]
        curve = [196 - (100 - 0.9 * place) / 100 * 186 for place in beside]
        assert all(not base - 10 < height < base + 3 for height in curve), recall


def test_an_image_is_shown_once_and_the_worst_are_half_of_few(tmp_path: Path) -> None:
    measured = read_run(made_run(tmp_path / "run", images=7), DEFAULTS).measured
    assert measured is not None
    bad = worst(measured, 20)
    good = best(measured, 12, without=bad)
    assert 0 < len(bad) <= 4 and not set(bad) & set(good)


def test_the_confusion_is_of_each_classs_own_threshold(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    measured = read_run(folder, DEFAULTS).measured
    assert measured is not None
    rows = measured.confusion[:-1].sum()
    assert rows == confusion_matrix(measured.truth, measured.results, min_score=0.2)[:-1].sum()
    assert rows != confusion_matrix(measured.truth, measured.results, min_score=0.3)[:-1].sum()
    assert "from each class's own chosen confidence on" in page_of(folder).text


def test_a_resumed_run_does_not_list_resume(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", settings={"resume": "elsewhere", "seed": 7, "run_id": "x"})
    assert list(read_run(folder, {"resume": None, "seed": 0}).changed) == ["seed"]
