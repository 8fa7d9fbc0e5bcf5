"""Statistics of a data set: counts of every row and token, and how far test answers overlap train answers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHOWN = 20  # problems shown with their place; all are counted
ENOUGH_TEST_ROWS = 20  # below it, evaluation claims no interval and no significance
_MOST_COLUMNS = 100  # columns with a name of their own; data may have other keys in every row
_IGNORED_SHOWN = 8
OTHER_COLUMNS = "(other columns)"
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
NGRAM = 13  # tokens, as in the contamination report of the GPT-3 paper (appendix C)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_TO_2ND, _TO_4TH = (np.uint64(pow(int(_MULTIPLIER), power, 1 << 64)) for power in (2, 4))
_MOST = 200_000  # n-grams of test rows to look for; from more, a share is chosen by the hashes
_TABLE_BITS = 22  # size of a table by the hashes' last bits, which excludes most n-grams that are not wanted

SplitPart = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, offsets of some rows


@dataclass(frozen=True)
class RowProblem:
    """A row that is not kept, and the reason."""

    location: str
    reason: str
    problem: str
    fix: str
    repairable: bool = False

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}; {self.fix}"


@dataclass
class DatasetStats:
    """Counts of some rows, which can be added up.

    Attributes:
        counts: under "rows", "skipped", "repaired", "roles", "findings", "overflow", "tokens", "turns",
            "ignored_columns", "unrolled", a counter each.
        problems: The first SHOWN problems, in order.
        repairable: The number of rows with problems that `invalid: repair` would keep.
    """

    counts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[RowProblem] = field(default_factory=list)
    repairable: int = 0

    def add(self, section: str, name: str, number: int = 1) -> None:
        self.counts[section][name] += number

    def skip(self, problem: RowProblem) -> None:
        self.add("skipped", problem.reason)
        self.repairable += problem.repairable
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def add_ignored(self, columns: Iterable[str]) -> None:
        """Count the columns of a row that are not read; after _MOST_COLUMNS names, under one name."""
        counter = self.counts["ignored_columns"]
        for column in columns:
            name = column if len(column) <= 60 else f"{column[:57]}..."
            counter[name if name in counter or len(counter) < _MOST_COLUMNS else OTHER_COLUMNS] += 1

    def merge(self, other: "DatasetStats") -> None:
        for section, counter in other.counts.items():
            self.counts[section].update(counter)
        ignored = self.counts["ignored_columns"]
        if len(ignored) > 2 * _MOST_COLUMNS:
            named = Counter(dict(ignored.most_common(_MOST_COLUMNS)))
            named[OTHER_COLUMNS] += ignored.total() - named.total()
            self.counts["ignored_columns"] = named
        self.problems.extend(other.problems[: SHOWN - len(self.problems)])
        self.repairable += other.repairable

    def section(self, name: str) -> dict[str, int]:
        return dict(sorted(self.counts[name].items(), key=lambda item: (-item[1], item[0])))

    def count(self, section: str, name: str) -> int:
        return self.counts[section][name]

    @property
    def skipped(self) -> int:
        return sum(self.counts["skipped"].values())


def make_ledger(
    stats: DatasetStats, conversations: Mapping[str, int], lengths: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ledger of a preparation.

    Args:
        stats: The counts over all rows.
        conversations: Number of conversations of "train" and "test".
        lengths: Tokens per row of "train" and "test".
        facts: Other fields to record.
    """
    train, test = conversations["train"], conversations["test"]
    rows = {
        "read": stats.count("rows", "read"),
        "kept": train + test,
        "skipped": stats.skipped,
        "train": train,
        "test": test,
    }
    tokens = {name: stats.count("tokens", name) for name in ("rendered", "kept", "cut", "supervised")}
    assert rows["read"] == rows["kept"] + rows["skipped"], "every row read is kept or skipped"
    assert tokens["rendered"] == tokens["kept"] + tokens["cut"], "every token rendered is kept or cut"
    # The lengths of all rows; a batch of eight takes rows in reading order, and is padded to its longest row.
    both = np.concatenate([lengths["train"], lengths["test"]])
    summary: dict[str, Any] = {}
    if len(both):
        points = np.percentile(both, PERCENTILES, method="nearest").astype(int).tolist()
        edges = [0, *(2**power for power in range(4, int(both.max()).bit_length() + 1))]
        counts, _ = np.histogram(both, bins=[*edges, np.inf]) if len(edges) > 1 else ([len(both)], None)
        padded = sum(int(both[i : i + 8].max()) * len(both[i : i + 8]) for i in range(0, len(both), 8))
        summary = {
            "percentiles": {str(name): point for name, point in zip(PERCENTILES, points, strict=True)},
            "histogram": {str(edge): int(count) for edge, count in zip(edges, counts, strict=False) if count},
            "padding_share": round(1 - float(both.sum()) / padded, 4) if padded else 0.0,
        }
    return {
        "rows": rows,
        "skipped": stats.section("skipped"),
        "repaired": stats.section("repaired"),
        "tokens": tokens,
        "turns": stats.section("turns"),
        "overflow": stats.section("overflow"),
        "findings": stats.section("findings"),
        "ignored_columns": stats.section("ignored_columns"),
        "lengths": summary,
        **_unrolled(stats, lengths),
        **facts,
    }


