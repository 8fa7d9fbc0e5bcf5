"""Prepared data for programs: rows with ids, labels and text, coloured in a notebook."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minisft.data.inspect import InspectedRow

_SHOWN = 600  # tokens of a row in a notebook
# Underlined too, so that it shows without colours; two shades, so that the boundaries between tokens show.
_STYLES = {
    (True, 0): "background:#b7e4c7;color:#0b3d20;text-decoration:underline",
    (True, 1): "background:#95d5b2;color:#0b3d20;text-decoration:underline",
    (False, 0): "background:#f1f3f5;color:#343a40",
    (False, 1): "background:#e3e6ea;color:#343a40",
}


@dataclass(frozen=True)
class PreparedRow:
    """One prepared conversation.

    Args:
        id: Id of the conversation.
        ids: Token ids.
        labels: A label per token: its id where it is supervised, else -100; not shifted.
        text: All tokens decoded, special tokens included.
        messages: The {"role", "content", ...} dicts of a test row; None for a train row.
    """

    id: str
    ids: list[int]
    labels: list[int]
    text: str
    messages: list[dict[str, Any]] | None
    inspected: "InspectedRow" = field(repr=False, compare=False)

    def _repr_html_(self) -> str:
        row, parts = self.inspected, []
        for number, token in enumerate(row.tokens[:_SHOWN]):
            text = escape(token.text).replace("\n", "⏎\n")
            parts.append(f'<span style="{_STYLES[token.supervised, number % 2]}">{text}</span>')
        left_out = len(row.tokens) - _SHOWN
        more = f" ... and {left_out:,} more tokens" if left_out > 0 else ""
        return (
            f"<div><p><b>{escape(row.title)}</b><br>"
            "Green and underlined tokens are trained on, the rest is context.</p>"
            '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6">'
            f"{''.join(parts)}{more}</pre></div>"
        )


class PreparedRows(Sequence[PreparedRow]):
    """The rows of one split; each is read and decoded on access."""

    def __init__(self, data: Any, split: str, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._data, self._split, self._tokenizer = data, split, tokenizer

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, place: int) -> PreparedRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[PreparedRow]: ...
    def __getitem__(self, place: int | slice) -> PreparedRow | list[PreparedRow]:
        from minisft.data.inspect import read_row

        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(f"there is no row {place}: {self._split} has {len(self)}")
        row = self._data[number]
        return PreparedRow(
            row["id"],
            list(row["input_ids"]),
            list(row["labels"]),
            self._tokenizer.backend_tokenizer.decode(row["input_ids"], skip_special_tokens=False),
            row.get("messages"),
            read_row(self._data, self._split, number, self._tokenizer),
        )

    def __iter__(self) -> Iterator[PreparedRow]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} {self._split} rows>"


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a run folder.

    Args:
        folder: The run folder.
        trust_remote_code: Whether code of the model folder may run, which the tokenizer may need.
    """

    folder: Path
    trust_remote_code: bool = field(default=False, repr=False)

    @property
    def train(self) -> PreparedRows:
        """The rows to train on. Raises UserError where nothing is prepared."""
        return self._rows("train")

    @property
    def test(self) -> PreparedRows:
        """The held-out rows, each with its messages. Raises UserError where nothing is prepared."""
        return self._rows("test")

    @property
    def ledger(self) -> dict[str, Any]:
        """Counts of every row and token that was read: the content of dataset/ledger.json."""
        from minisft.files import read_json

        path = self.folder / "dataset" / "ledger.json"
        if not path.is_file():
            raise UserError(path, "there is no prepared data", "run `minisft prepare` on the recipe first")
        return read_json(path, f"delete {self.folder / 'dataset'} and prepare again", rows=dict)

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        from minisft.models import load_tokenizer, resolve_model
        from minisft.run_folder import load_run

        model = load_run(self.folder).model
        resolved = resolve_model(model, self.trust_remote_code, weights=False)
        return load_tokenizer(resolved.folder, self.trust_remote_code)

    def _rows(self, split: str) -> PreparedRows:
        from minisft.data.prepared import load_split

        return PreparedRows(load_split(self.folder, split), split, self._tokenizer)

    def _repr_html_(self) -> str:
        rows = self.ledger["rows"]
        counts = ", ".join(f"{escape(str(name))} {escape(str(count))}" for name, count in rows.items())
        return f"<p><b>{escape(str(self.folder))}</b>: rows: {counts}</p>"
