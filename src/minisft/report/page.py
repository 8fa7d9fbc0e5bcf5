"""One self-contained page of a run: opens offline, asks nobody for anything, and shows foreign text as text."""

from pathlib import Path

from minisft.files import write_atomically
from minisft.report.html import whole_page
from minisft.report.page_data import page_data
from minisft.report.run_files import read_run
from minisft.report.sections import sections


def write_report(output: Path) -> Path:
    """Write `<output>/report.html` from what the run folder holds.

    Returns:
        The page's path.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    page = whole_page(output.resolve().name, "MiniSFT report", sections(run), page_data(run), "page.js")
    path = output / "report.html"
    write_atomically(path, page)
    return path
