"""Prepare a recipe's data: sources to `<output>/dataset`, with the split, the cache and the ledger."""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.console import warn
from minisft.data.encoder import Encoder
from minisft.data.fingerprint import changes, fingerprint, locked, tokenizer_files_hash, tokenizer_hash
from minisft.data.pipeline import LEFT_OUT_BY_WEIGHT
from minisft.data.prepared import read_ledger
from minisft.data.renderers.resolve import own_template, template_file
from minisft.data.shards import (
    EncodedShard,
    Progress,
    Split,
    column_names,
    count_sets,
    encode_sources,
    write_split,
)
from minisft.data.sources import (
    Source,
    at_revision,
    ignored_files,
    parse_sources,
    refuse_shared,
    source_names,
    test_set_names,
)
from minisft.data.split import choose_test
from minisft.data.stats import SHOWN, DatasetStats, ledger_warnings, make_ledger, overlap_report
from minisft.errors import UserError
from minisft.files import write_folder_atomically
from minisft.manifest import mark_new_folder
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import DataRecipe, Recipe
from minisft.text import dump_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


HELD_BACK = "held_back"  # reason of the test rows that a data set with validation rows leaves out


@dataclass(frozen=True)
class Prepared:
    """A prepared data set on disk.

    Args:
        folder: Path of `<output>/dataset`.
        train_rows: Number of conversations in `train`.
        test_rows: Number of conversations in `test`.
        ledger: The counts that account for every row and token.
        cached: Whether the data set existed already.
    """

    folder: Path
    train_rows: int
    test_rows: int
    ledger: dict[str, Any]
    cached: bool


def prepare(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    progress: Progress | None = None,
    *,
    model_folder: Path | None = None,
    begun: bool = False,
    encoder: Encoder | None = None,
) -> Prepared:
    """Prepare the recipe's data under `<output>/dataset`, or find it prepared.

    Args:
        recipe: The recipe.
        tokenizer: The model's tokenizer, where it is loaded already; otherwise it is loaded if it is needed.
        progress: Called with the number of rows read so far.
        model_folder: The model's folder, where it is known already; otherwise it is looked for.
        begun: Whether training on the prepared data has begun. The data are kept then, and it is an error if they
            could not be prepared again.
        encoder: An encoder with the model's tokenizer and the recipe's template, where there is one already; it
            replaces `tokenizer`.

    Raises:
        UserError: The source, the rows or the template cannot be used (see `data.invalid`), or the data of a run that
            has begun have changed.
    """
    folder = Path(recipe.output) / "dataset"
    if encoder is not None:
        tokenizer = encoder.tokenizer
    mark_new_folder(folder.parent, "run")
    if tokenizer is None and model_folder is None:
        model_folder = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
    # 1. Look for the data set without the lock, which is a file: a run that is prepared may be read-only.
    if read_ledger(folder) is not None:
        lookup = _look_up(folder, recipe, tokenizer, model_folder, begun)
        if lookup.prepared is not None:
            # A killed preparation may have left files; they are removed where the run can be written.
            if any(path.is_dir() for path in folder.parent.glob(f".{folder.name}.*")):
                with contextlib.suppress(OSError, UserError), locked(folder):
                    pass
            return lookup.prepared
        tokenizer = lookup.tokenizer
    with locked(folder):
        # 2. Look again: another process may have prepared it meanwhile.
        lookup = _look_up(folder, recipe, tokenizer, model_folder, begun)
        if lookup.prepared is not None:
            return lookup.prepared
        # 3. Prepare it.
        if encoder is None:
            assert lookup.tokenizer is not None
            encoder = Encoder(lookup.tokenizer, recipe.data.template, recipe.data.template_options)
        with write_folder_atomically(folder) as temporary:
            ledger = _prepare_into(temporary, recipe, lookup.sources, encoder, progress)
            ledger["made_from"] = lookup.origin
            (temporary / "ledger.json").write_text(dump_json(ledger, indent=1), encoding="utf-8")
    return _prepared(folder, ledger, cached=False)


@dataclass(frozen=True)
class _Lookup:
    """The result of looking for a prepared data set.

    Args:
        prepared: The data set, where it is the recipe's; otherwise None.
        sources: The sources that the recipe names, by the recipe's key.
        origin: A hash for each thing that the data set would be prepared from.
        tokenizer: The tokenizer, where it is loaded.
    """

    prepared: Prepared | None
    sources: Mapping[str, Sequence[Source]]
    origin: dict[str, Any]
    tokenizer: "PreTrainedTokenizerFast | None"


