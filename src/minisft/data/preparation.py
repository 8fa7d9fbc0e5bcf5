"""The pipeline: sources to `<output>/dataset`, with the split, the cache and the ledger."""

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
from minisft.data.pipeline import SKIP_REASONS, schema
from minisft.data.prepared import read_ledger
from minisft.data.renderers.resolve import own_template, template_file
from minisft.data.shards import TRAIN_COLUMNS, Progress, Split, encode_sources, write_split
from minisft.data.sources import Source, at_revision, ignored_files, parse_sources, refuse_shared
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


@dataclass(frozen=True)
class Prepared:
    """A prepared data set on disk.

    Args:
        folder: `<output>/dataset`.
        train_rows: rows in `train`.
        test_rows: rows in `test`.
        ledger: what became of every row and token.
        cached: whether it was there already.
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
        recipe: the whole recipe.
        tokenizer: the model's, where it is loaded already; otherwise it is loaded, if it is needed at all.
        progress: called with the number of rows done so far.
        model_folder: the model's, where it is known already; otherwise it is looked for.
        begun: training on the prepared data has begun: they are kept, and it is an error if they could not be
            made again.
        encoder: the model's tokenizer in the recipe's template, where it is made already; it takes the place of
            `tokenizer`.

    Raises:
        UserError: the source, the rows or the template do not do (see `data.invalid`), or the data of a run that has
            begun are others now.
    """
    folder = Path(recipe.output) / "dataset"
    if encoder is not None:
        tokenizer = encoder.tokenizer
    mark_new_folder(folder.parent, "run")
    if tokenizer is None and model_folder is None:
        model_folder = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
    # 1. Look for it without the lock, which is a file: a run that is prepared may be read-only.
    if read_ledger(folder) is not None:
        found = _look(folder, recipe, tokenizer, model_folder, begun)
        if found.prepared is not None:
            _remove_unfinished(folder)
            return found.prepared
        tokenizer = found.tokenizer
    with locked(folder):
        # 2. Look again: another process may have made it meanwhile.
        found = _look(folder, recipe, tokenizer, model_folder, begun)
        if found.prepared is not None:
            return found.prepared
        # 3. Make it.
        if encoder is None:
            assert found.tokenizer is not None
            encoder = Encoder(found.tokenizer, recipe.data.template)
        with write_folder_atomically(folder) as temporary:
            ledger = _prepare_into(temporary, recipe, found.sources, encoder, progress)
            ledger["made_from"] = found.origin
            (temporary / "ledger.json").write_text(dump_json(ledger, indent=1), encoding="utf-8")
    return _prepared(folder, ledger, cached=False)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed preparation left beside the data, where the run can be written at all."""
    if any(path.is_dir() for path in folder.parent.glob(f".{folder.name}.*")):
        with contextlib.suppress(OSError, UserError), locked(folder):
            pass


@dataclass(frozen=True)
class _Found:
    """What a look at a data set came to.

    Args:
        prepared: the data set, where it is the recipe's.
        sources: those that it would be made from.
        origin: a hash for each thing that it would be made from.
        tokenizer: where it had to be loaded.
    """

    prepared: Prepared | None
    sources: Mapping[str, Sequence[Source]]
    origin: dict[str, Any]
    tokenizer: "PreTrainedTokenizerFast | None"


def _look(
    folder: Path,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast | None",
    model_folder: Path | None,
    begun: bool,
) -> _Found:
    """Compare what the data set would be made from with what the one that is there was made from; writes nothing."""
    before = read_ledger(folder)
    sources = _sources(recipe.data, before, begun)
    origin = fingerprint(recipe, sources, template_file(recipe.data.template))
    files = {} if model_folder is None else {"tokenizer_files": tokenizer_files_hash(model_folder)}
    if before is not None and files and not changes(before, origin | files, begun):
        return _Found(_prepared(folder, before, cached=True), sources, origin | files, tokenizer)
    # The same with the tokenizer itself, where its files do not tell.
    if tokenizer is None:
        assert model_folder is not None
        tokenizer = load_tokenizer(model_folder, recipe.trust_remote_code)
    own = own_template(tokenizer) if recipe.data.template == "auto" else None
    origin["tokenizer"] = tokenizer_hash(tokenizer, own)
    changed = [] if before is None else changes(before, origin, begun)
    if before is not None and not changed:
        return _Found(_prepared(folder, before, cached=True), sources, origin | files, tokenizer)
    if changed and begun:
        raise _other_data(recipe, changed)
    return _Found(None, sources, origin | files, tokenizer)


def _prepared(folder: Path, ledger: dict[str, Any], cached: bool) -> Prepared:
    for line in ledger_warnings(ledger):
        warn(f"warning: {line}")
    return Prepared(folder, ledger["rows"]["train"], ledger["rows"]["test"], ledger, cached)


def _sources(data: DataRecipe, before: Mapping[str, Any] | None, begun: bool) -> dict[str, list[Source]]:
    """The sources of `data.source` and `data.test`, those of the hub at the revision that is read.

    A run that has begun stays with the revision that it began with, whatever the hub has by now.
    """
    known = before["made_from"]["sources"] if before is not None else {}
    named = {"data.source": data.source} | ({} if data.test is None else {"data.test": data.test})
    parsed = {key: parse_sources(value, key) for key, value in named.items()}
    if not begun:
        refuse_shared(parsed)
    return {
        key: [at_revision(one, known.get(one.path), keep=begun) for one in listed] for key, listed in parsed.items()
    }


def _other_data(recipe: Recipe, changed: Sequence[str]) -> UserError:
    return UserError(
        recipe.output,
        f"the data are not those that this run began with: changed since then: {', '.join(changed)}",
        "restore what changed, choose another `output`, or pass --force to replace that run",
    )


# --- the steps --------------------------------------------------------------------------------------------


def _prepare_into(
    folder: Path, recipe: Recipe, sources: Mapping[str, Sequence[Source]], encoder: Encoder, progress: Progress | None
) -> dict[str, Any]:
    stats, data = DatasetStats(), recipe.data
    # 1. Encode each source into a staging file, in the order of its rows.
    shard = encode_sources(folder / "source.arrow", sources["data.source"], recipe, encoder, stats, progress)
    own_test = "data.test" in sources
    if own_test:
        staged_test = encode_sources(folder / "test.arrow", sources["data.test"], recipe, encoder, stats, progress)
    # 2. Every problem at once, where problems are errors.
    _raise_problems(stats, data)
    # 3. Split.
    is_test = choose_test(shard.keys, 0.0 if own_test else data.test_fraction)
    _require_rows(stats, int((~is_test).sum()), data)
    train = Split(shard, ~is_test)
    test = Split(staged_test, np.ones(len(staged_test.keys), dtype=bool)) if own_test else Split(shard, is_test)
    # 4. Write both sides, and look for test answers among the train answers.
    with ThreadPoolExecutor(1) as thread:
        overlap = thread.submit(overlap_report, train.parts(), test.parts(), int(test.lengths.sum()))
        write_split(folder / "train", train, TRAIN_COLUMNS)
        write_split(folder / "test", test, schema().names)
    for split in {train.shard.path, test.shard.path}:
        split.unlink()
    shared = np.isin(test.shard.keys[test.mask], train.shard.keys[train.mask])
    repeated = np.isin(test.shard.identities[test.mask], train.shard.identities[train.mask])
    facts = {
        "template": encoder.template_name,
        "formats": shard.formats | (staged_test.formats if own_test else {}),
        "ignored_files": [name for listed in sources.values() for one in listed for name in ignored_files(one)],
        "duplicates": len(shard.identities) - len(np.unique(shard.identities)),
        "overlap": {
            "test_rows_with_a_train_prompt": int(shared.sum()),
            "test_rows_in_train": int(repeated.sum()),
            **overlap.result(),
        },
    }
    return make_ledger(stats, {"train": train.lengths, "test": test.lengths}, facts)


def _raise_problems(stats: DatasetStats, data: DataRecipe) -> None:
    """Raise one error for all problems that the recipe does not say to skip."""
    skipped = stats.section("skipped")
    fatal = {name: number for name, number in skipped.items() if _is_fatal(name, data)}
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


def _is_fatal(reason: str, data: DataRecipe) -> bool:
    """Whether rows skipped for this reason stop the preparation: overflow's reasons have a key of their own."""
    if reason == "too_long":
        return data.overflow == "error"
    return data.invalid == "error" and reason not in ("nothing_left_to_learn", SKIP_REASONS)


def _require_rows(stats: DatasetStats, train: int, data: DataRecipe) -> None:
    if train == 0:
        reasons = ", ".join(f"{name} {number:,}" for name, number in stats.section("skipped").items())
        raise UserError(
            _source_name(data),
            f"no conversation is left to train on, of {stats.count('rows', 'read'):,} rows read ({reasons})",
            _fix_for_no_rows(stats),
        )


def _fix_for_no_rows(stats: DatasetStats) -> str:
    """How to get rows, by the reason for which most were lost."""
    main = next(iter(stats.section("skipped")), "")
    if main == SKIP_REASONS:
        return "raise the source's weight: it says how often each row counts, and below 1 leaves rows out"
    if main == "nothing_supervised":
        return "every answer is left out: set weight, train, loss or trainable of some to 1, or remove the key"
    return "give more rows, lower data.test_fraction, or see data.invalid and data.overflow"
