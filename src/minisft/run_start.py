"""Starting, resuming and replacing a run: the checks, locks and renames of its folder."""

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import expand_pattern, hold_lock, is_pattern
from minisft.manifest import MANIFEST, MARKER, delete_written_files, read_marker, size_of_written_files, write_marker
from minisft.recipe import Recipe, TrainingRecipe
from minisft.replacement import (
    delete_leftovers,
    replaced_folders,
    require_replaceable,
    restore_replaced,
    swap_folders,
    unused_name,
)
from minisft.run_folder import (
    RUN_KIND,
    RunFolder,
    describe_run,
    load_run,
    run_identity,
    warn_each,
    write_resolved_recipe,
)

_DATA = ("data.source", "data.test")
_LOCKS = ("evaluation/.lock", "compare/.lock")  # of the other commands that write to a run folder
_LENGTH_KEYS = {"training.epochs", "training.max_steps"}
# Schedules whose learning rate does not depend on the number of steps; the warm-up, a fraction of all steps, does.
_FREE_OF_LENGTH, _FREE_AFTER_WARM_UP = ("constant",), ("constant_with_warmup", "inverse_sqrt")
_AT_WORK = {"evaluation": "the evaluation of this run", "compare": "the comparison in this folder"}
# Files of `compare` in an output folder, beside a run or without one; no run deletes them.
_COMPARISON = ("compare", "comparison.json", "comparison.md", "comparison.html", "comparison.png")


class StartedRun:
    """A run folder that only this process writes to.

    With `force` it stands beside the run that it is going to replace, which is unchanged until `replace_old_run`.

    Args:
        run: The folder to write to.
        recipe: The recipe, with that folder as `output`.
        old: The run that it replaces, if there is one.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, old: RunFolder | None = None) -> None:
        self.run, self.recipe, self._old = run, recipe, old

    @property
    def freed_bytes(self) -> int:
        """Bytes that deleting the replaced run frees at the first step."""
        return 0 if self._old is None else size_of_written_files(self._old.root)

    def replace_old_run(self) -> None:
        """Rename the new run to its final name, after all checks; the old run becomes NAME.old-N.

        `delete_replaced` deletes the old run; if the block of `start_run` fails before that, the old run is restored.

        Raises:
            OSError: A folder cannot be renamed; the old run then keeps its name.
        """
        if self._old is None:
            return
        new, old = self.run, self._old
        earlier = [path.name for path in replaced_folders(old.root)]
        write_resolved_recipe(new, replace(self.recipe, output=str(old.root)))
        renamed = swap_folders(new.root, old.root, RUN_KIND, earlier)
        self.run, self.recipe, self._old = old, replace(self.recipe, output=str(old.root)), None
        _move_comparison(renamed, old.root)


@contextlib.contextmanager
def start_run(
    recipe: Recipe, *, force: bool = False, resume: bool = False, prepares_only: bool = False
) -> Iterator[StartedRun]:
    """Open the run folder of `recipe`, as `open_run` does, or begin a new one that replaces it.

    Args:
        recipe: The recipe; its `output` is the folder.
        force: Begin a new run in a folder beside the existing one; `replace_old_run` replaces that one.
        resume: Resume an unfinished run.
        prepares_only: Only data is written, so the run may be trained already.

    Raises:
        UserError: The folder is not a run, is in use, holds another recipe's run, or is trained already.
    """
    run = RunFolder(Path(recipe.output))
    if force and run.is_run():
        refuse_start(recipe, force=force, resume=resume)
        with _start_replacement(run, recipe) as started:
            yield started
    else:
        with open_run(recipe, resume=resume, prepares_only=prepares_only) as run:
            yield StartedRun(run, recipe)


@contextlib.contextmanager
def open_run(recipe: Recipe, *, resume: bool = False, prepares_only: bool = False) -> Iterator[RunFolder]:
    """Lock the run folder of `recipe` for this process, and write its resolved recipe; existing files are kept.

    Args:
        recipe: The recipe; its `output` is the folder.
        resume: Resume an unfinished run.
        prepares_only: Only data is written, so the run may be trained already.

    Raises:
        UserError: The folder is not a run, is in use, holds another recipe's run, or is trained already.
    """
    run = RunFolder(Path(recipe.output))
    refuse_start(recipe, resume=resume, prepares_only=prepares_only)
    with _locked(run):
        warn_each(delete_leftovers(run.root))
        extends = False
        if run.recipe.exists():
            extends = _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)
        else:
            write_marker(run.root, RUN_KIND)
            # A process that was killed between two renames of a replacement left the earlier run under another name.
            root = run.root.resolve()
            olds = sorted(root.parent.glob(f"{glob.escape(root.name)}.old-*"))
            warn_each([f"note: {path} holds an earlier run of {run.root}" for path in olds if read_marker(path)])
        if not (prepares_only and run.has_begun()) and not extends:  # training writes the longer recipe when it resumes
            write_resolved_recipe(run, recipe)
        yield run


def refuse_start(recipe: Recipe, *, force: bool = False, resume: bool = False, prepares_only: bool = False) -> None:
    """Refuse what `start_run` would refuse, as far as it can be seen without writing anything.

    Raises:
        UserError: The folder is not a run, holds an input or another recipe's run, or is trained already.
    """
    if force and resume:
        raise UserError("--force --resume", "one replaces the run, the other resumes it", "give one of them")
    run = RunFolder(Path(recipe.output))
    refuse_foreign_folder(run)
    refuse_inputs_in_output(recipe)
    refuse_untrusted_links(run.root)
    if resume and not run.recipe.exists():
        raise UserError(run.root, "there is no run to resume", "train without --resume")
    if force and run.is_run():
        require_replaceable(_path_to_rename(run.root), RUN_KIND)
    elif run.recipe.exists():
        _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)


@contextlib.contextmanager
def _start_replacement(old: RunFolder, recipe: Recipe) -> Iterator[StartedRun]:
    """Begin a run beside the one that it is going to replace; if it fails before its first step, it is deleted."""
    root = _path_to_rename(old.root)
    with contextlib.ExitStack() as locks:
        locks.enter_context(_locked(RunFolder(root)))
        for lock in _LOCKS:
            if (root / lock).exists():
                locks.enter_context(_hold_or_refuse(root / lock))
        warn_each(delete_leftovers(root))
        new = unused_name(root, "new")
        warn_each([f"--force replaces {describe_run(old)}; it is kept until the new run has taken its first step"])
        new.mkdir()
        write_marker(new, RUN_KIND, root)
        try:
            with _locked(RunFolder(new)):
                started = StartedRun(RunFolder(new), replace(recipe, output=str(new)), RunFolder(root))
                write_resolved_recipe(started.run, recipe)
                yield started
        except BaseException:
            restore_replaced_run(RunFolder(root))
            raise
        finally:
            if new.exists():
                delete_written_files(new)


def restore_replaced_run(run: RunFolder) -> None:
    """Restore the run that this one replaces, if this one ended before its first step."""
    olds = replaced_folders(run.root)
    if olds:
        _move_comparison(run.root, olds[0])
        if restore_replaced(run.root, RUN_KIND):
            warn_each([f"{run.root} is the earlier run again: the new one took no step"])


@contextlib.contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """Create and lock the run folder; `evaluate --follow` tests this lock to see whether training is running."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a part of the path is a file, or it is too long
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(run.root, f"this `output` folder cannot be made ({reason})", "name another folder") from None
    with _hold_or_refuse(run.root / ".lock"):
        yield


