"""A run's results as Markdown, for papers and README files: verdict, table, curves and examples."""

import re
from pathlib import Path
from typing import Any

from minisft.files import write_atomically
from minisft.report.plots import draw_curves
from minisft.report.run_data import RunFiles, metrics_of, page_data, read_run
from minisft.report.tables import markdown, score_table
from minisft.report.verdict import verdict
from minisft.text import printable

EXAMPLES = 3
_SHOWN = 300  # characters of a text
_ACTIVE = re.compile(r"([\\`*_\[\]<>#~&])")


def write_results(output: Path, to: Path | None = None) -> Path:
    """Write `results.md` of the run folder `output`, into it or into the folder `to`, and draw the curves in it.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    target = to or output
    drawn = draw_curves(output, to)
    parts = [f"# {as_text(output.resolve().name)}", as_text(verdict(run))]
    if run.results is not None:
        heads, rows = score_table(run)
        cells = [[f"**{as_text(row[0])}**" if best else as_text(row[0]), *row[1:]] for row, best in rows]
        parts.append(markdown(heads, cells).rstrip())
        if metrics_of(run):
            parts.append(f"constant: {as_text(repr(run.results['constant'].get('text', '')))}")
        parts += [
            f"{as_text(f['checkpoint'])} could not be scored: {as_text(f['error'])}" for f in run.results["failed"]
        ]
    parts += [f"![{path.stem}]({path.relative_to(target).as_posix()})" for path in drawn]
    parts += _examples(run)
    path = target / "results.md"
    write_atomically(path, printable("\n\n".join(parts) + "\n"))
    return path


def _examples(run: RunFiles) -> list[str]:
    """The first answers of base and best, side by side."""
    data = page_data(run)
    shown = [name for name in data["systems"] if name in ("base", data["best"])]
    rows = [_example(row, data["systems"], shown) for row in data["examples"][:EXAMPLES]]
    if not rows:
        return []
    return ["## Examples", markdown(["asked", *map(as_text, shown), "reference"], rows).rstrip()]


def _example(row: dict[str, Any], systems: list[str], shown: list[str]) -> list[str]:
    answers = [row["texts"][row["outputs"][systems.index(name)]] for name in shown]
    return [_short(row["prompt"][-_SHOWN:]), *map(_short, answers), _short(row["reference"] or "")]


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return as_text(flat if len(flat) <= _SHOWN else flat[:_SHOWN] + " ...")


def as_text(text: str) -> str:
    """Text that Markdown shows as it stands, and no renderer takes for HTML."""
    return _ACTIVE.sub(r"\\\1", text)
