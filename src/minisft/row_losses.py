"""The losses of all training rows at all steps: the file row_losses.bin of a run.

The file is a header of 12 bytes, and a record of 12 bytes for each row of each step, in the order of the steps: step
and row as unsigned integers of 32 bits and the loss as a float of 32 bits, all little-endian.
"""

import os
from pathlib import Path

import numpy as np

from minisft.errors import UserError
from minisft.manifest import record_files

HEADER = b"minisftrow1\n"
# step: optimizer step, from 1. row: number of the row in dataset/train. loss: mean loss of the row's supervised tokens,
# in nats, before the update of that step.
RECORD = np.dtype([("step", "<u4"), ("row", "<u4"), ("loss", "<f4")])
assert len(HEADER) == RECORD.itemsize


def make_records(step: int, rows: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the records of one step, (rows,) of `RECORD`."""
    records = np.empty(len(rows), dtype=RECORD)
    records["step"], records["row"], records["loss"] = step, rows, losses
    return records


def append_row_losses(path: Path, records: np.ndarray) -> None:
    """Append records of `RECORD` in one write; a new file gets its header."""
    with path.open("ab") as file:
        start = b"" if file.tell() else HEADER
        file.write(start + records.tobytes())


def sync_row_losses(path: Path) -> None:
    """Flush the file to the disk, so that a checkpoint that is complete after a power failure has its losses."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def truncate_row_losses(path: Path, step: int) -> None:
    """Drop the records after `step`, and an incomplete last one, so that a resumed run has each row and step once.

    A file that is not one of row losses is replaced: training writes it again from here.
    """
    record_files(path)
    if not path.exists():
        path.unlink(missing_ok=True)  # a dangling link: appending would create a file at its target
        return
    try:
        records = read_row_losses(path)
    except UserError:
        path.unlink()
        return
    kept = int(np.searchsorted(records["step"], step, side="right"))
    os.truncate(path, len(HEADER) + kept * RECORD.itemsize)


def read_row_losses(path: Path) -> np.ndarray:
    """Read the file: (records,) of `RECORD`, in the order of the steps.

    An incomplete last record is left out: the process that wrote it was killed, or is at work.

    Raises:
        UserError: There is no such file, or it is not one of row losses.
    """
    if not path.is_file():
        problem = "there are no losses of rows; runs of an earlier version of MiniSFT have none"
        raise UserError(path, problem, "train again with --force, or into another `output`")
    content = path.read_bytes()
    if content[: len(HEADER)] != HEADER:
        raise UserError(path, "this is not a file of row losses", "restore it from a copy, or train again with --force")
    count = (len(content) - len(HEADER)) // RECORD.itemsize
    records = np.frombuffer(content, dtype=RECORD, count=count, offset=len(HEADER))
    if (np.diff(records["step"].astype(np.int64)) < 0).any():
        fix = "restore it from a copy, or train again with --force"
        raise UserError(path, "this file is damaged (its steps are out of order)", fix)
    return records
