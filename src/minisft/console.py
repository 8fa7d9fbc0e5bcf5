"""What the commands print. Text that is not ours is never taken for markup, as `[/INST]` would be, or for a control."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from minisft.text import printable


class _PrintableConsole(Console):
    """A console on which no text is a control, be it in a table, a bar or a line; styles alone are."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console: Console = _PrintableConsole(highlight=False, soft_wrap=True)
error_console: Console = _PrintableConsole(stderr=True, highlight=False, soft_wrap=True)


def say(text: str = "", style: str | None = None) -> None:
    """Print one message on stdout, as it stands."""
    console.print(escape(printable(text)), style=style)


def warn(text: str) -> None:
    """Print something that the user should know, on stderr, where it spoils no piped output."""
    error_console.print(escape(printable(text)), style="yellow")
