"""The page of a search: a stub until the branch `study` is merged."""

from pathlib import Path


def write_search_page(output: Path) -> Path:
    """Return the path of the page of the search in a folder."""
    return output / "search.html"
