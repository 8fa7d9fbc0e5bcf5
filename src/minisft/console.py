"""What the commands print. Text that is not ours is never taken for markup, as `[/INST]` would be, or for a control."""

from rich.console import Console
from rich.markup import escape

from minisft.text import printable

console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str = "", style: str | None = None) -> None:
    """Print one message on stdout, as it stands."""
    console.print(escape(printable(text)), style=style)


def warn(text: str) -> None:
    """Print something that the user should know, on stderr, where it spoils no piped output."""
    error_console.print(escape(printable(text)), style="yellow")
