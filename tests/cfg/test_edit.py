"""Changed values in a cfg's text: what the parser reads is new, all other lines are as they were."""

from cfg.edit import with_values
from cfg.parse import parse_sections

TEXT = """# a net
[net]
width = 8
height=8
width=9

[conv]
filters=4 # few
[conv]
"""


def test_values_are_replaced_in_place_and_added_behind_the_header():
    made = with_values(TEXT, {2: {"width": 16, "height": 8}, 7: {"filters": 5}, 9: {"filters": 6, "size": 3}})
    assert made.split("\n") == [
        "# a net",
        "[net]",
        "width = 16",
        "height=8",
        "width=9",  # of equal keys the first is read
        "",
        "[conv]",
        "filters=5 # few",
        "[conv]",
        "filters=6",
        "size=3",
        "",
    ]
    values = [{key: entry.value for key, entry in s.entries.items()} for s in parse_sections(made, path="x.cfg")]
    assert values == [{"width": "16", "height": "8"}, {"filters": "5#few"}, {"filters": "6", "size": "3"}]


def test_what_is_as_wanted_already_keeps_its_spelling():
    assert with_values(TEXT, {2: {"width": 8}, 9: {}}) == TEXT


def test_line_ends_stay_what_they_are():
    made = with_values("[net]\r\nwidth=8\r\n", {1: {"width": 9, "height": 7}})
    assert made == "[net]\r\nheight=7\r\nwidth=9\r\n"


def test_what_is_none_becomes_a_comment_wherever_it_stands():
    """Of equal keys the first that is left is read: all of the section go, and no other section's."""
    text = "[net]\nwidth=8\n[conv]\nk e y = 1,2 # x\nkeys=3\n; key=4\nkey=5\r\n[conv]\nkey=6\n"
    made = with_values(text, {1: {"height": None}, 3: {"key": None}})
    assert made == "[net]\nwidth=8\n[conv]\n# k e y = 1,2 # x\nkeys=3\n; key=4\n# key=5\r\n[conv]\nkey=6\n"
    assert [list(section.entries) for section in parse_sections(made, path="x.cfg")] == [["width"], ["keys"], ["key"]]
