"""Starting, resuming and replacing a run: the checks, locks and renames on its folder."""

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
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
from minisft.run_folder import _RUN, RunFolder, _warn_each, describe_run, load_run, run_identity, write_resolved_recipe

_DATA = ("data.source", "data.test")
_LOCKS = ("evaluation/.lock", "compare/.lock")  # of other commands that work in a run folder
_AT_WORK = {"evaluation": "the evaluation of this run", "compare": "the comparison in this folder"}
# What `compare` writes into an output folder, beside a run or without one; no run deletes it.
_COMPARISON = ("compare", "comparison.json", "comparison.md", "comparison.html", "comparison.png")


class StartedRun:
    """A run folder that this process alone works in.

    Under `force` it lies beside the run that it is going to replace, which stays as it is until `replace_old_run`.

    Args:
        run: the folder to work in.
        recipe: the recipe, with that folder as `output`.
        old: the run that it replaces, if there is one.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, old: RunFolder | None = None) -> None:
        self.run, self.recipe, self._old = run, recipe, old

    @property
    def freed_bytes(self) -> int:
        """Bytes that the run to be replaced gives back at the first step."""
        return 0 if self._old is None else size_of_written_files(self._old.root)

    def replace_old_run(self) -> None:
        """Give the new run its name, once all that can be checked is: the old one is renamed to NAME.old-N.

        It is deleted by `delete_replaced`; it comes back where the block of `start_run` ends with an error before that.

        Raises:
            OSError: a folder cannot be renamed; then the old run has its name.
        """
        if self._old is None:
            return
        new, old = self.run, self._old
        earlier = [path.name for path in replaced_folders(old.root)]
        write_resolved_recipe(new, replace(self.recipe, output=str(old.root)))
        temporary = swap_folders(new.root, old.root, _RUN, earlier)
        self.run, self.recipe, self._old = old, replace(self.recipe, output=str(old.root)), None
        _move_comparison(temporary, old.root)


@contextlib.contextmanager
def start_run(
    recipe: Recipe, *, force: bool = False, resume: bool = False, prepares_only: bool = False
) -> Iterator[StartedRun]:
    """Give the run folder of `recipe` to this process alone, as `open_run` does, or a new one that replaces it.

    Args:
        recipe: its `output` is the folder.
        force: begin anew, in a folder beside the run that the folder holds; `replace_old_run` replaces that run.
        resume: go on with an unfinished run.
        prepares_only: nothing that was trained is touched, so a trained run is no obstacle.

    Raises:
        UserError: the folder is something else, is in use, holds another recipe's run, or is trained already.
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
        _warn_each(delete_leftovers(run.root))
        longer = False
        if run.recipe.exists():
            longer = _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)
        else:
            write_marker(run.root, _RUN)
            _report_earlier_runs(run.root)
        if not (prepares_only and run.has_begun()) and not longer:  # which is written when the run goes on
            write_resolved_recipe(run, recipe)
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
    refuse_untrusted_links(run.root)
    if resume and not run.recipe.exists():
        raise UserError(run.root, "there is no run to resume", "train without --resume")
    if force and run.is_run():
        require_replaceable(_path_to_rename(run.root), _RUN)
    elif run.recipe.exists():
        _refuse_other_run(run, recipe, resume=resume, prepares_only=prepares_only)


@contextlib.contextmanager
def _start_replacement(old: RunFolder, recipe: Recipe) -> Iterator[StartedRun]:
    """Begin a run beside the one that it is going to replace; if it ends before its first step, nothing of it stays."""
    root = _path_to_rename(old.root)
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(RunFolder(root)))
        for lock in _LOCKS:
            if (root / lock).exists():
                held.enter_context(_refusing_held(root / lock))
        _warn_each(delete_leftovers(root))
        new = unused_name(root, "new")
        _warn_each([f"--force replaces {describe_run(old)}; it is kept until the new run has taken its first step"])
        new.mkdir()
        write_marker(new, _RUN, root)
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
    """Give the run that this one replaces its name back, where this one has ended before its first step."""
    olds = replaced_folders(run.root)
    if olds:
        _move_comparison(run.root, olds[0])
        if restore_replaced(run.root, _RUN):
            _warn_each([f"{run.root} is the earlier run again: the new one took no step"])


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
            problem = f"another process is at work in {_AT_WORK.get(lock.parent.name, 'this run folder')}"
            raise UserError(lock.parent, problem, "wait for it, or choose another `output`") from None
        yield


