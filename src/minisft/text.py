"""Text from data, models, file names and libraries, made safe to read in a terminal; times as text."""

import json
import re
import textwrap
from typing import Any

# Characters that a terminal interprets instead of showing: control characters (C0 except tab and line feed, DEL, C1),
# the ones that reorder text (Unicode TR 36, "bidirectional text spoofing"), and surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with every character that a terminal would interpret replaced by an escape such as `\x1b`.

    Everything that comes from data, models, file names or errors passes through here before it reaches a terminal,
    or a file that is meant to be read in one. Tabs and line feeds stay, and line ends of Windows become line feeds.
    """
    return _UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text.replace("\r\n", "\n"))


_UNBROKEN = "\0"  # stands for a space at which no line may end; `printable` leaves none in a text


def wrap_words(text: str, width: int) -> str:
    """Return text whose lines end between words, where a terminal of `width` columns would end them within one.

    Further lines of a row of a table begin below the text behind its label, such as `lengths    5% 53`, and those of a
    sentence two columns to the right. What is to be copied stays whole: text in backticks, and lines that begin with
    `next:` or with a command, or have a word that no line has room for, such as a long path.
    """
    return "\n".join(_wrapped(line, width) if len(line) > width else line for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if line.lstrip().startswith(("next:", "minisft ", "sbatch ", "job=$(")):
        return line
    label = re.match(r" *\S+ {2,}", line)
    if label and label.end() > width // 2:  # no column would be left for the text
        label = None
    begin = label.end() if label else len(line) - len(line.lstrip())
    whole = re.sub("`[^`]*`", lambda quoted: quoted[0].replace(" ", _UNBROKEN), line[begin:])
    further = begin if label else begin + 2
    if max(map(len, whole.split()), default=0) > width - further:
        return line
    lines = textwrap.wrap(
        whole, width, initial_indent=line[:begin],
        subsequent_indent=" " * further, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines).replace(_UNBROKEN, " ")


def dump_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON that is safe to print: what `printable` would replace is written as a JSON escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def duration(seconds: float) -> str:
    """Return a time such as 42 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
