"""A few rows with their tokens and what is learned of them, as a file that needs no tokenizer to be shown."""

import json
from pathlib import Path

from minisft.data.inspect import read_row
from minisft.data.preparation import load_train
from minisft.files import write_atomically
from minisft.models import load_tokenizer

ROWS = 3
TOKENS = 600  # of a row


def write_preview(output: Path, model_folder: Path, trust_remote_code: bool = False) -> Path:
    """Write `<output>/dataset/preview.json` where it is not yet there: the first train rows, the beginning of each.

    The file is {"rows": [{"title", "tokens": [[text, 1 if supervised else 0], ...], "left_out"}]}; `left_out` counts
    the tokens past the beginning.

    Args:
        output: a run folder whose data is prepared.
        model_folder: with the tokenizer that it was prepared with.
        trust_remote_code: let code from that folder run.
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
