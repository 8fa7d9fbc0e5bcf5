"""Export of a run's model for other tools: a plain model folder, with adapters merged into the base model."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from minisft.errors import UserError
from minisft.files import apply_umask
from minisft.manifest import record_folder, write_marker
from minisft.models import is_adapter, load_model, resolve_model, weights_fingerprint
from minisft.recipe import Recipe
from minisft.replacement import (
    delete_leftovers,
    delete_replaced,
    replaced_folders,
    require_replaceable,
    swap_folders,
    unused_name,
)
from minisft.results import read_results
from minisft.run_folder import RunFolder, record_base_model, warn_each
from minisft.training.checkpoints import copy_model, is_write_failure, reason_of

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BEST = "best"
_EXPORT = "export"  # what the marker of an exported model says


def export(
    recipe: Recipe,
    folder: Path,
    *,
    checkpoint: str | None = None,
    merge: bool = True,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write a run's model, tokenizer, template and generation config to `folder`, completely or not at all.

    Args:
        recipe: Recipe of the run; its `model` is the base that adapters are merged into, in fp32.
        folder: Path of a new or empty folder, or with `force` of an earlier export.
        checkpoint: Name of a checkpoint, or `best` for that of the highest BLEU; None: the final model.
        merge: False copies adapters without merging them.
        dtype: Number format of the weights: fp32, bf16 or fp16; None: unchanged, or fp32 where merged.
        force: Replace an earlier export in the folder; files that it did not write stay in FOLDER.old-N.

    Returns:
        Path of the folder that was exported.

    Raises:
        UserError: There is no such checkpoint, the folder is in use, or the base model is not the run's.
    """
    # 1. Find the model, and check the options and the folder.
    run = RunFolder(Path(recipe.output))
    source = _find_model(run, checkpoint)
    if dtype is not None and not merge and is_adapter(source):
        problem = "adapters that are not merged are copied in their own number format"
        raise UserError("--no-merge --dtype", problem, "leave out one of the two")
    _refuse_taken_folder(folder, recipe, force)

    # 2. Copy the model, and convert its weights where asked.
    with _replace_folder(folder) as new:
        copy_model(source, new)
        if is_adapter(source) and merge:
            base = resolve_model(recipe.model, recipe.trust_remote_code)
            record_base_model(run, str(base), weights_fingerprint(base.folder))  # it must be what they were trained on
            _convert_weights(new, source, base.folder, dtype or "fp32", recipe.trust_remote_code)
        elif dtype is not None and not is_adapter(source):
            _convert_weights(new, source, None, dtype, recipe.trust_remote_code)
        record_folder(new, new)
        apply_umask(new)
    return source


@contextlib.contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new marked folder to fill; at the end it is renamed to `folder`, and what it replaces is deleted."""
    target = folder.resolve()  # a link stays, and leads to the new model
    warn_each(delete_leftovers(target))
    new = unused_name(target, "new")
    new.mkdir(parents=True)
    try:
        write_marker(new, _EXPORT, target)
        yield new
        if not target.exists() or not any(target.iterdir()):
            new.replace(target)
            return
        swap_folders(new, target, _EXPORT, [path.name for path in replaced_folders(target)])
    except BaseException as error:
        if new.exists():
            shutil.rmtree(new, ignore_errors=True)  # this function has just made it
        if is_write_failure(error):
            problem = f"the model could not be written ({reason_of(error)})"
            raise UserError(folder, problem, "free some space, or name a folder on another disk") from None
        raise
    warn_each(delete_replaced(target, _EXPORT))


def _find_model(run: RunFolder, checkpoint: str | None) -> Path:
    """Return the folder of the final model, or of the checkpoint to export."""
    checkpoints = {path.name: path for path in run.list_checkpoints()}
    if checkpoint is None and run.is_trained():
        return run.model
    if checkpoint is None:
        fix = f"name one: --checkpoint {' or '.join(checkpoints)}" if checkpoints else "train first: minisft train"
        raise UserError(run.root, "this run has no final model yet", fix)
    name: str | None = checkpoint
    if checkpoint == BEST:
        results = read_results(run.root)
        if results is None:
            fix = f"run `minisft evaluate {run.root}` first"
            raise UserError(f"--checkpoint {BEST}", "the checkpoints are not scored yet", fix)
        name = results["best"]
    if name is None:
        fix = f"name a checkpoint: --checkpoint {' or '.join(checkpoints)}"
        raise UserError(f"--checkpoint {BEST}", "no checkpoint is scored, so none is best", fix)
    if name not in checkpoints:
        fix = f"choose among: {', '.join(checkpoints)}" if checkpoints else "leave the option out: there are none"
        raise UserError(f"--checkpoint {checkpoint}", f"{run.checkpoints} has no checkpoint of that name", fix)
    return checkpoints[name]


def _refuse_taken_folder(folder: Path, recipe: Recipe, force: bool) -> None:
    """Refuse a folder that is not empty, unless `force` may replace an earlier export in it; never replace an input."""
    run, target = RunFolder(Path(recipe.output)), folder.resolve()
    own = (run.model.resolve(), run.checkpoints.resolve())
    if any(path in own for path in (target, *target.parents)):
        raise UserError(folder, "this folder belongs to the run itself", "name another folder")
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(folder, "this is a file", "name a folder")
    for name, path in (("the run", run.root), ("the base model", Path(recipe.model))):
        if path.exists() and target in (path.resolve(), *path.resolve().parents):
            raise UserError(folder, f"{name} is in this folder ({path})", "name a folder that does not hold it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        fix = "name a new one, or pass --force to replace the model that it holds"
        raise UserError(folder, "this folder is not empty", fix)
    require_replaceable(target, _EXPORT)


def _convert_weights(folder: Path, source: Path, base: Path | None, dtype: str, trust_remote_code: bool) -> None:
    """Save the model of `source`, with adapters merged, to `folder`, in place of the weights that were copied there."""
    import torch

    model = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code, base=base, merge=True)
    for path in {*folder.glob("adapter_*"), *folder.glob("*.safetensors*")}:
        path.unlink()
    model.to(getattr(torch, _DTYPES[dtype])).save_pretrained(folder)
