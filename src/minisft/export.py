"""A run's model for other tools: a plain model folder, with adapters merged into the base model."""

from pathlib import Path

from minisft.claims import read_results
from minisft.errors import UserError
from minisft.files import whole_folder
from minisft.models import is_adapter, load_model, resolve_model, weights_fingerprint
from minisft.recipe import Recipe
from minisft.runs import RunFolder, remember_model
from minisft.training.checkpoints import copy_model

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BEST = "best"


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
        folder: new or empty, unless `force` replaces the model that it holds.
        checkpoint: the name of a checkpoint, or `best`, that of the highest BLEU; None: the final model.
        merge: False copies adapters as they are.
        dtype: fp32, bf16 or fp16; None: as they are, or fp32 where merged.
        force: replace the model that the folder holds.

    Returns:
        The folder that was exported.

    Raises:
        UserError: there is no such checkpoint, the folder is in use, or the base model is not the run's.
    """
    run = RunFolder(Path(recipe.output))
    source = _source(run, checkpoint)
    _require_free(folder, run, force)
    with whole_folder(folder.resolve()) as aside:
        copy_model(source, aside)
        if is_adapter(source) and merge:
            _replace_weights(aside, source, _base(recipe, run), dtype or "fp32")
        elif dtype is not None and not is_adapter(source):
            _replace_weights(aside, source, None, dtype)
    return source


def _source(run: RunFolder, checkpoint: str | None) -> Path:
    """Return the folder to export."""
    checkpoints = {path.name: path for path in run.list_checkpoints()}
    if checkpoint is None and run.is_trained():
        return run.model
    if checkpoint is None:
        mend = f"name one: --checkpoint {' or '.join(checkpoints)}" if checkpoints else "train first: minisft train"
        raise UserError(run.root, "this run has no final model yet", mend)
    name = _best(run) if checkpoint == BEST else checkpoint
    if name is None:
        mend = f"name a checkpoint: --checkpoint {' or '.join(checkpoints)}"
        raise UserError(f"--checkpoint {BEST}", "no checkpoint is scored, so none is best", mend)
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


def _require_free(folder: Path, run: RunFolder, force: bool) -> None:
    """Refuse to write over what is there, unless it is a model and may be replaced; never over the run's own."""
    own = (run.model.resolve(), run.checkpoints.resolve())
    if any(path in own for path in (folder.resolve(), *folder.resolve().parents)):
        raise UserError(folder, "this is the run's own", "name another folder")
    if folder.is_file():
        raise UserError(folder, "this is a file", "name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        mend = "name a new one, or pass --force to replace the model that it holds"
        raise UserError(folder, "this folder is not empty", mend)
    if not (is_adapter(folder) or (folder / "config.json").is_file()):
        raise UserError(folder, "this folder holds no model that --force could replace", "name a new folder")


def _base(recipe: Recipe, run: RunFolder) -> Path:
    """Return the base model's folder, if it is what the adapters were trained on."""
    base = resolve_model(recipe.model, recipe.trust_remote_code)
    remember_model(run, str(base), weights_fingerprint(base.folder))
    return base.folder


def _replace_weights(folder: Path, source: Path, base: Path | None, dtype: str) -> None:
    """Save the whole model of `source` into `folder`, where its tokenizer lies already."""
    import torch

    kind = getattr(torch, _DTYPES[dtype])
    model = load_model(source, dtype=torch.float32, base=base, merge=True)
    for path in {*folder.glob("adapter_*"), *folder.glob("*.safetensors*")}:
        path.unlink()
    model.to(kind).save_pretrained(folder)
