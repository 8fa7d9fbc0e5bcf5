import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 猫, é\n\ttabbed", "plain, 猫, é\n\ttabbed"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J and \x7f", "\\x9b2J and \\x7f"),
        ("over\rwritten", "over\\x0dwritten"),
        ("of\r\nWindows", "of\nWindows"),
        ("a\u202eb", "a\\u202eb"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_controls_are_written_out(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_what_is_printable_can_be_encoded_and_holds_no_control(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert all(char in "\n\t" or ord(char) >= 0x20 for char in shown)
    assert not any(0x7F <= ord(char) <= 0x9F for char in shown)
