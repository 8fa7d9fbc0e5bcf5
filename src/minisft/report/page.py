"""One self-contained page of a run: opens offline, asks nobody for anything, and shows foreign text as text."""

from pathlib import Path

from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.report.html import whole_page
from minisft.report.page_data import page_data
from minisft.report.run_files import read_run
from minisft.report.sections import sections

_KIND = "MiniSFT report"
_WRITTEN = ("report.html", "results.md", "evaluation")  # what a report consists of


def require_target(folder: Path) -> None:
    """Refuse to write a report into a folder that holds anything but an earlier report.

    Raises:
        UserError: naming what it holds.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(folder, "this is a file, and a report is written into a folder", "name a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _WRITTEN)
    if others or (any(folder.iterdir()) and not _is_report(folder / _WRITTEN[0])):
        holds = f" (it holds {others[0]!r})" if others else ""
        raise UserError(folder, f"this folder holds something else than a report{holds}", "name a new or empty folder")


def _is_report(path: Path) -> bool:
    return path.is_file() and f"{_KIND}</title>".encode() in path.read_bytes()[:4096]


def write_report(output: Path, to: Path | None = None) -> Path:
    """Write `report.html` from what the run folder `output` holds, into it or into the folder `to`.

    Returns:
        The page's path.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    page = whole_page(output.resolve().name, _KIND, sections(run), page_data(run), "page.js")
    path = (to or output) / "report.html"
    write_atomically(path, page)
    return path
