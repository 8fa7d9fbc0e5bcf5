"""A prepared data set, read from the run folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.text import first_line

if TYPE_CHECKING:
    pass


def load_train(output: Path | str) -> Any:
    """The `datasets.Dataset` of train rows of a run."""
    return load_split(output, "train")


def load_test(output: Path | str) -> list[dict[str, Any]]:
    """The test rows of a run, each with its `messages` and `tools`."""
    return list(load_split(output, "test"))


def load_split(output: Path | str, split: str) -> Any:
    """One side of a run's prepared data, "train" or "test", as a `datasets.Dataset`.

    Raises:
        UserError: it is not prepared, or its files are damaged.
    """
    import datasets

    folder = Path(output) / "dataset" / split
    if not folder.is_dir():
        raise UserError(folder, "there is no prepared data", "run `minisft prepare` on the recipe first")
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged file shows as anything, from KeyError to Arrow's own errors
        raise _damaged(folder, f"{type(error).__name__}: {first_line(error)}") from None
    ledger = read_ledger(folder.parent)
    if ledger is not None and len(data) != ledger["rows"][split]:  # an Arrow stream may end after any batch
        raise _damaged(folder, f"it holds {len(data):,} rows, and ledger.json says {ledger['rows'][split]:,}")
    return data


def _damaged(folder: Path, reason: str) -> UserError:
    fix = f"delete {folder.parent} and run `minisft inspect {folder.parent.parent}`, which prepares the data again"
    return UserError(folder, f"the prepared data are damaged ({reason})", fix)


def read_ledger(folder: Path) -> dict[str, Any] | None:
    """The ledger of a whole data set, or None where there is none (or one of unknown origin)."""
    try:
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (folder / "train").is_dir() and (folder / "test").is_dir()
    return ledger if whole and isinstance(ledger, dict) and "made_from" in ledger else None
