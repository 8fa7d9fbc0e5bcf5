"""Contamination: test rows that the train rows nearly hold, benchmarks in the data, and the scores without them.

Near-duplicates are found by MinHash, shared passages by n-grams of words (`data/near_duplicates.py`,
`data/ngram_overlap.py`). Everything is read from the prepared rows: what the model was trained on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say, waiting
from minisft.data.encoder import IGNORED
from minisft.data.near_duplicates import SIMILAR, NearDuplicateFinder
from minisft.data.ngram_overlap import NGRAM, SHORTEST, Overlap, find_overlaps
from minisft.data.prepared import load_split
from minisft.data.sources import Source, read_source
from minisft.errors import UserError
from minisft.evaluation.metrics import CorpusScore
from minisft.files import read_json_lines, write_atomically
from minisft.metric_names import METRIC_NAMES
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import METRICS, Recipe
from minisft.results import read_results
from minisft.text import dump_json

COMMON = 10  # an n-gram of a test answer in more train rows is a common phrase (GPT-3, appendix C)
_BATCH = 256  # rows that are decoded together
_SHOWN = 5  # rows of each kind that are printed; contamination.json has all


@dataclass(frozen=True)
class _Row:
    """A prepared row as text: all of it without the beginning that every test row has, and its answers."""

    id: str
    location: str
    text: str
    answers: list[str]


def measure_contamination(recipe: Recipe, output: Path, against: Sequence[Path] = ()) -> dict[str, Any]:
    """Compare the test rows with the train rows, and files of the user's own with both; write contamination.json.

    Args:
        recipe: The run's recipe.
        output: The run folder, whose data are prepared; if it is evaluated, its scores are computed without the
            contaminated rows too.
        against: Files of benchmarks or other texts: .txt with an item in each line, or one of the types of
            `data.source`, whose items are all texts of a row.

    Returns:
        The content of `<output>/evaluation/contamination.json`.

    Raises:
        UserError: The data are not prepared, or a file cannot be read.
    """
    items = {str(path): list(_read_items(path)) for path in against}
    with waiting("reading the prepared rows"):
        tokenizer = load_tokenizer(
            resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder, recipe.trust_remote_code
        )
        splits = {split: load_split(output, split) for split in ("train", "test")}
        beginning = _common_beginning(splits["test"])
        rows = {split: list(_rows(data, tokenizer, beginning)) for split, data in splits.items()}
    with waiting("comparing the rows"):
        test = _compare_test(rows["train"], rows["test"])
        files = [_compare_file(name, found, rows) for name, found in items.items()]
    contaminated = {row["id"] for row in test["rows"]}
    result = {
        "rows": {split: len(found) for split, found in rows.items()},
        "similarity": SIMILAR,
        "ngram": NGRAM,
        "test": test,
        "against": files,
        "scores": _scores_without(output, contaminated),
    }
    write_atomically(output / "evaluation" / "contamination.json", dump_json(result, indent=1) + "\n")
    return result


def print_contamination(result: Mapping[str, Any]) -> None:
    """Print what was found, with the first rows of each kind, and the scores without the contaminated rows."""
    test, counts = result["test"], result["rows"]
    say(
        f"{test['contaminated']:,} of {counts['test']:,} test rows are contaminated by {counts['train']:,} train rows: "
        f"{test['near_duplicates']:,} are near-duplicates (similarity {SIMILAR} or more), {test['overlapping']:,} have "
        f"{NGRAM} words in a row of an answer in common with a train row; {test['too_short']:,} have answers below "
        f"{SHORTEST} words and are only compared as rows"
    )
    for row in test["rows"][:_SHOWN]:
        parts = []
        if row["near_duplicate_of"] is not None:
            parts.append(f"similarity {row['similarity']:.2f} to {row['near_duplicate_of']}")
        if row["overlaps"] is not None:
            parts.append(f"{row['share']:.0%} of its answers are in {row['overlaps']}: {row['passage']!r}")
        say(f"  {row['id']} ({row['location']}): {'; '.join(parts)}")
    _say_more(len(test["rows"]))
    for file in result["against"]:
        found = file["found"]
        say(
            f"{file['file']}: {file['in_train']:,} of {file['items']:,} items share {NGRAM} words in a row with a "
            f"train row, {file['in_test']:,} with a test row; {file['too_short']:,} are too short to be judged"
        )
        for one in found[:_SHOWN]:
            place = f"{one['split']} row {one['row']}"
            say(f"  {one['location']}: {one['share']:.0%} of it is in {place}: {one['passage']!r}")
        _say_more(len(found))
    if result["scores"]:
        _print_scores(result["scores"])


def _say_more(count: int) -> None:
    if count > _SHOWN:
        say(f"  and {count - _SHOWN:,} more, in evaluation/contamination.json")


def _print_scores(scores: Sequence[Mapping[str, Any]]) -> None:
    metrics = [metric for metric in METRIC_NAMES if metric in scores[0]]
    answers, clean = scores[0]["answers"], scores[0]["clean_answers"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for metric in metrics:
        table.add_column(f"{METRIC_NAMES[metric]}, all {answers:,}", justify="right")
        table.add_column(f"without, {clean:,}", justify="right")
    for entry in scores:
        cells = [
            "" if entry[metric][kind] is None else f"{entry[metric][kind]:.1f}"
            for metric in metrics
            for kind in ("all", "clean")
        ]
        table.add_row(Text(entry["model"]), *cells)
    console.print(table)


# --- reading ------------------------------------------------------------------------------------------------------


def _read_items(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (location, texts) of each item of a file."""
    if not path.exists():  # `read_source` would take some names for data sets of the hub
        raise UserError(path, "there is no such file", "give the path of a file")
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(path, f"the file cannot be read ({error})", "give a text file in UTF-8") from None
        yield from ((f"{path.name}:{number}", [line]) for number, line in enumerate(lines, 1) if line.strip())
        return
    for chunk in read_source(Source(str(path)), 0):
        for location, row in chunk.parsed():
            if isinstance(row, ValueError):
                raise UserError(location, f"this row cannot be read ({row})", "correct or remove it")
            yield location, list(_texts_in(row))


