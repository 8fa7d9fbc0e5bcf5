"""A run's results as Markdown, for papers and README files: verdict, table, curves and examples."""

import re
from pathlib import Path

from minisft.files import write_atomically
from minisft.report.gains import evidence_notes, gain_tables
from minisft.report.judge_section import benchmark_tables, judge_tables
from minisft.report.plots import draw_curves
from minisft.report.run_data import metrics_of, page_data, read_run
from minisft.report.tables import markdown_table, score_table, test_set_tables
from minisft.report.verdict import verdict
from minisft.text import printable

EXAMPLES = 3
_EXCERPT = 300  # characters shown of a prompt (its end), an answer or a reference (their beginnings)
_ACTIVE = re.compile(r"([\\`*_\[\]<>#~&])")


def write_results(output: Path, to: Path | None = None) -> Path:
    """Write `results.md` of the run folder `output`, into it or into the folder `to`, and draw the curves in it.

    Returns:
        The path of `results.md`.

    Raises:
        UserError: The folder is not a run folder.
    """
    run = read_run(output)
    target = to or output
    curves = draw_curves(output, to)

    # 1. Verdict and scores.
    parts = [f"# {as_text(output.resolve().name)}", as_text(verdict(run))]
    if run.results is not None:
        heads, rows = score_table(run)
        cells = [[f"**{as_text(row[0])}**" if best else as_text(row[0]), *row[1:]] for row, best in rows]
        parts.append(markdown_table(heads, cells).rstrip())
        if metrics_of(run):
            parts.append(f"constant baseline: {as_text(repr(run.results['constant'].get('text', '')))}")
        for title, set_heads, set_rows in test_set_tables(run):
            set_cells = [[as_text(row[0]), *row[1:]] for row, _ in set_rows]
            parts += [as_text(title), markdown_table([as_text(head) for head in set_heads], set_cells).rstrip()]
        parts += [
            f"{as_text(f['checkpoint'])} could not be scored: {as_text(f['error'])}" for f in run.results["failed"]
        ]
        parts += [
            f"{as_text(f['metric'])} could not be computed: {as_text(f['error'])}"
            for f in run.results.get("failed_metrics", [])
        ]
        if gains := gain_tables(run):
            for title, (heads, rows_of_text) in gains.items():
                parts.append(f"## {title} by {as_text(str(run.results['best']))}")
                parts.append(_as_markdown(heads, rows_of_text) if rows_of_text else "nothing")
            parts.append(as_text(evidence_notes(run.results)))
        for section in (judge_tables(run.results), benchmark_tables(run.results)):
            if section is not None:
                parts += [f"## {section.title}", *(_as_markdown(heads, cells) for heads, cells in section.tables)]
                parts.append(as_text(section.notes))

    # 2. Links to the curves.
    parts += [f"![{path.stem}]({path.relative_to(target).as_posix()})" for path in curves]

    # 3. The first examples, with the answers of the base model and of the best checkpoint.
    data = page_data(run)
    shown = [(index, name) for index, name in enumerate(data["systems"]) if name in ("base", data["best"])]
    examples = []
    for example in data["examples"][:EXAMPLES]:
        answers = [example["texts"][example["outputs"][index]] for index, _ in shown]
        texts = [example["prompt"][-_EXCERPT:], *answers, example["reference"] or ""]
        lines = [" ".join(text.split()) for text in texts]
        examples.append([as_text(line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]} ...") for line in lines])
    if examples:
        names = [as_text(name) for _, name in shown]
        parts += ["## Examples", markdown_table(["prompt", *names, "reference"], examples).rstrip()]

    path = target / "results.md"
    write_atomically(path, printable("\n\n".join(parts) + "\n"))
    return path


def _as_markdown(heads: list[str], rows: list[list[str]]) -> str:
    return markdown_table([as_text(head) for head in heads], [[as_text(cell) for cell in row] for row in rows]).rstrip()


def as_text(text: str) -> str:
    """Escape the active characters of Markdown, so that no renderer reads text as markup or HTML."""
    return _ACTIVE.sub(r"\\\1", text)
