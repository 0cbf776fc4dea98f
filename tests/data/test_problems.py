from data.problems import BROKEN_LABEL, NO_AREA, Problems


def test_the_summary_shows_three_and_the_lines_all() -> None:
    problems = Problems()
    for number in range(4):
        problems.add(NO_AREA, f"x.xml object {number}")
    problems.add(BROKEN_LABEL, "y.txt:3")
    assert problems.summary() == [
        "4 boxes without area dropped (first: x.xml object 0, x.xml object 1, x.xml object 2)",
        "1 malformed label dropped (first: y.txt:3)",
    ]
    assert problems.lines() == [
        *(f"box without area dropped: x.xml object {number}" for number in range(4)),
        "malformed label dropped: y.txt:3",
    ]


def test_more_than_are_kept_are_still_counted() -> None:
    problems = Problems()
    for number in range(1002):
        problems.add(NO_AREA, str(number))
    assert len(problems) == 1002
    assert len(problems.lines()) == 1001
    assert problems.lines()[-2:] == ["box without area dropped: 999", "box without area dropped: and 2 more"]


def test_nothing_wrong() -> None:
    assert Problems().summary() == Problems().lines() == []
