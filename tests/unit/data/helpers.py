"""Files of rows and their preparation on a toy tokenizer."""

import json
from pathlib import Path

from minisft.data.preparation import Prepared, prepare
from minisft.recipe import DataRecipe, Recipe


def talk(*texts, system=None, **extra):
    """A ShareGPT row whose turns alternate from the user's."""
    turns = [] if system is None else [{"from": "system", "value": system}]
    turns += [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **extra}


def many(count, start=0):
    return [talk(f"Question number {i}?", f"Answer number {i}.") for i in range(start, start + count)]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_source(source, output, tokenizer, begun=False, encoder=None, **data) -> Prepared:
    data = {"template": "chatml", **data}
    source = str(source) if isinstance(source, Path) else source
    recipe = Recipe(model="toy", output=str(output), data=DataRecipe(source=source, **data))
    return prepare(recipe, tokenizer, begun=begun, encoder=encoder)
