"""Show prepared rows: tokens coloured by whether they are supervised, in the terminal or as one HTML page."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.console import console, say
from minisft.data.preparation import prepare
from minisft.data.prepared import load_split, load_train
from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder
from minisft.text import printable

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast


WORST = ("length", "cut", "share")
ROWS = 3  # rows of the preview
TOKENS = 600  # tokens of a row of the preview
PAGE = Path(__file__).with_name("inspect.html")
# Two shades each, in turn, so that the boundaries between tokens show.
_SUPERVISED = ("black on green3", "black on spring_green2")
_CONTEXT = ("default on grey15", "default on grey23")


@dataclass(frozen=True)
class Token:
    """One token: its id, its text, whether it is supervised, whether it is a special token."""

    id: int
    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True)
class InspectedRow:
    """A prepared row to look at.

    Args:
        split: train or test.
        row: Number of the row in its split.
        id: Id of the conversation.
        location: Place of the row in the source, such as "file:line".
        rendered: Number of tokens of the full rendering, of which the row may keep fewer.
        findings: Names of what the template or the tokenizer changed.
        tokens: The tokens in order.
        answer: Number of the one answer that the row teaches; None where the row is a complete conversation.
    """

    split: str
    row: int
    id: str
    location: str
    rendered: int
    findings: tuple[str, ...]
    tokens: tuple[Token, ...]
    answer: int | None = None

    @property
    def title(self) -> str:
        supervised = sum(token.supervised for token in self.tokens)
        findings = f"; {', '.join(self.findings)}" if self.findings else ""
        cut = f" of {self.rendered:,}" if self.rendered > len(self.tokens) else ""
        answer = f", answer {self.answer}" if self.answer is not None else ""
        return (
            f"{self.split} row {self.row}, id {self.id}{answer}, {self.location}: {len(self.tokens):,}{cut} tokens, "
            f"{supervised:,} supervised{findings}"
        )


def inspect(
    recipe: Recipe,
    *,
    split: str = "train",
    rows: Sequence[int] = (),
    ids: Sequence[str] = (),
    worst: str | None = None,
    only_findings: bool = False,
    count: int = 3,
    html: Path | None = None,
) -> list[InspectedRow]:
    """Show rows of the recipe's data, which are prepared where they are not yet; model weights are not loaded.

    Args:
        recipe: The recipe.
        split: train or test.
        rows: Numbers of the rows to show.
        ids: Ids of the conversations to show, where no rows are given.
        worst: One of WORST: show first the rows with the greatest length, the most tokens cut or the smallest
            supervised share. None shows the first rows.
        only_findings: Leave out rows without findings.
        count: The number of rows, where neither rows nor ids are given.
        html: Path of one self-contained page to write instead of printing.

    Raises:
        UserError: There is no such row or id, or the page cannot be written.
    """
    if html is not None:
        _require_page(html)
    model = resolve_model(recipe.model, recipe.trust_remote_code, weights=False)
    tokenizer = load_tokenizer(model.folder, recipe.trust_remote_code)
    prepare(recipe, tokenizer, begun=RunFolder(Path(recipe.output)).has_begun())
    data = load_split(recipe.output, split)
    chosen = choose_rows(data, rows, ids, worst, only_findings, count)
    shown = [read_row(data, split, row, tokenizer) for row in chosen]
    if html is None:
        for row in shown:
            console.print(as_text(row))
    else:
        with _name_the_page(html):
            write_atomically(html, as_html(shown))
        say(f"{len(shown)} rows are in {html}")
    return shown


def _require_page(path: Path) -> None:
    """Refuse to replace anything but an earlier page, before the rows are prepared.

    Raises:
        UserError: The path is a folder, or another file.
    """
    start = PAGE.read_bytes().partition(b"<style>")[0]
    with _name_the_page(path):
        is_folder, is_other = path.is_dir(), path.exists()
        if path.is_file():
            with path.open("rb") as file:
                is_other = file.read(len(start)) != start
    if is_folder:
        raise UserError(path, "this is a folder, and the page is a file", f"name a file, such as {path / 'rows.html'}")
    if is_other:
        problem = "this file is not a page that inspect wrote, so it is not replaced"
        raise UserError(path, problem, "name a new file, such as rows.html")


@contextlib.contextmanager
def _name_the_page(path: Path) -> Iterator[None]:
    """Name the page in errors of the file system, such as no permission, too long a name, or a path below a file."""
    try:
        yield
    except OSError as error:
        problem = f"the page cannot be written there ({error.strerror})"
        raise UserError(path, problem, "name a file in a folder that you may write to") from None


def choose_rows(
    data: Any,
    rows: Sequence[int] = (),
    ids: Sequence[str] = (),
    worst: str | None = None,
    only_findings: bool = False,
    count: int = 3,
) -> list[int]:
    """Return the numbers of the rows of a split that `inspect` shows; the arguments are those of `inspect`.

    Raises:
        UserError: There is no such row, id or measure.
    """
    for row in rows:
        if not 0 <= row < len(data):
            raise UserError("row", f"there is no row {row}", f"give a number from 0 to {len(data) - 1}")
    if rows:
        return list(rows)
    if ids:
        known = data["id"][:]
        for name in ids:
            if name not in known:
                fix = f"give an id such as {known[0] if known else '?'}"
                raise UserError("id", f"there is no conversation {name!r}", fix)
        return [place for name in ids for place, other in enumerate(known) if other == name]
    order = list(range(len(data)))
    if worst is not None:
        if worst not in WORST:
            raise UserError("worst", f"{worst!r} is not a measure", f"choose among {', '.join(WORST)}")
        lengths = np.array([len(row_ids) for row_ids in data["input_ids"]])
        measure = lengths
        if worst == "cut":
            measure = np.array(data["rendered"][:]) - lengths
        elif worst == "share":
            supervised = np.array([sum(label >= 0 for label in labels) for labels in data["labels"]])
            measure = -supervised / np.maximum(lengths, 1)
        order = [int(row) for row in np.argsort(-measure, kind="stable")]
    if only_findings:
        findings = data["findings"][:]
        order = [row for row in order if findings[row]]
    return order[:count]


def read_row(data: Any, split: str, number: int, tokenizer: "PreTrainedTokenizerFast") -> InspectedRow:
    """Return one row of a split with the texts of its tokens."""
    row = data[number]
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    texts = token_texts(row["input_ids"], tokenizer)
    tokens = tuple(
        Token(id, text, label >= 0, id in special)
        for id, text, label in zip(row["input_ids"], texts, row["labels"], strict=True)
    )
    findings = tuple(name for name in row["findings"].split(",") if name)
    answer = row.get("answer")
    return InspectedRow(split, number, row["id"], row["location"], row["rendered"], findings, tokens, answer)


def token_texts(ids: Sequence[int], tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the text of each token; a part of a character is shown as the token's piece in the vocabulary."""
    backend = tokenizer.backend_tokenizer
    texts = []
    for id in ids:
        piece = backend.id_to_token(id) or ""
        text = backend.decode([id], skip_special_tokens=False)
        if piece.startswith("▁") and not text.startswith(" "):
            text = " " + text  # the decoder strips a space at the start, and every token is a start here
        texts.append(piece if "\ufffd" in text or not text else text)
    return texts


