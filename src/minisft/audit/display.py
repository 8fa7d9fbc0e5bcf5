"""Print the results of `why`: tables, and the tokens of rows, coloured by loss or by what they share.

Without a terminal the text is plain; with NO_COLOR set, without colours.
"""

import math
from collections.abc import Sequence

from rich.text import Text

from minisft.audit.findings import Findings
from minisft.audit.similar_rows import SimilarRows
from minisft.audit.step_rows import ReportedToken, RowReport, StepReport
from minisft.console import console, say
from minisft.text import printable

SHOWN_ROWS = 3  # whose tokens are shown
SHOWN_TOKENS = 400  # of a row
LISTED = 10  # rows of a table
_WORST_TOKENS = 5
# Upper bounds of a token's loss in nats, and the style below each.
_STYLES = (
    (0.5, "black on green3"),
    (1.5, "black on green_yellow"),
    (3.0, "black on yellow1"),
    (6.0, "black on orange1"),
    (math.inf, "bold white on red3"),
)
_CONTEXT = "dim"
_SHARED = "black on green3"


def show_step(found: StepReport) -> None:
    """Print a replayed step: its loss, its rows, and the tokens of the worst rows."""
    logged = "not logged" if found.logged is None else f"{found.logged:.6g} logged"
    same = "the same bits" if found.replayed else "NOT the same bits"
    say(f"step {found.step}: loss {found.loss:.6g} replayed, {logged}: {same}")
    if found.loss_without_worst is not None:
        worst = found.rows[0]
        say(f"without {worst.id} ({worst.location}) the loss is {found.loss_without_worst:.6g}")
    _show_table(found.rows)
    for row in found.rows[:SHOWN_ROWS]:
        say()
        say(f"{row.id}, {row.location}", style="bold")
        worst_tokens = sorted(
            (token for token in row.tokens if token.loss is not None), key=lambda token: -(token.loss or 0.0)
        )
        named = ", ".join(f"{token.text!r} {token.loss:.2f}" for token in worst_tokens[:_WORST_TOKENS])
        say(f"highest losses: {named}")
        console.print(tokens_text(row.tokens))
    if len(found.rows) and console.is_terminal and not console.no_color:
        say("\ncolours: loss of a token in nats, from green (below 0.5) to red (6 and more); context is dim")


def show_similar(found: SimilarRows) -> None:
    """Print the training rows nearest to a row."""
    counted = f", with the answer of {found.answered_by}" if found.answered_by else ""
    say(f"training rows that share the most pieces with {found.split} row {found.id}{counted}:")
    if not found.rows:
        say("  none shares a piece of three tokens")
    _show_table(found.rows)
    for row in found.rows[:SHOWN_ROWS]:
        say()
        say(f"{row.id}, {row.location}", style="bold")
        console.print(tokens_text(row.tokens))
    say("\nnote: shared pieces are not proof that a row taught the answer; gradients are not compared")


def show_findings(found: Findings) -> None:
    """Print the rows that the losses make suspicious."""
    say(f"highest last loss in excess of the median of its time, after {found.epochs} complete epochs:")
    _show_table(found.hardest)
    for title, rows in (
        ("the loss never fell", found.never_falls),
        ("the loss was next to nothing at first or second sight", found.learned_at_once),
    ):
        say(f"\n{title}: {len(rows) or 'no'} rows")
        _show_table(rows)
    say(f"\ndifferent answers to the same prompt: {len(found.contradictions) or 'no'} prompts")
    for group in found.contradictions[:LISTED]:
        say("  " + "; ".join(f"{row.id} ({row.location})" for row in group.rows))


def tokens_text(tokens: Sequence[ReportedToken]) -> Text:
    """Return the tokens with colours: by loss where they are supervised, else by whether they are shared."""
    text = Text()
    for token in tokens[:SHOWN_TOKENS]:
        text.append(printable(token.text).replace("\n", "⏎\n"), style=_style(token))
    if len(tokens) > SHOWN_TOKENS:
        text.append(f" ... and {len(tokens) - SHOWN_TOKENS:,} more tokens")
    return text


def _style(token: ReportedToken) -> str:
    if token.shared:
        return _SHARED
    if token.loss is None:
        return _CONTEXT
    return next((style for bound, style in _STYLES if token.loss < bound), _STYLES[-1][1])


def _show_table(rows: Sequence[RowReport]) -> None:
    if not rows:
        return
    columns = {"shared": "similarity", "excess": "excess", "grad norm": "grad_norm"}
    head, field = next((pair for pair in columns.items() if getattr(rows[0], pair[1]) is not None), ("", "grad_norm"))
    say(f"  {'loss':>9} {head:>9} {'tokens':>7}  id, location")
    for row in rows[:LISTED]:
        say(f"  {_number(row.loss):>9} {_number(getattr(row, field)):>9} {row.supervised:>7}  {row.id}, {row.location}")
    if len(rows) > LISTED:
        say(f"  and {len(rows) - LISTED} more")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