def _texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a row, however it is nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _common_beginning(data: Any) -> int:
    """Return the number of tokens with which all rows begin, such as a system prompt: they make no rows similar."""
    if len(data) < 2:
        return 0
    common = list(data[0]["input_ids"])
    for ids in data["input_ids"]:
        length = next((n for n, (a, b) in enumerate(zip(common, ids, strict=False)) if a != b), len(ids))
        common = common[:length]
    return len(common)


def _rows(data: Any, tokenizer: Any, beginning: int) -> Iterator[_Row]:
    decode = tokenizer.backend_tokenizer.decode_batch
    for start in range(0, len(data), _BATCH):
        part = data[start : start + _BATCH]
        texts = decode([list(ids)[beginning:] for ids in part["input_ids"]], skip_special_tokens=True)
        spans = [list(_answer_spans(labels)) for labels in part["labels"]]
        answers = iter(decode([span for row in spans for span in row], skip_special_tokens=True))
        for place, text in enumerate(texts):
            number = start + place
            location = str(part["location"][place]) if "location" in part else f"row {number}"
            yield _Row(str(part["id"][place]), location, text, [next(answers) for _ in spans[place]])


def _answer_spans(labels: Sequence[int]) -> Iterator[list[int]]:
    """Yield the supervised ids of each answer."""
    span: list[int] = []
    for label in (*labels, IGNORED):
        if label != IGNORED:
            span.append(label)
        elif span:
            yield span
            span = []


# --- comparing ----------------------------------------------------------------------------------------------------


def _compare_test(train: Sequence[_Row], test: Sequence[_Row]) -> dict[str, Any]:
    finder = NearDuplicateFinder()
    for row in (*train, *test):
        finder.add(row.text)
    nearest, similarity = finder.nearest(len(train))
    overlaps = find_overlaps([row.answers for row in test], (row.text for row in train), COMMON)
    rows = [
        {
            "id": row.id,
            "location": row.location,
            "near_duplicate_of": None if number < 0 else train[number].id,
            "similarity": round(float(similar), 4),
            "overlaps": None if overlap.text is None else train[overlap.text].id,
            "share": round(overlap.share, 4),
            "passage": overlap.passage,
        }
        for row, number, similar, overlap in zip(test, nearest, similarity, overlaps, strict=True)
        if number >= 0 or overlap.text is not None
    ]
    return {
        "near_duplicates": int((nearest >= 0).sum()),
        "overlapping": sum(overlap.text is not None for overlap in overlaps),
        "too_short": sum(overlap.is_too_short for overlap in overlaps),
        "contaminated": len(rows),
        "rows": rows,
    }


def _compare_file(
    name: str, items: Sequence[tuple[str, list[str]]], rows: Mapping[str, Sequence[_Row]]
) -> dict[str, Any]:
    texts = [text for _, text in items]
    overlaps = {split: find_overlaps(texts, (row.text for row in found)) for split, found in rows.items()}
    found = [
        {
            "location": location,
            "split": split,
            "row": rows[split][overlap.text].id,
            "share": round(overlap.share, 4),
            "passage": overlap.passage,
        }
        for split, of_split in overlaps.items()
        for (location, _), overlap in zip(items, of_split, strict=True)
        if overlap.text is not None
    ]

    def count(wanted: Iterable[Overlap]) -> int:
        return sum(overlap.text is not None for overlap in wanted)

    return {
        "file": name,
        "items": len(items),
        "too_short": sum(overlap.is_too_short for overlap in overlaps["train"]),
        "in_train": count(overlaps["train"]),
        "in_test": count(overlaps["test"]),
        "found": found,
    }


def _scores_without(output: Path, contaminated: set[str]) -> list[dict[str, Any]]:
    """Return the scores of each model on all answers and on those of the other rows; [] where nothing is scored."""
    results = read_results(output)
    if results is None or not contaminated:
        return []
    fix = f"run `minisft evaluate {output}`, which writes it again: no answer is computed twice"
    scores = []
    for name in ("base", *(entry["checkpoint"] for entry in results["checkpoints"])):
        lines = read_json_lines(output / "evaluation" / name / "outputs.jsonl", fix, id=str, output=str, reference=str)
        clean = [line for line in lines if line["id"] not in contaminated]
        if not lines:
            continue
        entry: dict[str, Any] = {"model": name, "answers": len(lines), "clean_answers": len(clean)}
        for metric in (metric for metric in METRICS if metric in results["base"]):
            entry[metric] = {kind: _score(metric, kept) for kind, kept in (("all", lines), ("clean", clean))}
        scores.append(entry)
    return scores


def _score(metric: str, lines: Sequence[Mapping[str, Any]]) -> float | None:
    if not lines:
        return None
    return CorpusScore(metric, [line["output"] for line in lines], [line["reference"] for line in lines]).score
