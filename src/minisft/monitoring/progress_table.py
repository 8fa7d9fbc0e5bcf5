"""The table that shows a training in a terminal: `train` shows its own, `watch` that of another process."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minisft.text import duration, printable

_BAR_WIDTH, _TREND_WIDTH = 32, 24  # characters
_RECENT = 20  # logged steps of which the speed is the mean
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
# A change of the mean loss by less than this share is no trend.
_LEVEL = 0.01


class ProgressTable:
    """Step, epoch, loss with its trend, speed, memory, time left and held-out loss of a training.

    Args:
        title: The first line.
        clock: Returns the time in seconds.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.title, self._clock = printable(title), clock
        self.step = 0
        self.last_step: int | None = None  # number of the last step, if it is known
        self.score = ""  # scores of an evaluation, as text
        self._line: Mapping[str, Any] = {}  # the newest line with a loss
        self._losses: list[float] = []
        self._held_out: list[tuple[int, float]] = []  # (step, loss)
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # (supervised tokens, seconds)
        self._added = clock()

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of metrics.jsonl: `step`, and `loss`, `eval_loss` or both, with the other fields of the line."""
        self.step = int(line["step"])
        if isinstance(line.get("loss"), int | float):
            self._line, self._added = line, self._clock()
            self._losses.append(float(line["loss"]))
            self._recent.append((float(line["supervised_tokens"]), float(line["seconds"])))
        if isinstance(line.get("eval_loss"), int | float):
            self._held_out.append((self.step, float(line["eval_loss"])))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step, at the mean speed of the newest steps; None: unknown."""
        if self.last_step is None or not self._recent:
            return None
        pace = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return max(0.0, pace * (self.last_step - self.step) - (self._clock() - self._added))

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, cells in self._rows(options.ascii_only):
            table.add_row(name, cells)
        yield Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        yield table

    def _rows(self, ascii_only: bool) -> Iterable[tuple[str, Any]]:
        """Yield the rows: always the same ones, so that the table keeps its height."""
        line = self._line
        steps = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.last_step or 1, completed=self.step if self.last_step else 0, width=_BAR_WIDTH)
        steps.add_row(f"{self.step:,} of {self.last_step:,}" if self.last_step else f"{self.step:,}", bar)
        yield "step", steps
        yield "epoch", f"{line['epoch']:.2f}" if isinstance(line.get("epoch"), int | float) else ""
        trend = f"  {spark_line(self._losses, _ASCII if ascii_only else _BLOCKS)}  {trend_of(self._losses)}"
        yield "loss", f"{line['loss']:.4f}{trend}" if line else ""
        yield "held-out", "; ".join(filter(None, [self._held_out_text(), self.score])) or "-"
        tokens, seconds = map(sum, zip(*self._recent, strict=True)) if self._recent else (0.0, 0.0)
        yield "speed", f"{tokens / seconds:,.0f} supervised tokens/s" if seconds else ""
        memory = line.get("peak_memory_mb")
        yield "memory", f"{memory / 1000:.2f} GB" if isinstance(memory, int | float) else ""
        left = self.seconds_left
        yield "left", "" if left is None else duration(left)

    def _held_out_text(self) -> str:
        if not self._held_out:
            return ""
        step, loss = self._held_out[-1]
        lowest = min(value for _, value in self._held_out)
        return f"loss {loss:.4f} at step {step:,}" + ("" if loss <= lowest else f"  (lowest: {lowest:.4f})")


def spark_line(values: list[float], levels: str = _BLOCKS) -> str:
    """Return a line of characters, lowest to highest value: the means of equally long parts of the finite values."""
    finite = [value for value in values if abs(value) < float("inf")]
    count = min(_TREND_WIDTH, len(finite))
    bounds = [round(index * len(finite) / count) for index in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def trend_of(values: list[float]) -> str:
    """Return whether the mean of the newest values lies below, above or near that of as many before them."""
    values = [value for value in values[-2 * _RECENT :] if abs(value) < float("inf")]
    size = len(values) // 2
    if size < 2:
        return ""
    before, now = sum(values[-2 * size : -size]) / size, sum(values[-size:]) / size
    if abs(now - before) <= _LEVEL * abs(before):
        return "level"
    return "falling" if now < before else "rising"


def step_line(line: Mapping[str, Any], last_step: int | None, seconds_left: float | None) -> str:
    """Return a line of metrics.jsonl as text, for where there is no terminal."""
    left = "" if seconds_left is None else f"  {seconds_left:.0f} s left"
    return (
        f"step {line['step']}/{'?' if last_step is None else last_step}  "
        f"epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
        f"{line['supervised_tokens'] / line['seconds']:.0f} supervised tokens/s  "
        f"{line['peak_memory_mb'] / 1000:.2f} GB{left}"
    )
