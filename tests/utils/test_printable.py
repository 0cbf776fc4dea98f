import pytest

from utils.printable import printable


@pytest.mark.parametrize("text", ["", "red box", "红色方框 é", "C:\\a"])
def test_text_for_people_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb", r"a\nb"),
        ("\udc80", r"\udc80"),
        ("\u202e", r"\u202e"),
        ("\x07é\0", r"\x07é\x00"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, escaped: str) -> None:
    assert printable(text) == escaped