@contextlib.contextmanager
def _hold_or_refuse(lock: Path) -> Iterator[None]:
    """Hold a lock of a run folder; a lock that another process holds is a user's error."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(lock))
        except BlockingIOError:
            problem = f"another process is at work in {_AT_WORK.get(lock.parent.name, 'this run folder')}"
            raise UserError(lock.parent, problem, "wait for it, or choose another `output`") from None
        yield


def refuse_foreign_folder(run: RunFolder) -> None:
    """Refuse an output folder that is neither new, nor empty, nor a run or a comparison.

    Raises:
        UserError: The folder holds something else; the message names it.
    """
    try:
        if os.path.lexists(run.root) and not run.root.is_dir():
            problem = "`output` is a link that leads nowhere" if run.root.is_symlink() else "`output` is a file"
            raise UserError(run.root, problem, "name a folder that is new or holds a run")
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
            f"this folder is not a run, and not empty (it holds {others[0]!r})",
            "name a new folder as `output`",
        )


def refuse_untrusted_links(root: Path) -> None:
    """Refuse to write to a run that was made elsewhere and holds links that lead out of it.

    In a run that was made here, such links are the user's own, for example to put `checkpoints` on another disk. In an
    untrusted run, writing through them would change files outside the run.

    Raises:
        UserError: There is such a link; the message names it.
    """
    if not root.is_dir() or read_marker(root) is not None:
        return
    inside = root.resolve()
    for parent, folders, names in os.walk(root):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and inside not in path.resolve().parents:
                problem = (
                    "this link leads out of the run folder, which was not made here: nothing is written to the run"
                )
                raise UserError(path, problem, "replace the link by what it leads to, if you trust it, or remove it")


def refuse_inputs_in_output(recipe: Recipe) -> None:
    """Refuse an output folder that holds an input, or that is inside a folder of data and so would be read as data.

    Raises:
        UserError: The message names the key of the input.
    """
    output = Path(recipe.output).resolve()
    for key, path in _inputs(recipe):
        if path == output or output in path.parents:
            problem = f"it lies in the `output` folder {recipe.output}, where --force would replace it"
            raise UserError(f"{key} {path}", problem, "name another folder as `output`, or move the input out of it")
        if key in _DATA and path in output.parents and path.is_dir():
            problem = (
                f"the `output` folder {recipe.output} lies in it, so that the run's own files would be read as data"
            )
            raise UserError(f"{key} {path}", problem, "name an `output` outside the folder of the data")


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield each input that is a local file or folder, with its key in the recipe; links are resolved."""
    named: list[tuple[str, Any]] = [
        ("model", recipe.model),
        ("data.source", recipe.data.source),
        ("data.test", recipe.data.test),
        ("data.template", recipe.data.template),
        ("evaluation.retain", recipe.evaluation.retain),
        ("evaluation.prompts", recipe.evaluation.prompts if isinstance(recipe.evaluation.prompts, str) else None),
    ]
    for key, value in named:
        listed = value if isinstance(value, list) else [value]
        if key == "data.test" and isinstance(value, dict) and "path" not in value:  # names to sources
            listed = [one for given in value.values() for one in (given if isinstance(given, list) else [given])]
        for entry in listed:
            path = entry.get("path") if isinstance(entry, dict) else entry
            with contextlib.suppress(OSError):  # a text that is too long to be a path
                if not isinstance(path, str):
                    continue
                if Path(path).exists():
                    yield key, Path(path).resolve()
                elif key in _DATA and is_pattern(Path(path)):
                    yield from ((key, match.resolve()) for _, match in expand_pattern(Path(path)))
                    if "**" in Path(path).parts:  # it also matches files that are written later
                        yield key, Path(path[: path.index("**")]).resolve()


