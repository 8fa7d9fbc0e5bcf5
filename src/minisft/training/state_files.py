"""The pickles of a checkpoint, read as tensors, numbers and a few named classes: none of them can run anything.

A pickle is a program, and a run folder can come from a stranger. torch's `weights_only=True` reads tensors and plain
containers alone; what else these files hold is named in `strategies` (DeepSpeed's) and in transformers (numpy's).
"""

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

from minisft.errors import UserError

_CLASS = re.compile(r"GLOBAL ([\w.]+)")  # as torch names what it refuses


@contextlib.contextmanager
def refusing_code(checkpoint: Path) -> Iterator[None]:
    """Turn torch's refusal to read something else than plain state, inside the block, into one that says what to do.

    Raises:
        UserError: a file of the checkpoint holds an object that could run code, or is no whole pickle.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        named = _CLASS.search(str(error))
        what = (
            f"its training state holds objects that could run code ({named[1]}): none of it was run"
            if named
            else "its training state cannot be read as tensors and numbers: it is damaged, or holds objects that could "
            "run code, and none of it was run"
        )
        mend = "delete this checkpoint, and resume from an earlier one or train anew; do not trust where it came from"
        raise UserError(checkpoint, what, mend) from None
