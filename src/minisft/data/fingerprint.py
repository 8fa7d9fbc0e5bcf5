"""The fingerprint of a prepared data set: what it was made from, and whether that is still the same."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.data.sources import Source, source_files
from minisft.errors import UserError
from minisft.files import hash_files, hold_lock, remove_leftovers
from minisft.recipe import Recipe
from minisft.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Fingerprint = Mapping[str, Any]  # a hash for each thing that a data set depends on, by the thing's name
_FREE_KEYS = ("processes", "verify")  # of the data recipe: they do not change the rows
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
_NAMES = {
    "recipe": "the recipe's data keys",
    "template": "the template",
    "tokenizer": "the tokenizer",
    "tokenizer_files": "the tokenizer's files",
    "program": "the program",
}


def fingerprint(recipe: Recipe, sources: Mapping[str, Sequence[Source]], template: Path | None) -> dict[str, Any]:
    """What a data set of this recipe is made from, but for the tokenizer: a hash for each part.

    Args:
        recipe: the recipe.
        sources: those of `data.source` and `data.test`; one of the hub with the revision that it is read at.
        template: the template's file, where it is one.

    Raises:
        UserError: a file cannot be read.
    """
    settings = {name: value for name, value in vars(recipe.data).items() if name not in _FREE_KEYS}
    return {
        "recipe": _hash_json([settings, recipe.seed]),
        "sources": {one.path: _source_hash(one) for listed in sources.values() for one in listed},
        "template": "" if template is None else _hash_files([("", template)]),
        "program": _program_version(),
    }


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast", chat_template: str | None) -> str:
    """A hash of what the tokenizer does to a text, and of its own chat template where that is the one in use.

    Training sets a chat template, and calls set truncation and padding: neither makes it another tokenizer.
    """
    state = tokenizer.backend_tokenizer.to_str()
    lasting = state[max(state.find('"added_tokens":'), 0) :]  # what stands before is truncation and padding
    parts = [hashlib.sha256(lasting.encode()).hexdigest(), chat_template, tokenizer.special_tokens_map]
    return _hash_json(parts)


def tokenizer_files_hash(folder: Path) -> str:
    """A hash of all files of a model folder that may say what its tokenizer is: known without loading it."""
    return hash_files(sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}))


def changes(ledger: Mapping[str, Any], origin: Fingerprint, begun: bool = False) -> list[str]:
    """Which parts of a data set's origin are others now, in words.

    Args:
        ledger: the data set's.
        origin: what it would be made from now.
        begun: training on it has begun. Then another version of the program is no reason to make it anew, and the
            recipe was compared with the run's before.
    """
    before, changed = ledger["made_from"], []
    for name, now in origin.items():
        if name == "sources":
            was = before["sources"]
            changed += [path for path in {**was, **now} if was.get(path) != now.get(path)]
        elif before.get(name) != now and not (begun and name in ("recipe", "program")):
            changed.append(_NAMES[name])
    return changed


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.parent / ".dataset.lock", patience=math.inf):
        remove_leftovers(folder)  # who holds the lock is the only one at work
        yield


# --- hashes -----------------------------------------------------------------------------------------------


def _source_hash(source: Source) -> str:
    files = source_files(source)
    return _hash_files(files) if files else str(source.revision)


def _hash_files(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0")
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(path, f"cannot be read ({error.strerror})", "check the file and its permissions") from None
    return digest.hexdigest()


def _program_version() -> str:
    """A hash of the code that prepares, and the versions of the libraries that it uses for it."""
    code = _hash_files([(path.name, path) for path in sorted(Path(__file__).parent.glob("*.py"))])
    return _hash_json([__version__, version("tokenizers"), version("transformers"), code])


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