def _look_up(
    folder: Path,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast | None",
    model_folder: Path | None,
    begun: bool,
) -> _Lookup:
    """Compare the origin of the present data set with what the recipe would be prepared from; write nothing.

    A run that has begun stays with the revision of a hub data set that it began with.
    """
    # 1. The sources; those of the hub at the revision that is read.
    ledger = read_ledger(folder)
    known = ledger["made_from"]["sources"] if ledger is not None else {}
    named = {"data.source": recipe.data.source} | ({} if recipe.data.test is None else {"data.test": recipe.data.test})
    parsed = {key: parse_sources(value, key) for key, value in named.items()}
    if not begun:
        refuse_shared(parsed)
    sources = {
        key: [at_revision(source, known.get(source.path), keep=begun) for source in listed]
        for key, listed in parsed.items()
    }
    # 2. Compare by the tokenizer's files, which are hashed without loading it.
    origin = fingerprint(recipe, sources, template_file(recipe.data.template))
    files = {} if model_folder is None else {"tokenizer_files": tokenizer_files_hash(model_folder)}
    if ledger is not None and files and not changes(ledger, origin | files, begun):
        return _Lookup(_prepared(folder, ledger, cached=True), sources, origin | files, tokenizer)
    # 3. Compare by the tokenizer itself: other files may hold the same tokenizer.
    if tokenizer is None:
        assert model_folder is not None
        tokenizer = load_tokenizer(model_folder, recipe.trust_remote_code)
    own = own_template(tokenizer) if recipe.data.template == "auto" else None
    origin["tokenizer"] = tokenizer_hash(tokenizer, own)
    changed = [] if ledger is None else changes(ledger, origin, begun)
    if ledger is not None and not changed:
        return _Lookup(_prepared(folder, ledger, cached=True), sources, origin | files, tokenizer)
    if changed and begun:
        problem = f"the data are not those that this run began with: changed since then: {', '.join(changed)}"
        fix = "restore what changed, choose another `output`, or pass --force to replace that run"
        raise UserError(recipe.output, problem, fix)
    return _Lookup(None, sources, origin | files, tokenizer)


def _prepared(folder: Path, ledger: dict[str, Any], cached: bool) -> Prepared:
    for line in ledger_warnings(ledger):
        warn(f"warning: {line}")
    return Prepared(folder, ledger["rows"]["train"], ledger["rows"]["test"], ledger, cached)


# --- the steps --------------------------------------------------------------------------------------------


def _prepare_into(
    folder: Path, recipe: Recipe, sources: Mapping[str, Sequence[Source]], encoder: Encoder, progress: Progress | None
) -> dict[str, Any]:
    """Write the splits into a folder, and return the ledger."""
    stats, data = DatasetStats(), recipe.data
    sets = test_set_names(data.test)  # the set of each source
    # 1. Encode the sources into one Arrow file, in the order of their rows; sources of data.test into another.
    shard = encode_sources(folder / "source.arrow", sources["data.source"], recipe, encoder, stats, progress)
    own_test = "data.test" in sources
    if own_test:
        test_shard = encode_sources(folder / "test.arrow", sources["data.test"], recipe, encoder, stats, progress, sets)
    # 2. Report all problems at once, where problems are errors.
    _raise_problems(stats, data)
    # 3. Split.
    is_test = choose_test(shard.keys, 0.0 if own_test else data.test_fraction)
    is_train = ~is_test
    if data.validation_fraction is not None:
        is_test, is_train = _hold_back(stats, shard, is_test, data.validation_fraction)
    _require_rows(stats, int(is_train.sum()), data)
    train = Split(shard, is_train)
    test = Split(test_shard, np.ones(len(test_shard.keys), dtype=bool)) if own_test else Split(shard, is_test)
    # 4. Write both splits, and look for test answers among the train answers.
    with ThreadPoolExecutor(1) as thread:
        overlap = thread.submit(overlap_report, train.parts(), test.parts(), int(test.lengths.sum()))
        for split, rows in (("train", train), ("test", test)):
            columns = column_names(split, stats.count("unrolled", "conversations") > 0)
            write_split(folder / split, rows, columns, sets if split == "test" else ())
    set_sizes = count_sets(test, sets)
    for path in {train.shard.path, test.shard.path}:
        path.unlink()
    # 5. Count duplicates and shared prompts, and make the ledger.
    # By sorting: the table that numpy takes for keys that lie close together overflows in numpy 2.0.
    shared = np.isin(test.shard.keys[test.mask], train.shard.keys[train.mask], kind="sort")
    repeated = np.isin(test.shard.identities[test.mask], train.shard.identities[train.mask], kind="sort")
    facts = {
        "template": encoder.template_name,
        "source_names": {
            "train": source_names(sources["data.source"]),
            "test": source_names(sources["data.test" if own_test else "data.source"]),
        },
        "formats": shard.formats | (test_shard.formats if own_test else {}),
        "ignored_files": [name for listed in sources.values() for source in listed for name in ignored_files(source)],
        "duplicates": len(shard.identities) - len(np.unique(shard.identities)),
        "overlap": {
            "test_rows_with_a_train_prompt": int(shared.sum()),
            "test_rows_in_train": int(repeated.sum()),
            **overlap.result(),
        },
        **({"test_sets": set_sizes} if sets else {}),
    }
    conversations = {"train": train.conversations, "test": test.conversations}
    return make_ledger(stats, conversations, {"train": train.lengths, "test": test.lengths}, facts)


