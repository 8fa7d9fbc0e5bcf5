"""The charts of a search's page as SVG: the objective by the values of one key, and all keys of each trial together.

They are drawn here, not by a script, so that they print and can be read without one. Text from recipes is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# The sizes are in units of the picture. page.css sets text of 12 units, and of 20 on a phone, which must fit too.
_WIDTH = 640
_LEFT, _RIGHT, _TOP = 84, 24, 18
_SLICE_HEIGHT, _SLICE_BOTTOM = 330, 76
_PARALLEL_HEIGHT, _PARALLEL_TOP, _PARALLEL_BOTTOM = 380, 78, 30
_LABEL = 92  # least distance of two labels side by side
_CHARACTER = 11  # width of a character on a phone
_FEW = 6  # as many different numbers are labels themselves; else round numbers are
_LOG_FROM = 5  # a scale is logarithmic if its largest value is at least this many times its smallest


@dataclass(frozen=True)
class Mark:
    """One trial in a chart.

    Args:
        title: What the pointer shows, as plain text.
        settings: Value of each varied key.
        objective: Its objective, or None if it has none.
        low: Lower bound of its interval, or None.
        high: Upper bound of its interval, or None.
        kind: "best", "tied" (cannot be told apart from the best), "worse", or "stopped" (at an earlier rung).
    """

    title: str
    settings: dict[str, Any]
    objective: float | None
    low: float | None
    high: float | None
    kind: str


_STYLES = {"best": "c0 wide1", "tied": "c1", "worse": "c7", "stopped": "c7 faint"}
_ORDER = list(reversed(_STYLES))  # later marks cover earlier ones


def style(kind: str) -> str:
    """Return the classes of page.css of a kind of trial."""
    return _STYLES[kind]


def in_drawing_order(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks with those last that must stay visible: the best, and before it those that tie with it."""
    return sorted(marks, key=lambda mark: _ORDER.index(mark.kind))


