"""A prepared data set, read from the run folder."""

import json
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.text import first_line


def load_train(output: Path | str) -> Any:
    """Return the train rows of a run as a `datasets.Dataset`."""
    return load_split(output, "train")


def load_test(output: Path | str) -> list[dict[str, Any]]:
    """Return the test rows of a run, each with its `messages` and `tools`."""
    return list(load_split(output, "test"))


def load_split(output: Path | str, split: str) -> Any:
    """Return one split of a run's prepared data, "train" or "test", as a `datasets.Dataset`.

    Raises:
        UserError: The data are not prepared, or their files are damaged.
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
    if ledger is None:
        return data
    expected = ledger.get("unrolled", ledger)["rows"][split]
    if len(data) != expected:  # an Arrow stream may end after any batch
        raise _damaged(folder, f"it holds {len(data):,} rows, and ledger.json says {expected:,}")
    return data


def _damaged(folder: Path, reason: str) -> UserError:
    fix = f"delete {folder.parent} and run `minisft inspect {folder.parent.parent}`, which prepares the data again"
    return UserError(folder, f"the prepared data are damaged ({reason})", fix)


def read_ledger(folder: Path) -> dict[str, Any] | None:
    """Return the ledger of a complete data set; None where there is no such data set, or its origin is unknown."""
    try:
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = (folder / "train").is_dir() and (folder / "test").is_dir()
    return ledger if complete and isinstance(ledger, dict) and "made_from" in ledger else None
