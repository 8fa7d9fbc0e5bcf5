"""The pipeline: sources to `<output>/dataset`, with the split, the cache and the ledger."""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft import __version__
from minisft.data.chunks import LEFT_OUT, ChunkResult, Task, process_chunk, schema
from minisft.data.encoding import Encoder, own_template, template_file
from minisft.data.formats import FORMATS, detect_format, not_json
from minisft.data.ledger import SHOWN, Tally, make_ledger
from minisft.data.overlap import Part, overlap_report
from minisft.data.sources import Chunk, Source, parse_sources, read_source, source_files
from minisft.data.split import choose_test
from minisft.errors import UserError
from minisft.files import whole_folder
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import DataRecipe, Recipe

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int], None]
TRAIN_COLUMNS = ("input_ids", "labels", "id", "location", "rendered", "findings")
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
_POOL_FROM = 3  # chunks; fewer are done sooner than processes start


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
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast | None" = None, progress: Progress | None = None
) -> Prepared:
    """Prepare the recipe's data under `<output>/dataset`, or find it prepared.

    Args:
        recipe: the whole recipe.
        tokenizer: the model's, where it is loaded already; otherwise it is loaded.
        progress: called with the number of rows done so far.

    Raises:
        UserError: the source, the rows or the template do not do; see `data.invalid`.
    """
    folder = Path(recipe.output) / "dataset"
    if tokenizer is None:
        model = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
        tokenizer = load_tokenizer(model, recipe.trust_remote_code)
    key = cache_key(recipe, _tokenizer_hash(tokenizer, recipe.data.template))
    with _locked(folder):
        ledger = _cached_ledger(folder, key)
        if ledger is not None:
            return _prepared(folder, ledger, cached=True)
        encoder = Encoder(tokenizer, recipe.data.template)
        with whole_folder(folder) as aside:
            ledger = _prepare_into(aside, recipe, encoder, progress)
            ledger["key"] = key
            (aside / "ledger.json").write_text(json.dumps(ledger, indent=1, ensure_ascii=False), encoding="utf-8")
    return _prepared(folder, ledger, cached=False)


def load_train(output: Path | str) -> Any:
    """The `datasets.Dataset` of train rows of a run."""
    return load_split(output, "train")


def load_test(output: Path | str) -> list[dict[str, Any]]:
    """The test rows of a run, each with its `messages` and `tools`."""
    return list(load_split(output, "test"))


def load_split(output: Path | str, side: str) -> Any:
    """One side of a run's prepared data, "train" or "test", as a `datasets.Dataset`."""
    import datasets

    folder = Path(output) / "dataset" / side
    if not folder.is_dir():
        raise UserError(folder, "there is no prepared data", "run `minisft prepare` on the recipe first")
    return datasets.load_from_disk(str(folder))


def _prepared(folder: Path, ledger: dict[str, Any], cached: bool) -> Prepared:
    return Prepared(folder, ledger["rows"]["train"], ledger["rows"]["test"], ledger, cached)


# --- the steps --------------------------------------------------------------------------------------------


def _prepare_into(folder: Path, recipe: Recipe, encoder: Encoder, progress: Progress | None) -> dict[str, Any]:
    tally, data = Tally(), recipe.data
    # 1. Encode each source into a staging file, in the order of its rows.
    staged = _stage(folder / "source.arrow", data.source, "data.source", recipe, encoder, tally, progress)
    own_test = data.test is not None
    if own_test:
        staged_test = _stage(folder / "test.arrow", data.test, "data.test", recipe, encoder, tally, progress)
    # 2. Every problem at once, where problems are errors.
    _raise_problems(tally, data)
    # 3. Split.
    is_test = choose_test(staged.keys, 0.0 if own_test else data.test_fraction)
    _require_rows(tally, int((~is_test).sum()), data)
    train = Side(staged, ~is_test)
    test = Side(staged_test, np.ones(len(staged_test.keys), dtype=bool)) if own_test else Side(staged, is_test)
    # 4. Write both sides, and look for test answers among the train answers.
    with ThreadPoolExecutor(1) as thread:
        overlap = thread.submit(overlap_report, train.parts(), test.parts(), int(test.lengths.sum()))
        _write_side(folder / "train", train, list(TRAIN_COLUMNS))
        _write_side(folder / "test", test, schema().names)
    for side in {train.staged.path, test.staged.path}:
        side.unlink()
    shared = np.isin(test.staged.keys[test.mask], train.staged.keys[train.mask])
    facts = {
        "template": encoder.template_name,
        "formats": staged.formats | (staged_test.formats if own_test else {}),
        "duplicates": len(staged.identities) - len(np.unique(staged.identities)),
        "overlap": {"test_rows_with_a_train_prompt": int(shared.sum()), **overlap.result()},
    }
    return make_ledger(tally, {"train": train.lengths, "test": test.lengths}, facts)


@dataclass(frozen=True)
class Staged:
    """Encoded rows in an Arrow file, and for each its split key, identity and length."""

    path: Path
    keys: np.ndarray
    identities: np.ndarray
    lengths: np.ndarray
    formats: dict[str, str]