def _hold_back(
    stats: DatasetStats, shard: EncodedShard, is_test: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Choose validation rows among the train rows, and count the test rows, which are in no split, as skipped.

    Args:
        stats: The counts over all rows, which are changed; turns, findings and cut tokens stay those of all rows.
        shard: The encoded rows.
        is_test: (conversations,) whether it is a test row.
        fraction: The fraction of the other rows to choose.

    Returns:
        For each conversation, whether it is a validation row, and whether it is a train row.
    """
    is_validation = np.zeros_like(is_test)
    is_validation[~is_test] = choose_test(np.asarray(shard.keys)[~is_test], fraction)
    held_back = Split(shard, is_test)
    stats.add("skipped", HELD_BACK, held_back.conversations)
    tokens = int(held_back.lengths.sum())
    stats.add("tokens", "rendered", -tokens)
    stats.add("tokens", "kept", -tokens)
    stats.add("tokens", "supervised", -sum(int((labels >= 0).sum()) for _, labels, _ in held_back.parts()))
    return is_validation, ~is_test & ~is_validation


def _raise_problems(stats: DatasetStats, data: DataRecipe) -> None:
    """Raise one error for all problems that the recipe does not say to skip."""
    allowed = {"nothing_left_to_learn", LEFT_OUT_BY_WEIGHT}
    skipped = stats.section("skipped")
    fatal = {
        name: number
        for name, number in skipped.items()  # overflow has a key of its own
        if (data.overflow == "error" if name == "too_long" else data.invalid == "error" and name not in allowed)
    }
    if not fatal:
        return
    lost = sum(fatal.values())
    shown = [problem for problem in stats.problems if problem.reason in fatal][:SHOWN]
    lines = [f"  {problem}" for problem in shown]
    if lost > len(shown):
        lines.append(f"  ... and {lost - len(shown):,} more")
    reasons = ", ".join(f"{name} {number:,}" for name, number in fatal.items())
    raise UserError(
        _source_name(data),
        f"{lost:,} of {stats.count('rows', 'read'):,} rows cannot be used ({reasons}):\n" + "\n".join(lines),
        f"fix the rows, or set data.invalid: skip (loses {lost:,} rows) or "
        f"data.invalid: repair (saves {stats.repairable:,} of them)",
    )


def _source_name(data: DataRecipe) -> str:
    return data.source if isinstance(data.source, str) else "data.source"


def _require_rows(stats: DatasetStats, train: int, data: DataRecipe) -> None:
    """Raise an error where no row is left to train on; the fix depends on why most rows were lost."""
    if train > 0:
        return
    skipped = stats.section("skipped")
    most_frequent = next(iter(skipped), "")
    fix = "give more rows, lower data.test_fraction, or see data.invalid and data.overflow"
    if most_frequent == LEFT_OUT_BY_WEIGHT:
        fix = "raise the source's weight: it says how often each row counts, and below 1 leaves rows out"
    elif most_frequent == "nothing_supervised":
        fix = "every answer is left out: set weight, train, loss or trainable of some to 1, or remove the key"
    reasons = ", ".join(f"{name} {number:,}" for name, number in skipped.items())
    problem = f"no conversation is left to train on, of {stats.count('rows', 'read'):,} rows read ({reasons})"
    raise UserError(_source_name(data), problem, fix)