def _path_to_rename(root: Path) -> Path:
    """Return the path to rename: where `root` is a link, the folder that it leads to, so that the link stays."""
    return root.resolve() if root.is_symlink() or root.name in ("", "..") else root


def _move_comparison(source: Path, target: Path) -> None:
    """Move the files that `compare` wrote beside a run."""
    for name in _COMPARISON:
        if os.path.lexists(source / name) and not os.path.lexists(target / name):
            (source / name).rename(target / name)


def _as_in_yaml(value: object) -> str:
    """Return a value of a recipe as its file has it: null and true, and not Python's None and True."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _refuse_other_run(run: RunFolder, recipe: Recipe, *, resume: bool, prepares_only: bool) -> bool:
    """Refuse a recipe that may not continue the run in its folder; return whether it only makes that run longer."""
    if resume and _extends_run(run, recipe):
        _require_extendable(recipe.training)
        return True
    if not run.has_begun():
        if read_marker(run.root) is None:  # a copied recipe.yaml does not make a folder a run
            problem = "it holds the recipe of a run, but MiniSFT did not begin a run in this folder"
            raise UserError(run.root, problem, "name a new folder as `output`")
        return False  # only prepared: nothing that took long is lost
    earlier, now, changed = _changes(run, recipe)
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            run.root,
            f"holds another recipe's run: {key} is {_as_in_yaml(earlier.get(key))} there, "
            f"{_as_in_yaml(now[key])} here{more}",
            "choose another `output`, give the keys that the run has, or replace it with `minisft train --force`"
            + ("; --resume makes it longer" if _extends_run(run, recipe) else ""),
        )
    if run.is_trained() and not prepares_only:
        raise UserError(
            run.root,
            "this run is trained already",
            "evaluate or chat with it, or pass --force to train it again",
        )
    if not (resume or prepares_only):
        raise UserError(run.root, "holds an unfinished run", "pass --resume to resume it, or --force to start over")
    return False


def _changes(run: RunFolder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the run identities of the folder and of a recipe, and the keys in which they differ."""
    earlier, now = run_identity(load_run(run.root)), run_identity(recipe)
    return earlier, now, [key for key in now if now[key] != earlier.get(key)]


def _extends_run(run: RunFolder, recipe: Recipe) -> bool:
    """Return whether a recipe differs from that of a begun run only in a larger number of epochs or steps."""
    changed = _changes(run, recipe)[2]
    if not run.has_begun() or not changed or not set(changed) <= _LENGTH_KEYS:
        return False
    earlier, now = load_run(run.root).training, recipe.training
    if earlier.max_steps is None or now.max_steps is None:
        return earlier.max_steps == now.max_steps and now.epochs > earlier.epochs
    return now.max_steps > earlier.max_steps


def _require_extendable(training: TrainingRecipe) -> None:
    """Refuse to make a run longer if the steps so far would have been different in the longer run.

    Raises:
        UserError: They depend on the number of steps; the message names the key that makes them so.
    """
    if training.early_stopping is not None:
        problem = "early stopping decides where this run ends, and has already used the loss or the score at its end"
        raise UserError("training.early_stopping", problem, "train again with --force, or into another `output`")
    if training.scheduler not in (*_FREE_OF_LENGTH, *_FREE_AFTER_WARM_UP):
        raise UserError(
            "training.scheduler",
            f"the learning rate of {training.scheduler} depends on the number of steps, so a longer run would have "
            "differed from its first step; --resume makes a run longer only where the rate is constant",
            "train again with --force and the larger number, or begin another run with this model/ as its `model`",
        )
    if training.scheduler in _FREE_AFTER_WARM_UP and training.warmup_ratio > 0:
        raise UserError(
            "training.warmup_ratio",
            f"the warm-up is a fraction of all steps, {training.warmup_ratio}, so a longer run has a longer warm-up",
            "train again with --force and the larger number; with warmup_ratio 0 a run can be made longer later",
        )
