"""The fingerprint of a prepared data set: a hash of each thing that it depends on, and what has changed since."""

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
from minisft.models import MISTRAL_VERSION
from minisft.recipe import Recipe
from minisft.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Fingerprint = Mapping[str, Any]  # a hash for each thing that a data set depends on, by the thing's name
# Keys of the data recipe that do not change the rows; its seed is hashed as `data_seed`.
_FREE_KEYS = ("processes", "verify", "seed")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.py")
_NAMES = {
    "recipe": "the recipe's data keys",
    "template": "the template",
    "tokenizer": "the tokenizer",
    "tokenizer_files": "the tokenizer's files",
    "program": "the program",
}


def fingerprint(recipe: Recipe, sources: Mapping[str, Sequence[Source]], template: Path | None) -> dict[str, Any]:
    """Return a hash for each thing that a data set of this recipe depends on, except the tokenizer.

    Args:
        recipe: The recipe.
        sources: The sources of `data.source` and `data.test`; those of the hub with the revision that is read.
        template: The template's file, where the template is a file.

    Raises:
        UserError: A file cannot be read.
    """
    hashes = {}
    for source in (source for listed in sources.values() for source in listed):
        files = source_files(source)
        hashes[source.path] = _hash_files(files) if files else str(source.revision)
    folder = Path(__file__).parent
    code = _hash_files([(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.py"))])
    settings = {name: value for name, value in vars(recipe.data).items() if name not in _FREE_KEYS}
    return {
        "recipe": _hash_json([settings, recipe.data_seed]),
        "sources": hashes,
        "template": "" if template is None else _hash_files([("", template)]),
        "program": _hash_json([__version__, version("tokenizers"), version("transformers"), code]),
    }


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast", chat_template: str | None) -> str:
    """Return a hash of what the tokenizer does to a text, and of its own chat template where that is in use.

    Training sets a chat template, and calls set truncation and padding: neither makes it another tokenizer.
    """
    state = tokenizer.backend_tokenizer.to_str()
    lasting = state[max(state.find('"added_tokens":'), 0) :]  # before it are truncation and padding
    parts = [hashlib.sha256(lasting.encode()).hexdigest(), chat_template, tokenizer.special_tokens_map]
    if MISTRAL_VERSION in tokenizer.init_kwargs:  # `data.template: mistral` goes by it
        parts.append(tokenizer.init_kwargs[MISTRAL_VERSION])
    return _hash_json(parts)


def tokenizer_files_hash(folder: Path) -> str:
    """Return a hash of all files of a model folder that may define its tokenizer, without loading the tokenizer."""
    return hash_files(sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}))


def changes(ledger: Mapping[str, Any], origin: Fingerprint, begun: bool = False) -> list[str]:
    """Return the names of the things that have changed since a data set was prepared.

    Args:
        ledger: The ledger of the data set.
        origin: The fingerprint of what the data set would be prepared from now.
        begun: Whether training on it has begun. Another version of the program is then not a change, and the caller
            has compared the recipe with the run's.
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
    """Hold the lock that allows one preparation of a folder at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.parent / ".dataset.lock", patience=math.inf):
        remove_leftovers(folder)  # no other process prepares this folder while the lock is held
        yield


# --- hashes -----------------------------------------------------------------------------------------------


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


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