def as_text(row: InspectedRow) -> "Text":
    """Return a row with colours for the terminal."""
    from rich.text import Text

    text = Text(printable(row.title) + "\n", style="bold")
    for place, token in enumerate(row.tokens):
        style = (_SUPERVISED if token.supervised else _CONTEXT)[place % 2]
        shown = printable(token.text).replace("\n", "⏎\n")
        text.append(shown, style=f"{style} bold underline" if token.special else style)
    text.append("\n")
    return text


def as_html(rows: Sequence[InspectedRow]) -> str:
    """Return one self-contained page with search, next and previous, and a filter for rows with findings."""
    listed = [
        {**asdict(row), "tokens": [[t.id, t.text, int(t.supervised), int(t.special)] for t in row.tokens]}
        for row in rows
    ]
    data = json.dumps(listed, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return PAGE.read_text(encoding="utf-8").replace("/*ROWS*/[]", data)


def write_preview(output: Path, model_folder: Path, trust_remote_code: bool = False) -> Path:
    """Write `<output>/dataset/preview.json` unless it exists: the beginnings of the first train rows.

    The file is {"rows": [{"title", "tokens": [[text, 1 if supervised else 0], ...], "left_out"}]}; `left_out` counts
    the tokens after the beginning.

    Args:
        output: A run folder with prepared data.
        model_folder: Folder of the model, with the tokenizer of the prepared data.
        trust_remote_code: Whether code from that folder may run.

    Returns:
        Path of the file.
    """
    path = output / "dataset" / "preview.json"
    if path.exists():  # new data comes in a new folder
        return path
    tokenizer = load_tokenizer(model_folder, trust_remote_code)
    data = load_train(output)
    rows = [read_row(data, "train", number, tokenizer) for number in range(min(ROWS, len(data)))]
    listed = [
        {
            "title": row.title,
            "tokens": [[token.text, int(token.supervised)] for token in row.tokens[:TOKENS]],
            "left_out": max(0, len(row.tokens) - TOKENS),
        }
        for row in rows
    ]
    write_atomically(path, json.dumps({"rows": listed}, ensure_ascii=False) + "\n")
    return path
