"""The chat page."""


def page_html() -> str:
    """Return the page at / as HTML."""
    return "<!doctype html><html lang=en><meta charset=utf-8><title>MiniSFT</title><h1>MiniSFT</h1></html>"
