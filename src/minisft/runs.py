"""The run folder: where everything of a run lies, and which recipe it belongs to."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import files_of_pattern, hold_lock, is_pattern, refuse_huge_files, write_atomically
from minisft.json_files import read_json
from minisft.longer import is_only_longer, refuse_other_trajectory
from minisft.manifest import MANIFEST, MARKER, delete_written, mark, read_marker, written_bytes
from minisft.recipe import Recipe, dump_recipe, load_recipe
from minisft.replacement import (
    delete_left_overs,
    delete_replaced,
    free_name,
    replaced_folders,
    require_replaceable,
    restore_replaced,
    take_name,
)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The first line of a run's recipe: what tells a run folder from a folder that happens to hold a recipe.
_MARK = "# The resolved recipe of a MiniSFT run; change the recipe it came from, not this file.\n"
_RUN = "run"  # of the marker
_DATA = ("data.source", "data.test")
_LOCKS = ("evaluation/.lock", "compare/.lock")  # of other commands that work in a run folder
_AT_WORK = {"evaluation": "the evaluation of this run", "compare": "the comparison in this folder"}
# What `compare` writes into an output folder, beside a run or without one; no run deletes it.
_COMPARISON = ("compare", "comparison.json", "comparison.md", "comparison.html", "comparison.png")
# A user's consent to a model's own code, as a word of the command line, and its absence.
CONSENT, NO_CONSENT = "trust_remote_code=true", "trust_remote_code=false"
TRUST_OPTION = "--trust-remote-code"
# Bytes that the small files of a run have at most, far above what any run came to.
_LARGEST = {
    "recipe.yaml": 1 << 20, "*.json": 64 << 20, "dataset/*.json": 64 << 20, "evaluation/*.json": 64 << 20,
    "checkpoints/*/trainer_state.json": 256 << 20, "metrics.jsonl": 256 << 20, "evaluation/*/*.jsonl": 256 << 20,
    "model/*.json": 128 << 20, "model/*.jinja": 1 << 20, "checkpoints/*/*.jinja": 1 << 20,
    "checkpoints/*/*config.json": 16 << 20, "checkpoints/*/tokenizer.json": 128 << 20,
}  # fmt: skip
# Keys that may change on resume, since the trajectory does not depend on them.
_FREE_DATA_KEYS = ("verify", "processes")
_FREE_TRAINING_KEYS = (
    "strategy", "processes", "batch_size", "gradient_accumulation", "save_every", "log_every",
    "gradient_checkpointing", "row_tokens", "memory_limit_gb", "report_to", "keep_optimizer", "keep_checkpoints",
    "offload",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, as the contract names them."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def base_model(self) -> Path:
        return self.root / "base_model.json"

    @property
    def check(self) -> Path:
        return self.root / "check.json"

    @property
    def scratch(self) -> Path:
        """Where `check` trains a few steps; it removes the folder at its end."""
        return self.root / ".check"

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoint folders in the order of their steps."""
        return list_checkpoints(self.checkpoints)

    def is_run(self) -> bool:
        """Say whether MiniSFT wrote this folder."""
        return _is_resolved_recipe(self.recipe)

    def is_trained(self) -> bool:
        """Say whether training ended: the final model is written last, and whole."""
        return any((self.model / name).exists() for name in ("config.json", "adapter_config.json"))

    def has_begun(self) -> bool:
        """Say whether there is anything that training made."""
        return self.is_trained() or self.metrics.exists() or bool(self.list_checkpoints())


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N in the order of N; they are whole, since they get their names last."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint folder"
    return int(match[1])