def text_of(value: Any) -> str:
    """Return a setting's value, or a loss, as short text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.4g}".replace("e-0", "e-")
    return f"[{', '.join(map(text_of, value))}]" if isinstance(value, list) else str(value)


class _Scale:
    """Positions of values on an axis: numbers linear or logarithmic, anything else one place after the other."""

    def __init__(self, values: Sequence[Any], start: float, end: float) -> None:
        """Set the scale for `values` to positions from `start`, of the smallest or first, to `end`."""
        distinct = list({text_of(value): value for value in values}.values())
        self.is_number = all(_is_number(value) for value in distinct)
        self.start, self.end = start, end
        if not self.is_number:
            self.places = {text_of(value): index for index, value in enumerate(distinct)}
            self.low, self.high = -0.5, len(distinct) - 0.5
            self.ticks = [(self.at(value), text_of(value)) for value in distinct]
            return
        numbers = sorted(map(float, distinct))
        self.low, self.high = numbers[0], numbers[-1]
        self.is_log = self.low > 0 and self.high >= _LOG_FROM * self.low
        if self.high == self.low:
            margin = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - margin, self.high + margin
        marks: Sequence[float] = numbers if len(numbers) <= _FEW else self._round_marks()
        self.ticks = [(self.at(mark), text_of(mark if mark != int(mark) else int(mark))) for mark in marks]

    def _round_marks(self) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        decades = math.log10(self.high / self.low) if self.is_log else 0.0
        locator = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)) if self.is_log else MaxNLocator(5)
        margin = 1e-9 * self.low if self.is_log else 0.0  # LogLocator's powers of ten are rounded
        marks = map(float, locator.tick_values(self.low, self.high))
        return [mark for mark in marks if self.low - margin <= mark <= self.high + margin]

    @property
    def gap(self) -> float:
        """The least distance of two labels; that of the whole axis if there is only one."""
        positions = sorted(position for position, _ in self.ticks)
        return float(min(np.diff(positions), default=abs(self.end - self.start)))

    def at(self, value: Any) -> float:
        """Return the position of a value."""
        if not self.is_number:
            value, low, high = self.places[text_of(value)], self.low, self.high
        elif self.is_log:
            value, low, high = (math.log(number) for number in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def slice_chart(key: str, marks: Sequence[Mark], objective: str) -> str:
    """Return the objective of each trial, with its interval, by its value of one key; "" if no trial has both.

    Args:
        key: The varied key.
        marks: The trials.
        objective: Name of the objective, as plain text.
    """
    shown = [mark for mark in marks if mark.objective is not None and key in mark.settings]
    if not shown:
        return ""
    height, bottom = _SLICE_HEIGHT, _SLICE_HEIGHT - _SLICE_BOTTOM
    across = _Scale([mark.settings[key] for mark in _by_number(shown, key)], _LEFT + 60, _WIDTH - _RIGHT - 60)
    ends = [end for mark in shown for end in (mark.objective, mark.low, mark.high) if end is not None]
    up = _Scale([*ends, *np.linspace(min(ends), max(ends), _FEW + 1)], bottom, _TOP)

    # 1. The axes.
    parts = []
    for position, text in _apart(up.ticks, 26):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{position:.1f}" y2="{position:.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, position + 5, text, "end"))
    for position, text in _apart(across.ticks, _LABEL):
        parts.append(_text(position, bottom + 26, text, "middle", room=max(_LABEL, across.gap)))
    parts.append(_text(_WIDTH - _RIGHT, height - 12, key, "end"))

    # 2. The trials: those with the same value lie side by side.
    same: dict[str, list[Mark]] = {}
    for mark in shown:
        same.setdefault(text_of(mark.settings[key]), []).append(mark)
    for mark in in_drawing_order(shown):
        neighbours = same[text_of(mark.settings[key])]
        spacing = min(14.0, 110 / len(neighbours), 0.7 * across.gap / len(neighbours))
        x = across.at(mark.settings[key]) + (neighbours.index(mark) - (len(neighbours) - 1) / 2) * spacing
        drawn = f"<title>{escape(mark.title)}</title>"
        if mark.low is not None and mark.high is not None:
            drawn += f'<line class="{style(mark.kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="{up.at(mark.low):.1f}" '
            drawn += f'y2="{up.at(mark.high):.1f}"/>'
        radius = 6 if mark.kind == "best" else 4
        hollow = " hollow" if mark.kind == "stopped" else ""
        drawn += f'<circle class="dot {style(mark.kind)}{hollow}" cx="{x:.1f}" cy="{up.at(mark.objective):.1f}" '
        parts.append(f'<g>{drawn}r="{radius}"/></g>')
    label = escape(f"{objective} by {key}: {'; '.join(mark.title for mark in shown)}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def parallel_chart(keys: Sequence[str], marks: Sequence[Mark], objective: str) -> str:
    """Return a line for each trial through its value of each key, and its objective; "" if no trial has one.

    Args:
        keys: The varied keys.
        marks: The trials.
        objective: Name of the objective, as plain text.
    """
    shown = [mark for mark in marks if mark.objective is not None and all(key in mark.settings for key in keys)]
    if not shown:
        return ""
    top, bottom = _PARALLEL_TOP, _PARALLEL_HEIGHT - _PARALLEL_BOTTOM
    xs = np.linspace(60, _WIDTH - 110, len(keys) + 1)
    ends = [mark.objective for mark in shown if mark.objective is not None]
    columns = {key: [mark.settings[key] for mark in _by_number(shown, key)] for key in keys}
    scales = [_Scale(values, bottom, top) for values in columns.values()]
    scales.append(_Scale([*ends, *np.linspace(min(ends), max(ends), _FEW + 1)], bottom, top))

    # 1. The trials, above the lines of the axes.
    names = [*keys, objective]
    parts = [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>' for x in xs]
    for mark in in_drawing_order(shown):
        values = [*(mark.settings[key] for key in keys), mark.objective]
        points = "L".join(f"{x:.1f} {scale.at(v):.1f}" for x, scale, v in zip(xs, scales, values, strict=True))
        parts.append(f'<path class="{style(mark.kind)}" d="M{points}"><title>{escape(mark.title)}</title></path>')

    # 2. The labels, above the trials; the names of the axes take turns in two lines, so that neighbours do not touch.
    for index, (x, name, scale) in enumerate(zip(xs, names, scales, strict=True)):
        parts += [_text(x + 6, y + 5, text, "start", room=xs[1] - xs[0]) for y, text in _apart(scale.ticks, 26)]
        anchor = "start" if index == 0 else "end" if index == len(names) - 1 else "middle"
        place = {"start": 4.0, "middle": x, "end": _WIDTH - 4.0}[anchor]
        parts.append(_text(place, 24 + 28 * (index % 2), _short_key(name, names), anchor, name))
    label = escape(f"Settings and {objective} of {len(shown)} trials; the table has the same figures", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_PARALLEL_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def bar_chart(values: dict[str, float], label: str) -> str:
    """Return a bar for each value, largest first, with its name above it.

    Args:
        values: Value of each name, at least 0.
        label: What the chart shows, as plain text.
    """
    largest = max(values.values(), default=0)
    bars = []
    for index, (name, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        y, width = index * 52, value / largest * (_WIDTH - 90) if largest else 0
        bars.append(
            f"{_text(0, y + 20, name, 'start')}"
            f'<rect class="bar" x="0" y="{y + 27}" width="{width:.1f}" height="14"/>'
            f"{_text(width + 8, y + 41, f'{value:.2f}', 'start')}"
        )
    text = escape(f"{label}: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {len(bars) * 52}" role="img" aria-label="{text}">{"".join(bars)}</svg>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_number(marks: Sequence[Mark], key: str) -> list[Mark]:
    """Return the marks by their value of `key`, so that the places of an axis are in order; text as it comes."""
    return sorted(marks, key=lambda mark: mark.settings[key] if _is_number(mark.settings[key]) else math.inf)


def _apart(ticks: Sequence[tuple[float, str]], distance: float) -> list[tuple[float, str]]:
    """Return the ticks whose labels do not overlap: each at least `distance` from the one before."""
    kept: list[tuple[float, str]] = []
    for position, text in ticks:
        if not kept or abs(position - kept[-1][0]) >= distance:
            kept.append((position, text))
    return kept


def _short_key(name: str, names: Sequence[str]) -> str:
    """Return the last part of a dotted key, or the name itself if another one ends in the same part."""
    last = name.rsplit(".", 1)[-1]
    return last if [other.rsplit(".", 1)[-1] for other in names].count(last) == 1 else name


def _text(x: float, y: float, text: str, anchor: str, title: str = "", room: float = math.inf) -> str:
    """Return a label that is shortened to `room` units; the pointer shows `title`, or the whole text."""
    longest = int(room / _CHARACTER) if math.isfinite(room) else len(text)
    shown = text if len(text) <= longest else f"{text[: longest - 1]}…"
    content = f"<title>{escape(title or text)}</title>{escape(shown)}"
    return f'<text class="halo" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'
