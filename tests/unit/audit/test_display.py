"""Tokens in a terminal: coloured by loss, without colours under NO_COLOR, with control characters escaped."""

import io

from rich.console import Console

from minisft.audit.display import tokens_text
from minisft.audit.step_rows import ReportedToken

TOKENS = [ReportedToken("ask", None), ReportedToken("low", 0.1), ReportedToken("high\x1b[2J", 9.0)]


def shown(**options):
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor", **options).print(tokens_text(TOKENS))
    return file.getvalue()


def test_a_high_loss_has_another_colour_than_a_low_one():
    coloured = shown()
    low, high = coloured.split("low")[0].rsplit("\x1b[", 1)[1], coloured.split("high")[0].rsplit("\x1b[", 1)[1]
    assert low != high
    assert "\x1b[2J" not in coloured


def test_no_color_leaves_the_text():
    plain = shown(no_color=True)
    assert "48;" not in plain  # no background
    assert "low" in plain