@dataclass(frozen=True)
class Side:
    """The rows of a staging file that go to one side."""

    staged: Staged
    mask: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.staged.lengths[self.mask]

    def batches(self) -> Iterator["pa.RecordBatch"]:
        """The side's rows, batch by batch."""
        import pyarrow as pa

        start = 0
        with pa.OSFile(str(self.staged.path)) as file:  # mapped, its pages would count as this process's memory
            for batch in pa.ipc.open_stream(file):
                chosen = self.mask[start : start + batch.num_rows]
                start += batch.num_rows
                if chosen.all():
                    yield batch
                elif chosen.any():
                    yield batch.filter(pa.array(chosen))

    def parts(self) -> Iterator[Part]:
        """(ids, labels, offsets) of the side's rows, batch by batch."""
        for batch in self.batches():
            ids, labels = batch.column("input_ids"), batch.column("labels")
            offsets = ids.offsets.to_numpy()
            yield ids.flatten().to_numpy(), labels.flatten().to_numpy(), offsets - offsets[0]


def _stage(
    path: Path,
    source: Any,
    key: str,
    recipe: Recipe,
    encoder: Encoder,
    tally: Tally,
    progress: Progress | None,
) -> Staged:
    """Encode all rows of a source (or list) into one Arrow file."""
    import pyarrow as pa

    sources = parse_sources(source, key)
    streams = [read_source(one, index, recipe.seed) for index, one in enumerate(sources)]
    chunks, detected = _with_formats(streams, sources, recipe.data)
    task = Task(recipe.data, tuple(detected), recipe.seed)
    columns: list[list[np.ndarray]] = [[np.zeros(0, kind)] for kind in (np.uint64, np.uint64, np.int32)]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema()) as writer:
        for result in _process(_limited(chunks, recipe.data.limit), encoder, task):
            writer.write_batch(pa.ipc.read_record_batch(pa.py_buffer(result.table), schema()))
            for column, part in zip(columns, (result.keys, result.identities, result.lengths), strict=True):
                column.append(part)
            tally.merge(result.tally)
            if progress is not None:
                progress(tally.count("rows", "read"))
    formats = {one.path: name for one, name in zip(sources, detected, strict=True)}
    keys, identities, lengths = (np.concatenate(column) for column in columns)
    return Staged(path, keys, identities, lengths, formats)


def _with_formats(
    streams: Sequence[Iterator[Chunk]], sources: Sequence[Source], data: DataRecipe
) -> tuple[Iterator[Chunk], list[str]]:
    """All chunks in order, and each source's format, stated or detected from its first rows."""
    formats: list[str] = []
    opened: list[Iterable[Chunk]] = []
    for stream, source in zip(streams, sources, strict=True):
        if data.format != "auto":
            formats.append(data.format)
            opened.append(stream)
            continue
        read: list[Chunk] = []
        name = None
        for chunk in stream:
            read.append(chunk)
            name = next((found for _, row in chunk.parsed() if (found := detect_format(row))), None)
            if name is not None or len(read) == 4:
                break
        formats.append(name or _unknown_format(source, read))
        opened.append(chain(read, stream))
    return chain.from_iterable(opened), formats


def _unknown_format(source: Source, read: Sequence[Chunk]) -> str:
    """Refuse a source none of whose first rows has a known format."""
    location, row = next(((loc, row) for chunk in read for loc, row in chunk.parsed()), (source.path, None))
    if isinstance(row, ValueError):
        error = not_json(row)
        raise UserError(location, error.what, "give UTF-8 text with one JSON object a line, or a JSON list")
    keys = f"its first row has the keys {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) else (
        "its first row is no object"
    )  # fmt: skip
    raise UserError(
        location,
        f"the format is unknown: {keys}",
        "bring the rows into one of the formats: `conversations` (ShareGPT), `messages`, `instruction`/`output` "
        f"(Alpaca), `prompt`/`completion`; data.format: {', '.join(FORMATS)}",
    )