def load_run(root: Path, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> Recipe:
    """Return the resolved recipe of a run folder, which may be a stranger's.

    What the file says of `trust_remote_code` does not count: consent comes from the user, each time.

    Args:
        root: the folder.
        overrides: `key=value` words that the user gave.
        trust_remote_code: the user, or the process that started this one, consents to the model's own code.

    Raises:
        UserError: the folder is no run, or one of its small files is too large to be one.
    """
    run = RunFolder(root)
    if not run.is_run():
        raise UserError(
            root,
            "this is no run folder (it has no recipe.yaml of a run)",
            "give the `output` of a recipe that was run",
        )
    refuse_huge_files(root, _LARGEST)
    words = [NO_CONSENT, *overrides, *([CONSENT] if trust_remote_code else [])]
    return replace(load_recipe(run.recipe, words), output=str(root))


def worker_consent(recipe: Recipe) -> list[str]:
    """Return what a process that reads a run folder's recipe must be told beside the folder."""
    return [TRUST_OPTION] if recipe.trust_remote_code else []


def run_of(recipe: Path) -> Path | None:
    """Return the run folder whose own resolved recipe a path names, if it does."""
    return recipe.parent if recipe.name == "recipe.yaml" and _is_resolved_recipe(recipe) else None


def is_of_a_run(recipe: Path) -> bool:
    """Say whether a recipe file came with a run, and not from the user: such a file carries no consent."""
    if _is_resolved_recipe(recipe):
        return True
    beside = ("checkpoints", "model", "metrics.jsonl", "base_model.json", "dataset/ledger.json")
    return recipe.name == "recipe.yaml" and any((recipe.parent / name).exists() for name in beside)


def _is_resolved_recipe(path: Path) -> bool:
    """Read no more than the first line, however large the file is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return what identifies a run: model, data, seed, optimisation and global batch, by dotted key."""
    training = recipe.training
    batch = training.batch_size * training.processes * training.gradient_accumulation
    keys: dict[str, Any] = {"model": recipe.model, "seed": recipe.seed}
    keys |= {f"data.{k}": v for k, v in asdict(recipe.data).items() if k not in _FREE_DATA_KEYS}
    free = _FREE_TRAINING_KEYS + (("eval_every",) if training.early_stopping is None else ())
    keys |= {f"training.{k}": v for k, v in asdict(training).items() if k not in free}
    return keys | {"the global batch (batch_size x processes x gradient_accumulation)": batch}


def is_same_run(run: RunFolder, recipe: Recipe) -> bool:
    """Say whether the folder holds a run that `recipe` identifies."""
    return run.is_run() and identity(load_run(run.root)) == identity(recipe)


class StartedRun:
    """A run folder that this process alone works in.

    Under `force` it lies beside the run that it is going to replace, which stays as it is until `take_place`.

    Args:
        run: the folder to work in.
        recipe: the recipe, with that folder as `output`.
        old: the run that it replaces, if there is one.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, old: RunFolder | None = None) -> None:
        self.run, self.recipe, self._old = run, recipe, old

    @property
    def freed(self) -> int:
        """Bytes that the run to be replaced gives back at the first step."""
        return 0 if self._old is None else written_bytes(self._old.root)

    def take_place(self) -> None:
        """Give the new run its name, once all that can be checked is: the old one is renamed to NAME.old-N.

        It is deleted by `delete_replaced`; it comes back where the block of `start_run` ends with an error before that.

        Raises:
            OSError: a folder cannot be renamed; then the old run has its name.
        """
        if self._old is None:
            return
        new, old = self.run, self._old
        earlier = [path.name for path in replaced_folders(old.root)]
        rewrite_recipe(new, replace(self.recipe, output=str(old.root)))
        aside = take_name(new.root, old.root, _RUN, earlier)
        self.run, self.recipe, self._old = old, replace(self.recipe, output=str(old.root)), None
        _move_comparison(aside, old.root)


@contextlib.contextmanager
def start_run(
    recipe: Recipe, *, force: bool = False, resume: bool = False, prepares_only: bool = False
) -> Iterator[StartedRun]:
    """Give the run folder of `recipe` to this process alone, as `open_run` does, or a new one that replaces it.

    Args:
        recipe: its `output` is the folder.
        force: begin anew, in a folder beside the run that the folder holds; `take_place` replaces that run.
        resume: go on with an unfinished run.
        prepares_only: nothing that was trained is touched, so a trained run is no obstacle.

    Raises:
        UserError: the folder is something else, is in use, holds another recipe's run, or is trained already.
    """
    run = RunFolder(Path(recipe.output))
    if force and run.is_run():
        refuse_start(recipe, force=force, resume=resume)
        with _beside(run, recipe) as started:
            yield started
    else:
        with open_run(recipe, resume=resume, prepares_only=prepares_only) as run:
            yield StartedRun(run, recipe)


@contextlib.contextmanager
def open_run(recipe: Recipe, *, resume: bool = False, prepares_only: bool = False) -> Iterator[RunFolder]:
    """Give the run folder of `recipe` to this process alone; what an earlier run made is kept.

    Args:
        recipe: its `output` is the folder.
        resume: go on with an unfinished run.
        prepares_only: nothing that was trained is touched, so a trained run is no obstacle.

    Raises:
        UserError: the folder is something else, is in use, holds another recipe's run, or is trained already.
    """
    run = RunFolder(Path(recipe.output))
    refuse_start(recipe, resume=resume, prepares_only=prepares_only)
    with _locked(run):
        _tell(delete_left_overs(run.root))
        longer = False
        if run.recipe.exists():
            longer = _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)
        else:
            mark(run.root, _RUN)
            _name_earlier_runs(run.root)
        if not (prepares_only and run.has_begun()) and not longer:  # which is written when the run goes on
            rewrite_recipe(run, recipe)
        yield run


def refuse_start(recipe: Recipe, *, force: bool = False, resume: bool = False, prepares_only: bool = False) -> None:
    """Refuse what `start_run` would refuse, as far as looking tells; nothing is written.

    Raises:
        UserError: the folder is something else, holds an input or another recipe's run, or is trained already.
    """
    if force and resume:
        raise UserError("--force --resume", "one replaces the run, the other goes on with it", "give one of them")
    run = RunFolder(Path(recipe.output))
    refuse_foreign_folder(run)
    refuse_inputs_in_output(recipe)
    refuse_strangers_links(run.root)
    if resume and not run.recipe.exists():
        raise UserError(run.root, "there is no run to resume", "train without --resume")
    if force and run.is_run():
        require_replaceable(_place_of(run.root), _RUN)
    elif run.recipe.exists():
        _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)


@contextlib.contextmanager
def _beside(old: RunFolder, recipe: Recipe) -> Iterator[StartedRun]:
    """Begin a run beside the one that it is going to replace; if it ends before its first step, nothing of it stays."""
    root = _place_of(old.root)
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(RunFolder(root)))
        for lock in _LOCKS:
            if (root / lock).exists():
                held.enter_context(_refusing_held(root / lock))
        _tell(delete_left_overs(root))
        new = free_name(root, "new")
        _tell([f"--force replaces {describe_run(old)}; it is kept until the new run has taken its first step"])
        new.mkdir()
        mark(new, _RUN, root)
        try:
            with _locked(RunFolder(new)):
                started = StartedRun(RunFolder(new), replace(recipe, output=str(new)), RunFolder(root))
                rewrite_recipe(started.run, recipe)
                yield started
        except BaseException:
            restore_run(RunFolder(root))
            raise
        finally:
            if new.exists():
                delete_written(new)


def delete_replaced_run(run: RunFolder) -> None:
    """Delete the run that this one replaces, now that it has taken its first step; foreign files in it stay."""
    _tell(delete_replaced(run.root, _RUN))


def restore_run(run: RunFolder) -> None:
    """Give the run that this one replaces its name back, where this one has ended before its first step."""
    olds = replaced_folders(run.root)
    if olds:
        _move_comparison(run.root, olds[0])
        if restore_replaced(run.root, _RUN):
            _tell([f"{run.root} is the earlier run again: the new one took no step"])


def rewrite_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Make `recipe` the resolved recipe of a run that this process has opened."""
    write_atomically(run.recipe, _MARK + dump_recipe(recipe))


@contextlib.contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """Hold the run folder; `evaluate --follow` takes the lock for a moment to see whether it is held."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a part of the path is a file, or it is too long
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(run.root, f"this `output` folder cannot be made ({reason})", "name another folder") from None
    with _refusing_held(run.root / ".lock"):
        yield


@contextlib.contextmanager
def _refusing_held(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_lock(lock))
        except BlockingIOError:
            what = f"another process is at work in {_AT_WORK.get(lock.parent.name, 'this run folder')}"
            raise UserError(lock.parent, what, "wait for it, or choose another `output`") from None
        yield


def refuse_foreign_folder(run: RunFolder) -> None:
    """Refuse an output folder that holds something else than a run or a comparison.

    Raises:
        UserError: naming what it holds.
    """
    try:
        if os.path.lexists(run.root) and not run.root.is_dir():
            what = "`output` is a link that leads nowhere" if run.root.is_symlink() else "`output` is a file"
            raise UserError(run.root, what, "name a folder that is new or holds a run")
        if run.is_run() or not run.root.exists():
            return
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(run.root, f"this cannot be an `output` folder ({reason})", "name another folder") from None
    own = (".lock", MARKER, MANIFEST, *_COMPARISON)
    others = [path.name for path in run.root.iterdir() if path.name not in own]
    if others:
        raise UserError(
            run.root,
            f"this folder is no run, and not empty (it holds {others[0]!r})",
            "name a new folder as `output`",
        )


def refuse_strangers_links(root: Path) -> None:
    """Refuse to write into a run that was not made here and holds links that lead out of it.

    In a run of one's own such links are the user's, as when `checkpoints` lies on another disk. In one that came from
    somebody else, writing through them would change files outside the run.

    Raises:
        UserError: naming a link.
    """
    if not root.is_dir() or read_marker(root) is not None:
        return
    inside = root.resolve()
    for parent, folders, names in os.walk(root):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and inside not in path.resolve().parents:
                what = "this link leads out of the run folder, which was not made here: nothing is written to the run"
                raise UserError(path, what, "replace the link by what it leads to, if you trust it, or remove it")


def refuse_inputs_in_output(recipe: Recipe) -> None:
    """Refuse an output folder that holds an input, or lies in a folder of data, which would be read as data.

    Raises:
        UserError: naming the key of the input.
    """
    output = Path(recipe.output).resolve()
    for key, path in _inputs(recipe):
        if path == output or output in path.parents:
            what = f"it lies in the `output` folder {recipe.output}, where --force would replace it"
            raise UserError(f"{key} {path}", what, "name another folder as `output`, or move the input out of it")
        if key in _DATA and path in output.parents and path.is_dir():
            what = f"the `output` folder {recipe.output} lies in it, so that the run's own files would be read as data"
            raise UserError(f"{key} {path}", what, "name an `output` outside the folder of the data")


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield each input that is a file or a folder here, links resolved, with its key in the recipe."""
    named: list[tuple[str, Any]] = [
        ("model", recipe.model),
        ("data.source", recipe.data.source),
        ("data.test", recipe.data.test),
        ("data.template", recipe.data.template),
        ("evaluation.prompts", recipe.evaluation.prompts if isinstance(recipe.evaluation.prompts, str) else None),
    ]
    for key, value in named:
        for entry in value if isinstance(value, list) else [value]:
            path = entry.get("path") if isinstance(entry, dict) else entry
            with contextlib.suppress(OSError):  # a text too long for a path is none
                if not isinstance(path, str):
                    continue
                if Path(path).exists():
                    yield key, Path(path).resolve()
                elif key in _DATA and is_pattern(Path(path)):
                    yield from ((key, found.resolve()) for _, found in files_of_pattern(Path(path)))
                    if "**" in Path(path).parts:  # what it matches grows with the folder
                        yield key, Path(path[: path.index("**")]).resolve()


def _place_of(root: Path) -> Path:
    """Return the path to rename: a link to a run folder stays, and leads to the run that replaces it."""
    return root.resolve() if root.is_symlink() or root.name in ("", "..") else root


def describe_run(run: RunFolder) -> str:
    """Say what a run folder holds and how large it is."""
    count = len(run.list_checkpoints())
    state = "a trained run" if run.is_trained() else "an unfinished run" if run.has_begun() else "prepared data"
    checkpoints = f" with {count} checkpoint{'s' if count != 1 else ''}" if count else ""
    return f"{run.root} ({state}{checkpoints}, {written_bytes(run.root.resolve()) / 1e6:,.1f} MB)"


def _move_comparison(source: Path, target: Path) -> None:
    """Take along what `compare` wrote beside a run."""
    for name in _COMPARISON:
        if os.path.lexists(source / name) and not os.path.lexists(target / name):
            (source / name).rename(target / name)


def _name_earlier_runs(root: Path) -> None:
    """Name runs that were being replaced when a process was killed between two renames."""
    place = root.resolve()
    olds = sorted(place.parent.glob(f"{glob.escape(place.name)}.old-*"))
    _tell([f"note: {path} holds an earlier run of {root}" for path in olds if read_marker(path)])


def _tell(sentences: Sequence[str]) -> None:
    from minisft.console import warn

    for sentence in sentences:
        warn(sentence)


def _refuse_other_run(run: RunFolder, recipe: Recipe, *, resume: bool, prepares_only: bool) -> bool:
    """Refuse what must not go on in a run folder; say whether the recipe is that of the run, but longer."""
    if resume and _is_longer(run, recipe):
        refuse_other_trajectory(recipe.training)
        return True
    if not run.has_begun():
        if read_marker(run.root) is None:  # a copied recipe.yaml does not make a folder a run
            what = "it holds the recipe of a run, but MiniSFT did not begin a run in this folder"
            raise UserError(run.root, what, "name a new folder as `output`")
        return False  # prepared only: nothing that took long is lost
    earlier, now, changed = _changes(run, recipe)
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            run.root,
            f"holds another recipe's run: {key} is {earlier.get(key)!r} there, {now[key]!r} here{more}",
            "choose another `output`, or pass --force to replace that run"
            + ("; --resume goes on with it" if _is_longer(run, recipe) else ""),
        )
    if run.is_trained() and not prepares_only:
        raise UserError(
            run.root,
            "this run is trained already",
            "evaluate or chat with it, or pass --force to train it anew",
        )
    if not (resume or prepares_only):
        raise UserError(run.root, "holds an unfinished run", "pass --resume to go on with it, or --force to begin anew")
    return False