def refuse_foreign_folder(run: RunFolder) -> None:
    """Refuse an output folder that holds something else than a run or a comparison.

    Raises:
        UserError: naming what it holds.
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
            f"this folder is no run, and not empty (it holds {others[0]!r})",
            "name a new folder as `output`",
        )


def refuse_untrusted_links(root: Path) -> None:
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
                problem = (
                    "this link leads out of the run folder, which was not made here: nothing is written to the run"
                )
                raise UserError(path, problem, "replace the link by what it leads to, if you trust it, or remove it")


def refuse_inputs_in_output(recipe: Recipe) -> None:
    """Refuse an output folder that holds an input, or lies in a folder of data, which would be read as data.

    Raises:
        UserError: naming the key of the input.
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
                    yield from ((key, found.resolve()) for _, found in expand_pattern(Path(path)))
                    if "**" in Path(path).parts:  # what it matches grows with the folder
                        yield key, Path(path[: path.index("**")]).resolve()


def _path_to_rename(root: Path) -> Path:
    """Return the path to rename: a link to a run folder stays, and leads to the run that replaces it."""
    return root.resolve() if root.is_symlink() or root.name in ("", "..") else root


def _move_comparison(source: Path, target: Path) -> None:
    """Take along what `compare` wrote beside a run."""
    for name in _COMPARISON:
        if os.path.lexists(source / name) and not os.path.lexists(target / name):
            (source / name).rename(target / name)


def _report_earlier_runs(root: Path) -> None:
    """Name runs that were being replaced when a process was killed between two renames."""
    place = root.resolve()
    olds = sorted(place.parent.glob(f"{glob.escape(place.name)}.old-*"))
    _warn_each([f"note: {path} holds an earlier run of {root}" for path in olds if read_marker(path)])


def _refuse_other_run(run: RunFolder, recipe: Recipe, *, resume: bool, prepares_only: bool) -> bool:
    """Refuse what must not go on in a run folder; say whether the recipe is that of the run, but longer."""
    if resume and _extends_run(run, recipe):
        require_extendable(recipe.training)
        return True
    if not run.has_begun():
        if read_marker(run.root) is None:  # a copied recipe.yaml does not make a folder a run
            problem = "it holds the recipe of a run, but MiniSFT did not begin a run in this folder"
            raise UserError(run.root, problem, "name a new folder as `output`")
        return False  # prepared only: nothing that took long is lost
    earlier, now, changed = _changes(run, recipe)
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            run.root,
            f"holds another recipe's run: {key} is {earlier.get(key)!r} there, {now[key]!r} here{more}",
            "choose another `output`, or pass --force to replace that run"
            + ("; --resume goes on with it" if _extends_run(run, recipe) else ""),
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
    earlier, now = run_identity(load_run(run.root)), run_identity(recipe)
    return earlier, now, [key for key in now if now[key] != earlier.get(key)]


def _extends_run(run: RunFolder, recipe: Recipe) -> bool:
    """Say whether a recipe is that of a begun run, with more epochs or steps."""
    changed = _changes(run, recipe)[2]
    return run.has_begun() and only_extends(changed, load_run(run.root).training, recipe.training)


_KEYS = {"training.epochs", "training.max_steps"}
# Their learning rate does not depend on the number of all steps; the warm-up, a share of it, does.
_FREE, _FREE_BUT_FOR_WARM_UP = ("constant",), ("constant_with_warmup", "inverse_sqrt")


def only_extends(changed: Iterable[str], earlier: TrainingRecipe, now: TrainingRecipe) -> bool:
    """Say whether two recipes of a run, whose keys `changed` differ, differ in a larger number of epochs or steps."""
    if not changed or not set(changed) <= _KEYS:
        return False
    if earlier.max_steps is None or now.max_steps is None:
        return earlier.max_steps == now.max_steps and now.epochs > earlier.epochs
    return now.max_steps > earlier.max_steps


def require_extendable(training: TrainingRecipe) -> None:
    """Refuse to make a run longer whose steps so far would not be those of the longer run.

    Raises:
        UserError: naming the key that makes them depend on the end, and how to go on.
    """
    if training.early_stopping is not None:
        problem = "early stopping decides where this run ends, and has looked at the loss at its end"
        raise UserError("training.early_stopping", problem, "train anew with --force, or into another `output`")
    if training.scheduler not in (*_FREE, *_FREE_BUT_FOR_WARM_UP):
        raise UserError(
            "training.scheduler",
            f"the learning rate of {training.scheduler} reaches its end with the last step, so the steps of a longer "
            "run would have been others from the beginning; --resume makes a run longer with a constant rate alone",
            "train anew with --force and the larger number, or begin another run with this one's model/ as its `model`",
        )
    if training.scheduler in _FREE_BUT_FOR_WARM_UP and training.warmup_ratio > 0:
        raise UserError(
            "training.warmup_ratio",
            f"the warm-up is a share of all steps, {training.warmup_ratio}, so that of a longer run is longer",
            "train anew with --force and the larger number; with warmup_ratio 0 a run can be made longer later",
        )
