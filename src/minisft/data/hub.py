"""Data sets of the Hugging Face hub."""

import re
from collections.abc import Iterator

from minisft.data.readers import Chunk, row_chunks, with_lists
from minisft.errors import UserError

_TIMEOUT = 5.0  # seconds
_COMMIT = re.compile(r"[0-9a-f]{40}")


def newest_revision(path: str, revision: str | None) -> str | None:
    """The commit that a branch or tag (None: the main one) of a data set stands at; None where the hub says nothing."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(path, revision=revision, timeout=_TIMEOUT).sha
    except Exception:  # no answer, whatever its kind: reading the data set says why
        return None


def read_hub(path: str, split: str, subset: str | None, revision: str | None, index: int) -> Iterator[Chunk]:
    """The rows of a data set of the hub, streamed, as chunks of the source `index`.

    Raises:
        UserError: the hub does not give it.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True)
        numbered = ((f"{split}:{i}", with_lists(row)) for i, row in enumerate(rows))
        yield from row_chunks(numbered, path, index)
    except Exception as error:  # the hub client raises many kinds; for the user each means the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            path,
            f"there is no such file, and the hub does not give a data set of that name ({reason})",
            "check the path, or the hub id, split and subset, and the connection",
        ) from None