def _changes(run: RunFolder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return what identifies the folder's run and a recipe's, and the keys in which they differ."""
    earlier, now = identity(load_run(run.root)), identity(recipe)
    return earlier, now, [key for key in now if now[key] != earlier.get(key)]


def _is_longer(run: RunFolder, recipe: Recipe) -> bool:
    """Say whether a recipe is that of a begun run, with more epochs or steps."""
    changed = _changes(run, recipe)[2]
    return run.has_begun() and is_only_longer(changed, load_run(run.root).training, recipe.training)


def remember_environment(run: RunFolder, found: dict[str, Any]) -> None:
    """Keep on what machine and with which versions the run was last trained."""
    write_atomically(run.environment, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def remember_model(run: RunFolder, origin: str, fingerprint: str) -> None:
    """Keep which base model a run was begun with, and refuse to go on with another.

    Raises:
        UserError: the model's name leads to other weights or another tokenizer than it did.
    """
    now = {"origin": origin, "fingerprint": fingerprint}
    if not run.base_model.exists():
        write_atomically(run.base_model, json.dumps(now, indent=1, ensure_ascii=False))
    refuse_other_model(run, origin, fingerprint)


def refuse_other_model(run: RunFolder, origin: str, fingerprint: str) -> None:
    """Check that a base model is the one that the run was begun with, where the run remembers it.

    Raises:
        UserError: it is another.
    """
    if not run.base_model.exists():
        return
    fix = "restore it from a copy, or delete it where you know that `model` is still what the run began with"
    before = read_json(run.base_model, fix, origin=str, fingerprint=str)
    if before["fingerprint"] != fingerprint:
        raise UserError(
            "model",
            f"this run began with {before['origin']}, and the name now leads to {origin}, which is not the same",
            "give the model's folder as `model`, or pass --force to train anew",
        )
