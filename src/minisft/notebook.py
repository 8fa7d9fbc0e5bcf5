"""A run in a notebook: verdict, curves and scores; all text is escaped, and there is no script."""

import base64
import tempfile
from html import escape
from pathlib import Path

from minisft.report.html import table
from minisft.report.plots import draw_curves
from minisft.report.run_data import read_run
from minisft.report.tables import score_table
from minisft.report.verdict import verdict


def run_as_html(root: Path) -> str:
    """Return a run as HTML for a notebook's output cell.

    Raises:
        UserError: A file of the run is damaged, or the folder is not a run.
    """
    run = read_run(root)
    with tempfile.TemporaryDirectory(prefix="minisft-") as folder:
        drawn = [(path.stem, path.read_bytes()) for path in draw_curves(root, Path(folder))]
    images = "".join(
        f'<img alt="{escape(name)}" style="max-width:32em;width:100%" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in drawn
    )
    scores = table(*score_table(run)) if run.results else ""
    scores = scores.replace("<tr class=best>", '<tr style="font-weight:bold">')  # there is no style sheet here
    return (
        f"<div><p><b>{escape(str(root))}</b></p><p>{escape(verdict(run))}</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:1em">{images}</div>'
        f'<div style="overflow-x:auto">{scores}</div></div>'
    )
