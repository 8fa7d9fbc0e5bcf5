import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.text import printable, wrap_words


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short enough", "short enough"),
        ("a sentence that is longer than that", "a sentence that is\n  longer than that"),
        ("rows   one two three four five", "rows   one two three\n       four five"),
        ("  rows  one two three four", "  rows  one two\n        three four"),
        ("next: minisft evaluate outputs/mine", "next: minisft evaluate outputs/mine"),
        ("  minisft train outputs/mine.yaml", "  minisft train outputs/mine.yaml"),
        ("to install it: `pip install a-package`", "to install it: `pip install a-package`"),
        ("in outputs/a-long-name-of-a-folder now", "in outputs/a-long-name-of-a-folder now"),
        ("first\nsecond line that is too long", "first\nsecond line that is\n  too long"),
    ],
)
def test_lines_end_between_words_and_below_their_text(text, shown):
    assert wrap_words(text, 20) == shown


@given(st.text(st.sampled_from("ab -`:/.\n"), max_size=80), st.integers(8, 40))
def test_wrapping_changes_nothing_but_white_space(text, width):
    assert wrap_words(text, width).split() == text.split()