def _limited(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    left = limit
    for chunk in chunks:
        if left is not None:
            chunk = chunk.head(left)
            left -= len(chunk)
        yield chunk
        if left == 0:
            return


def _raise_problems(tally: Tally, data: DataRecipe) -> None:
    """Raise one error for all problems that the recipe does not say to skip."""
    skipped = tally.section("skipped")
    fatal = {name: number for name, number in skipped.items() if _is_fatal(name, data)}
    if not fatal:
        return
    lost = sum(fatal.values())
    shown = [problem for problem in tally.problems if problem.reason in fatal][:SHOWN]
    lines = [f"  {problem}" for problem in shown]
    if lost > len(shown):
        lines.append(f"  ... and {lost - len(shown):,} more")
    reasons = ", ".join(f"{name} {number:,}" for name, number in fatal.items())
    raise UserError(
        _source_name(data),
        f"{lost:,} of {tally.count('rows', 'read'):,} rows cannot be used ({reasons}):\n" + "\n".join(lines),
        f"mend the rows, or set data.invalid: skip (loses {lost:,} rows) or "
        f"data.invalid: repair (saves {tally.repairable:,} of them)",
    )


def _source_name(data: DataRecipe) -> str:
    return data.source if isinstance(data.source, str) else "data.source"


def _is_fatal(reason: str, data: DataRecipe) -> bool:
    """Whether rows skipped for this reason stop the preparation: overflow's reasons have a key of their own."""
    if reason == "too_long":
        return data.overflow == "error"
    return data.invalid == "error" and reason not in ("nothing_left_to_learn", LEFT_OUT)


def _require_rows(tally: Tally, train: int, data: DataRecipe) -> None:
    if train == 0:
        reasons = ", ".join(f"{name} {number:,}" for name, number in tally.section("skipped").items())
        raise UserError(
            _source_name(data),
            f"no conversation is left to train on, of {tally.count('rows', 'read'):,} rows read ({reasons})",
            "give more rows, lower data.test_fraction, or see data.invalid and data.overflow",
        )


def _write_side(folder: Path, side: Side, names: list[str]) -> None:
    """Write a side as a `datasets` folder, batch by batch.

    `datasets` writes the folder for no rows, and its data file is then written anew: it would map all rows into
    memory to copy them.
    """
    import pyarrow as pa

    kept = pa.schema([schema().field(name) for name in names])
    data = _write_empty(folder, kept)
    with pa.OSFile(str(data), "wb") as file, pa.ipc.new_stream(file, kept) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], kept))  # a file without any batch is not loaded
        for batch in side.batches():
            writer.write_batch(batch.select(names))


def _write_empty(folder: Path, kept: "pa.Schema") -> Path:
    """Write a `datasets` folder without rows; the path of its data file."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        features = datasets.Features.from_arrow_schema(kept)
        empty = datasets.Dataset.from_dict({name: [] for name in kept.names}, features=features)
        empty.save_to_disk(str(folder), num_shards=1)
    finally:
        if bars:
            datasets.enable_progress_bars()
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["_fingerprint"] = secrets.token_hex(8)  # that of no rows would be the same for all data
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return folder / str(state["_data_files"][0]["filename"])


# --- processes --------------------------------------------------------------------------------------------

_shared: tuple[Encoder, Task] | None = None  # what forked workers inherit


def _process(chunks: Iterator[Chunk], encoder: Encoder, task: Task) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, by several processes where there are enough of them."""
    first = [chunk for _, chunk in zip(range(_POOL_FROM), chunks, strict=False)]
    workers = task.data.processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(first) < _POOL_FROM or workers == 1:
        yield from (process_chunk(chunk, encoder, task) for chunk in chain(first, chunks))
        return
    yield from _in_pool(chain(first, chunks), encoder, task, workers)


def _in_pool(chunks: Iterable[Chunk], encoder: Encoder, task: Task, workers: int) -> Iterator[ChunkResult]:
    global _shared
    _shared = (encoder, task)
    waiting: deque[Future[ChunkResult]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # enough to keep all busy, few enough for memory to stay flat
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            _shared = None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    # A worker whose parent was killed would wait for ever: its siblings hold the pipe open. The kernel ends it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(chunk: Chunk) -> ChunkResult:
    assert _shared is not None
    encoder, task = _shared
    return process_chunk(chunk, encoder, task)


# --- the cache --------------------------------------------------------------------------------------------


def cache_key(recipe: Recipe, tokenizer: str) -> str:
    """A hash of all that a prepared data set depends on: bytes of the sources, tokenizer, recipe, code.

    A data set of the hub counts by its name, split and subset alone: its bytes are not here to be hashed.
    """
    from importlib.metadata import version

    digest = hashlib.sha256()
    data = recipe.data
    settings = {k: v for k, v in vars(data).items() if k not in ("processes", "verify")}
    facts = [
        settings,
        recipe.seed,
        tokenizer,
        __version__,
        version("tokenizers"),
        version("transformers"),
        _code_hash(),
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for source, key in ((data.source, "data.source"), (data.test, "data.test")):
        for one in parse_sources(source, key) if source is not None else []:
            for name, path in source_files(one):
                digest.update(name.encode())
                _hash_file(digest, path)
    template = template_file(data.template)
    if template is not None:
        _hash_file(digest, template)
    return digest.hexdigest()


def _hash_file(digest: Any, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", "check the file and its permissions") from None


def _code_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerFast", template: str) -> str:
    """A hash of what the tokenizer does to a text, and of its own chat template where that is the one in use.

    Training sets a chat template, and calls set truncation and padding: neither makes it another tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    own = own_template(tokenizer) if template == "auto" else None
    parts = [state, own, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _cached_ledger(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (folder / "train").is_dir() and (folder / "test").is_dir()
    return ledger if whole and isinstance(ledger, dict) and ledger.get("key") == key else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    with (folder.parent / ".dataset.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _remove_leftovers(folder)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove what preparations that were killed had staged: who holds the lock is the only one at work."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.is_dir():  # the lock itself is a file
            shutil.rmtree(left, ignore_errors=True)
