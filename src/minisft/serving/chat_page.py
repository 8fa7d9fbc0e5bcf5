"""The chat page of `minisft serve`: one document that loads nothing, and shows what a model wrote as text."""

from functools import cache
from importlib.resources import files

_FOLDER = "minisft.serving"


def page_policy(nonce: str) -> str:
    """Return the Content-Security-Policy under which the page works.

    The browser runs only the script and the styles that carry the nonce, sends requests to this server only, and shows
    the page in no frame, whatever a model has written.

    Args:
        nonce: A random text that is new for every answer of the server.
    """
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_html(nonce: str, title: str = "MiniSFT", preferences: bool = True) -> str:
    """Return the chat page as one HTML document.

    Args:
        nonce: The nonce of `page_policy`.
        title: Name of the run or model, for the heading.
        preferences: Show the thumbs, whose clicks are sent to `/preferences`.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(_resource("chat.html.j2"))
    css, js = Markup(_resource("chat.css")), Markup(_resource("chat.js"))
    return template.render(nonce=nonce, title=title, preferences=preferences, css=css, js=js)


@cache
def _resource(name: str) -> str:
    return (files(_FOLDER) / name).read_text(encoding="utf-8")
