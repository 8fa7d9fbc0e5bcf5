"""Values and their reasons as the YAML text of a recipe."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from minisft.text import printable

_WIDTH = 110


@dataclass(frozen=True)
class Entry:
    """One line of a recipe, with the comment above it.

    Args:
        key: Dotted key; entries of one section follow each other.
        value: The value, as YAML writes it.
        reason: The comment.
        as_comment: Write the line itself as a comment, too: a value that the user may want.
    """

    key: str
    value: Any
    reason: str
    as_comment: bool = False


def recipe_text(head: Sequence[str], entries: Sequence[Entry]) -> str:
    """Return a recipe as YAML: the lines of the head as a comment, then the entries in their sections."""
    lines = [f"# {line}".rstrip() for text in head for line in _lines(text, _WIDTH - 2)]
    section = ""
    for entry in entries:
        name, _, key = entry.key.rpartition(".")
        if name != section or not name:
            lines.append("")
        if name != section:
            lines += [f"{name}:"] if name else []
            section = name
        indent = "  " if name else ""
        lines += [f"{indent}# {line}" for line in _lines(entry.reason, _WIDTH - 2 - len(indent))]
        lines.append(f"{indent}{'# ' if entry.as_comment else ''}{key}: {_scalar(entry.value)}")
    return "\n".join(lines) + "\n"


def _lines(text: str, width: int) -> list[str]:
    """Return a comment's lines; a text that begins with spaces is a command, and is not wrapped."""
    plain = " ".join(printable(text).splitlines())
    if plain.startswith(" "):
        return [plain]
    column = re.match(r"\S+ {2,}", plain)  # the name of a row of a table
    indent = " " * column.end() if column else ""
    lines = textwrap.wrap(plain, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float) and value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20).strip()
    return text.removesuffix("\n...")