def _unrolled(stats: DatasetStats, lengths: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the ledger's key `unrolled`, where an answer has a row of its own or is left out."""
    names = ("conversations", "tokens_before", "tokens_after", "answers_left_out")
    counts = {name: stats.count("unrolled", name) for name in names}
    if not (counts["conversations"] or counts["answers_left_out"]):
        return {}
    rows = {split: len(lengths[split]) for split in ("train", "test")}
    return {"unrolled": {"conversations": counts.pop("conversations"), "rows": rows, **counts}}


def ledger_lines(ledger: Mapping[str, Any]) -> list[str]:
    """Return the ledger as the lines of a short table; see `ledger_warnings` for what needs attention."""
    rows, tokens = ledger["rows"], ledger["tokens"]
    share = tokens["supervised"] / tokens["kept"] if tokens["kept"] else 0.0
    lines = [
        f"rows       {rows['read']:,} read = {rows['train']:,} train + {rows['test']:,} test "
        f"+ {rows['skipped']:,} skipped",
        f"tokens     {tokens['rendered']:,} rendered = {tokens['kept']:,} kept + {tokens['cut']:,} cut; "
        f"{tokens['supervised']:,} supervised ({share:.0%})",
    ]
    if unrolled := ledger.get("unrolled"):
        lines.append(_unrolled_line(unrolled))
    for title in ("skipped", "repaired", "turns", "overflow", "findings"):
        if ledger.get(title):
            listed = ", ".join(f"{name} {number:,}" for name, number in ledger[title].items())
            lines.append(f"{title:<10} {listed}")
    if ignored := ledger.get("ignored_columns"):
        listed = _some([f"{name} {number:,}" for name, number in ignored.items()])
        lines.append(f"ignored    columns that are not read, and in how many rows: {listed}")
    if files := ledger.get("ignored_files"):
        lines.append(f"ignored    files that are not read, since their names are not those of data: {_some(files)}")
    if ledger.get("lengths"):
        points = ledger["lengths"]["percentiles"]
        lines.append("lengths    " + ", ".join(f"{name}%: {points[name]:,}" for name in ("5", "50", "95", "100")))
        overlap = ledger["overlap"]
        lines.append(
            f"duplicates {ledger['duplicates']:,} rows repeat another; of {overlap['test_ngrams']:,} "
            f"{overlap['ngram']}-token pieces of test answers {overlap['also_in_train']:,} are in train answers too"
        )
        if shared := overlap["test_rows_with_a_train_prompt"]:
            repeated = overlap.get("test_rows_in_train", 0)  # a data set that an older version prepared has no count
            lines.append(
                f"overlap    {shared:,} of {rows['test']:,} test rows begin with a train row's prompt, "
                f"{repeated:,} are train rows"
            )
        lines.append(f"padding    {ledger['lengths']['padding_share']:.0%} of a padded batch of 8 would be padding")
    if rows["test"] == 0:
        lines.append(
            "test       no rows are held out: evaluate has nothing to score (see data.test_fraction and data.test)"
        )
    elif rows["test"] < ENOUGH_TEST_ROWS:
        lines.append(
            f"test       {rows['test']} held-out {'row is' if rows['test'] == 1 else 'rows are'} too few to tell "
            f"checkpoints apart: hold out {ENOUGH_TEST_ROWS} or more (see data.test_fraction and data.test)"
        )
    return lines


def _unrolled_line(unrolled: Mapping[str, Any]) -> str:
    made, parts = unrolled["rows"], []
    if number := unrolled["conversations"]:
        share = unrolled["tokens_after"] / max(1, unrolled["tokens_before"])
        parts.append(
            f"{number:,} conversations have one row per answer, since the template writes earlier answers otherwise: "
            f"{made['train']:,} train + {made['test']:,} test rows; {unrolled['tokens_after']:,} tokens in place of "
            f"{unrolled['tokens_before']:,} ({share:.2g} times)"
        )
    if left_out := unrolled["answers_left_out"]:
        parts.append(f"{left_out:,} answers are left out: they are not written as they are served, or do not fit")
    return f"unrolled   {'; '.join(parts)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _IGNORED_SHOWN} more" if len(names) > _IGNORED_SHOWN else ""
    return ", ".join(names[:_IGNORED_SHOWN]) + more


def ledger_warnings(ledger: Mapping[str, Any]) -> list[str]:
    """Return warnings: test rows that are also train rows, and text of the rows that is not trained on."""
    warnings = []
    if repeated := ledger["overlap"].get("test_rows_in_train", 0):
        warnings.append(
            f"{repeated:,} of {ledger['rows']['test']:,} test rows are train rows too: scores on them say nothing "
            "about new conversations; take them out of data.test or data.source"
        )
    if dropped := ledger["findings"].get("reasoning_dropped", 0):
        warnings.append(
            f"{dropped:,} rows hold reasoning that the template {ledger['template']} does not write, in part or at "
            "all: what it does not write is not learned"
        )
    return warnings


def overlap_report(train: Iterable[SplitPart], test: Iterable[SplitPart], test_tokens: int) -> dict[str, Any]:
    """Count the n-grams of the test rows' answers that are also in an answer of a train row.

    Args:
        train: The train rows in parts.
        test: The test rows in parts.
        test_tokens: The number of tokens of the test rows, which decides the size of the sample.

    Returns:
        The counts, as the ledger records them.
    """
    every = np.uint64(max(1, test_tokens // _MOST))
    # 1. A sample of the test rows' n-grams by their hashes, with the number of each one's row.
    sampled, rows_of, base = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for ids, labels, offsets in test:
        made, starts = _ngrams(ids, labels)
        kept = made % every == 0
        sampled.append(made[kept])
        rows_of.append(np.searchsorted(offsets, starts[kept], side="right") - 1 + base)
        base += len(offsets) - 1
    hashes, rows = np.concatenate(sampled), np.concatenate(rows_of)
    # 2. Look for them in the train rows, and count them per test row.
    wanted = np.unique(hashes)
    found = _found_in_train(train, wanted, every) if len(wanted) else np.zeros(0, dtype=bool)
    hit = found[np.searchsorted(wanted, hashes)]
    per_row = np.bincount(rows, minlength=1)
    hits_per_row = np.bincount(rows, weights=hit, minlength=len(per_row))
    return {
        "ngram": NGRAM,
        "sampled": f"1/{every}",
        "test_ngrams": len(hashes),
        "also_in_train": int(hit.sum()),
        "test_rows_half_in_train": int(((hits_per_row * 2 >= per_row) & (per_row > 0)).sum()),
    }


def _found_in_train(train: Iterable[SplitPart], wanted: np.ndarray, every: np.uint64) -> np.ndarray:
    """Return for each of the wanted n-grams (sorted hashes) whether an answer of the train rows holds it."""
    mask = np.uint64((1 << _TABLE_BITS) - 1)
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[wanted & mask] = True
    found = np.zeros(len(wanted), dtype=bool)
    for ids, labels, _ in train:
        hashes = _ngrams(ids, labels)[0]
        if every != 1:
            hashes = hashes[hashes % every == 0]
        hashes = hashes[table[hashes & mask]]
        places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found[places[wanted[places] == hashes]] = True
    return found


def _ngrams(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes and places of the n-grams within one answer (there is a prompt between two answers).

    A hash begins with a polynomial of 13 tokens, from polynomials of 2, 4, 8 and 12: five passes instead of twelve.
    """
    count = len(ids) - NGRAM + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    supervised = np.concatenate([[0], np.cumsum(labels >= 0)])
    starts = np.flatnonzero(supervised[NGRAM:] - supervised[:-NGRAM] == NGRAM)
    assert NGRAM == 8 + 4 + 1
    tokens = ids.astype(np.uint64) + np.uint64(1)
    two = tokens[:-1] * _MULTIPLIER + tokens[1:]
    four = two[:-2] * _TO_2ND + two[2:]
    eight = four[:-4] * _TO_4TH + four[4:]
    twelve = eight[:-4] * _TO_4TH + four[8:]
    hashes = (twelve[:-1] * _MULTIPLIER + tokens[12:])[starts]
    hashes ^= hashes >> np.uint64(29)  # the low bits depend on the last tokens only
    return hashes * _MULTIPLIER ^ (hashes >> np.uint64(32)), starts
