"""A run's model for other tools: a plain model folder, with adapters merged into the base model."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from minisft.console import warn
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
from minisft.run_folder import RunFolder, record_base_model
from minisft.training.checkpoints import copy_model, is_write_failure, reason_of

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BEST = "best"
_EXPORT = "export"  # of the marker


def export(
    recipe: Recipe,
    folder: Path,
    *,
    checkpoint: str | None = None,
    merge: bool = True,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write a run's model into `folder`, whole or not at all, with tokenizer, template and generation config.

    Args:
        recipe: of the run; its `model` is the base that adapters are merged into, in fp32.
        folder: new or empty, unless `force` replaces the exported model that it holds.
        checkpoint: the name of a checkpoint, or `best`, that of the highest BLEU; None: the final model.
        merge: False copies adapters as they are.
        dtype: fp32, bf16 or fp16; None: as they are, or fp32 where merged.
        force: replace what an earlier export wrote into the folder; files that it did not write stay in FOLDER.old-N.

    Returns:
        The folder that was exported.

    Raises:
        UserError: there is no such checkpoint, the folder is in use, or the base model is not the run's.
    """
    run = RunFolder(Path(recipe.output))
    source = _source(run, checkpoint)
    if dtype is not None and not merge and is_adapter(source):
        problem = "adapters that are not merged are copied as they are, in their own number format"
        raise UserError("--no-merge --dtype", problem, "leave out one of the two")
    _require_free(folder, recipe, force)
    with _in_place_of(folder) as new:
        copy_model(source, new)
        if is_adapter(source) and merge:
            _replace_weights(new, source, _base(recipe, run), dtype or "fp32", recipe.trust_remote_code)
        elif dtype is not None and not is_adapter(source):
            _replace_weights(new, source, None, dtype, recipe.trust_remote_code)
        record_folder(new, new)
        apply_umask(new)
    return source


@contextlib.contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """Give a new marked folder to fill; it gets the name `folder` at the end, and what it replaces is deleted then."""
    place = folder.resolve()  # a link stays, and leads to the new model
    for said in delete_leftovers(place):
        warn(said)
    new = unused_name(place, "new")
    new.mkdir(parents=True)
    try:
        write_marker(new, _EXPORT, place)
        yield new
        if not place.exists() or not any(place.iterdir()):
            new.replace(place)
            return
        swap_folders(new, place, _EXPORT, [path.name for path in replaced_folders(place)])
    except BaseException as error:
        if new.exists():
            shutil.rmtree(new, ignore_errors=True)  # made here, a moment ago
        if is_write_failure(error):
            problem = f"the model could not be written ({reason_of(error)})"
            raise UserError(folder, problem, "make room, or name a folder on another disk") from None
        raise
    for said in delete_replaced(place, _EXPORT):
        warn(said)


def _source(run: RunFolder, checkpoint: str | None) -> Path:
    """Return the folder to export."""
    checkpoints = {path.name: path for path in run.list_checkpoints()}
    if checkpoint is None and run.is_trained():
        return run.model
    if checkpoint is None:
        fix = f"name one: --checkpoint {' or '.join(checkpoints)}" if checkpoints else "train first: minisft train"
        raise UserError(run.root, "this run has no final model yet", fix)
    name = _best(run) if checkpoint == BEST else checkpoint
    if name is None:
        fix = f"name a checkpoint: --checkpoint {' or '.join(checkpoints)}"
        raise UserError(f"--checkpoint {BEST}", "no checkpoint is scored, so none is best", fix)
    if name not in checkpoints:
        there = ", ".join(checkpoints) or "none"
        raise UserError(f"--checkpoint {checkpoint}", f"{run.checkpoints} has none of that name", f"there is: {there}")
    return checkpoints[name]


def _best(run: RunFolder) -> str | None:
    results = read_results(run.root)
    if results is None:
        where = f"--checkpoint {BEST}"
        raise UserError(where, "the checkpoints are not scored yet", f"run `minisft evaluate {run.root}` first")
    return results["best"]


def _require_free(folder: Path, recipe: Recipe, force: bool) -> None:
    """Refuse to write over what is there, unless it is an exported model and may be replaced; never over an input."""
    run, place = RunFolder(Path(recipe.output)), folder.resolve()
    own = (run.model.resolve(), run.checkpoints.resolve())
    if any(path in own for path in (place, *place.parents)):
        raise UserError(folder, "this is the run's own", "name another folder")
    if os.path.lexists(place) and not place.is_dir():
        raise UserError(folder, "this is a file", "name a folder")
    for problem, path in (("the run", run.root), ("the base model", Path(recipe.model))):
        if path.exists() and place in (path.resolve(), *path.resolve().parents):
            raise UserError(folder, f"{problem} lies in this folder ({path})", "name a folder that does not hold it")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not force:
        fix = "name a new one, or pass --force to replace the model that it holds"
        raise UserError(folder, "this folder is not empty", fix)
    require_replaceable(place, _EXPORT)


def _base(recipe: Recipe, run: RunFolder) -> Path:
    """Return the base model's folder, if it is what the adapters were trained on."""
    base = resolve_model(recipe.model, recipe.trust_remote_code)
    record_base_model(run, str(base), weights_fingerprint(base.folder))
    return base.folder


def _replace_weights(folder: Path, source: Path, base: Path | None, dtype: str, trust_remote_code: bool) -> None:
    """Save the whole model of `source` into `folder`, where its tokenizer lies already."""
    import torch

    kind = getattr(torch, _DTYPES[dtype])
    model = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code, base=base, merge=True)
    for path in {*folder.glob("adapter_*"), *folder.glob("*.safetensors*")}:
        path.unlink()
    model.to(kind).save_pretrained(folder)
