"""What became of every row and token."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHOWN = 20  # problems shown with their place; all are counted
ENOUGH_TEST_ROWS = 20  # below it, evaluation claims no interval and no significance
_MOST_COLUMNS = 100  # named; data may have other keys in every row
_IGNORED_SHOWN = 8
OTHER_COLUMNS = "(other columns)"
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Problem:
    """A row that is not kept, and why."""

    location: str
    reason: str
    what: str
    mend: str
    repairable: bool = False

    def __str__(self) -> str:
        return f"{self.location}: {self.what}; {self.mend}"


@dataclass
class Tally:
    """Counts of some rows, to be added up.

    Attributes:
        counts: under "rows", "skipped", "repaired", "roles", "findings", "overflow", "tokens", "turns",
            "ignored_columns", a counter each.
        problems: the first SHOWN, in order.
        repairable: how many rows with problems `invalid: repair` would keep.
    """

    counts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[Problem] = field(default_factory=list)
    repairable: int = 0

    def add(self, section: str, name: str, number: int = 1) -> None:
        self.counts[section][name] += number

    def skip(self, problem: Problem) -> None:
        self.add("skipped", problem.reason)
        self.repairable += problem.repairable
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def note_ignored(self, columns: Iterable[str]) -> None:
        """Count what a row holds in columns that nobody reads; past _MOST_COLUMNS names, under one name."""
        counter = self.counts["ignored_columns"]
        for column in columns:
            name = column if len(column) <= 60 else f"{column[:57]}..."
            counter[name if name in counter or len(counter) < _MOST_COLUMNS else OTHER_COLUMNS] += 1

    def merge(self, other: "Tally") -> None:
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


def make_ledger(tally: Tally, lengths: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger of a preparation.

    Args:
        tally: the counts over all rows.
        lengths: tokens per row of "train" and "test".
        facts: what else is to be recorded.
    """
    train, test = len(lengths["train"]), len(lengths["test"])
    rows = {
        "read": tally.count("rows", "read"),
        "kept": train + test,
        "skipped": tally.skipped,
        "train": train,
        "test": test,
    }
    tokens = {name: tally.count("tokens", name) for name in ("rendered", "kept", "cut", "supervised")}
    assert rows["read"] == rows["kept"] + rows["skipped"], "every row read is kept or skipped"
    assert tokens["rendered"] == tokens["kept"] + tokens["cut"], "every token rendered is kept or cut"
    both = np.concatenate([lengths["train"], lengths["test"]])
    return {
        "rows": rows,
        "skipped": tally.section("skipped"),
        "repaired": tally.section("repaired"),
        "tokens": tokens,
        "turns": tally.section("turns"),
        "overflow": tally.section("overflow"),
        "findings": tally.section("findings"),
        "ignored_columns": tally.section("ignored_columns"),
        "lengths": _lengths(both),
        **facts,
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    if not len(lengths):
        return {}
    points = np.percentile(lengths, PERCENTILES, method="nearest").astype(int).tolist()
    edges = [0, *(2**power for power in range(4, int(lengths.max()).bit_length() + 1))]
    counts, _ = np.histogram(lengths, bins=[*edges, np.inf]) if len(edges) > 1 else ([len(lengths)], None)
    return {
        "percentiles": {str(name): point for name, point in zip(PERCENTILES, points, strict=True)},
        "histogram": {str(edge): int(count) for edge, count in zip(edges, counts, strict=False) if count},
        "padding_share": _padding_share(lengths),
    }


def _padding_share(lengths: np.ndarray, batch: int = 8) -> float:
    """The share of padding that batches of eight, padded to their longest row in reading order, would have."""
    padded = sum(int(lengths[i : i + batch].max()) * len(lengths[i : i + batch]) for i in range(0, len(lengths), batch))
    return round(1 - float(lengths.sum()) / padded, 4) if padded else 0.0


def ledger_lines(ledger: Mapping[str, Any]) -> list[str]:
    """The ledger as a short table; `ledger_warnings` has what must not be overlooked."""
    rows, tokens = ledger["rows"], ledger["tokens"]
    share = tokens["supervised"] / tokens["kept"] if tokens["kept"] else 0.0
    lines = [
        f"rows       {rows['read']:,} read = {rows['train']:,} train + {rows['test']:,} test "
        f"+ {rows['skipped']:,} skipped",
        f"tokens     {tokens['rendered']:,} rendered = {tokens['kept']:,} kept + {tokens['cut']:,} cut; "
        f"{tokens['supervised']:,} supervised ({share:.0%})",
    ]
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
            f"doubles    {ledger['duplicates']:,} rows repeat another; of {overlap['test_ngrams']:,} "
            f"{overlap['ngram']}-token pieces of test answers {overlap['also_in_train']:,} are in train answers too"
        )
        if shared := overlap["test_rows_with_a_train_prompt"]:
            repeated = overlap.get("test_rows_in_train", 0)  # a data set that an older version prepared has no count
            lines.append(
                f"overlap    {shared:,} of {rows['test']:,} test rows begin with a train row's prompt, "
                f"{repeated:,} are train rows"
            )
        lines.append(f"padding    {ledger['lengths']['padding_share']:.0%} of a padded batch of 8 would be padding")
    if rows["test"] < ENOUGH_TEST_ROWS:
        lines.append(f"test       {_few_test_rows(rows['test'])}")
    return lines


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _IGNORED_SHOWN} more" if len(names) > _IGNORED_SHOWN else ""
    return ", ".join(names[:_IGNORED_SHOWN]) + more


def _few_test_rows(number: int) -> str:
    if number == 0:
        return "no rows are held out: evaluate has nothing to score (see data.test_fraction and data.test)"
    return (
        f"{number} held-out {'row is' if number == 1 else 'rows are'} too few to tell checkpoints apart: "
        f"hold out {ENOUGH_TEST_ROWS} or more (see data.test_fraction and data.test)"
    )


def ledger_warnings(ledger: Mapping[str, Any]) -> list[str]:
    """What a user must know before training on the data: it is trained otherwise than it reads, or tested on itself."""
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
