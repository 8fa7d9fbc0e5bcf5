"""Export of a run's model as a model folder, as GGUF or for Ollama, and the proof that it serves as trained."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minisft.console import waiting
from minisft.errors import UserError
from minisft.exporting.engines import ENGINES
from minisft.exporting.model_card import write_card
from minisft.exporting.model_folder import make_readable, number_format_of, write_weights
from minisft.exporting.proof import VERIFIED, ExportedModel, prove, require_engine
from minisft.files import apply_umask, write_atomically
from minisft.manifest import record_folder, write_marker
from minisft.models import is_adapter, load_config, load_tokenizer, resolve_model, weights_fingerprint
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
from minisft.text import dump_json
from minisft.training.checkpoints import copy_model, is_write_failure, reason_of

DTYPES = {"fp32": "f32", "f32": "f32", "fp16": "f16", "f16": "f16", "bf16": "bf16"}  # names of each number format
QUANTISED = ("q8_0", "q4_k_m")
BEST = "best"
GGUF, ADAPTER_GGUF = "model.gguf", "adapter.gguf"
_EXPORT = "export"  # what the marker of an exported model says


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Args:
        to: "folder": a model folder; "gguf": model.gguf; "ollama": model.gguf and a Modelfile.
        checkpoint: Name of a checkpoint, or `best` for that of the highest BLEU; None: the final model.
        merge: Add adapters to the weights of the base model; False writes them without merging.
        dtype: Number format of the weights: f32, f16, bf16, or q8_0 and q4_k_m for GGUF; None: unchanged, or f32 where
            merged.
        engine: Which engine the export is verified with: "auto" (all that are installed), "none", or its name.
        llama_cpp: A folder of llama.cpp, for its converter, quantiser and server.
        max_kl: The largest accepted mean KL divergence of a quantised model, in nats per token; None: that of the
            format.
        allow_unverified: Keep an export that an engine does not serve as trained.
        license: Identifier of the model's licence on the hub, for the model card.
        force: Replace an earlier export in the folder; files that it did not write stay in FOLDER.old-N.

    Raises:
        UserError: The options contradict each other.
    """

    to: str = "folder"
    checkpoint: str | None = None
    merge: bool = True
    dtype: str | None = None
    engine: str = "auto"
    llama_cpp: Path | None = None
    max_kl: float | None = None
    allow_unverified: bool = False
    license: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.to not in ("folder", "gguf", "ollama"):
            raise UserError("--to", f"there is no form {self.to!r}", "use folder, gguf or ollama")
        if self.dtype in QUANTISED and self.to == "folder":
            problem = "a model folder has no quantised number format"
            raise UserError(f"--dtype {self.dtype}", problem, "add --to gguf, or use f32, f16 or bf16")
        if self.dtype is not None and self.dtype not in (*DTYPES, *QUANTISED):
            known = ", ".join((*DTYPES, *QUANTISED))
            raise UserError("--dtype", f"there is no number format {self.dtype!r}", f"use one of {known}")
        if self.max_kl is not None and not (self.dtype in QUANTISED and self.max_kl > 0):
            fix = "leave it out, or add --dtype q8_0 or q4_k_m"
            raise UserError(f"--max-kl {self.max_kl:g}", "it is a positive limit of a quantised model", fix)
        if self.engine not in ("auto", "none", *ENGINES):
            known = ", ".join(("auto", "none", *ENGINES))
            raise UserError("--engine", f"there is no engine {self.engine!r}", f"use one of {known}")
        if self.to == "ollama" and not self.merge:
            fix = "leave out --no-merge, or export --to gguf"
            raise UserError("--no-merge --to ollama", "Ollama's form has one merged model", fix)

    @property
    def number_format(self) -> str | None:
        """The one name of `dtype`."""
        return None if self.dtype is None else DTYPES.get(self.dtype, self.dtype)


def export(recipe: Recipe, folder: Path, options: ExportOptions) -> Path:
    """Write a run's model, tokenizer, template and generation config to `folder`, completely or not at all.

    `verified.json` in it says which engines gave the same prompts, probabilities and stops as the trained model, and
    README.md is its model card.

    Args:
        recipe: Recipe of the run; its `model` is the base that adapters are merged into, in fp32.
        folder: Path of a new or empty folder, or with `force` of an earlier export.
        options: What to export, and how.

    Returns:
        Path of the folder that was exported.

    Raises:
        UserError: There is no such checkpoint, the folder is in use, the base model is not the run's, the form cannot
            be written for this model, or an engine does not serve it as trained.
    """
    # 1. Find the model, and check the options and the folder.
    run = RunFolder(Path(recipe.output))
    source = find_model(run, options.checkpoint)
    adapters = is_adapter(source)
    if options.dtype is not None and not options.merge and adapters and options.to == "folder":
        problem = "adapters that are not merged are copied in their own number format"
        raise UserError("--no-merge --dtype", problem, "leave out one of the two")
    _refuse_taken_folder(folder, recipe, options.force)
    require_engine(options.engine, options.to, options.merge or not adapters, options.llama_cpp)
    base = None
    if adapters:  # the base must be what they were trained on
        resolved = resolve_model(recipe.model, recipe.trust_remote_code)
        record_base_model(run, str(resolved), weights_fingerprint(resolved.folder))
        base = resolved.folder

    with _replace_folder(folder) as new:
        # 2. Write the model in the form that was asked for.
        exported = ExportedModel(new, source, base, options.number_format, merged=options.merge or not adapters)
        with waiting("writing the model"):
            if options.to == "folder":
                _write_folder(exported, recipe)
                if exported.merged:
                    exported = replace(exported, dtype=number_format_of(new, recipe.trust_remote_code))
            else:
                exported = _write_gguf_forms(exported, recipe, options)
        # 3. Compare what engines make of it with the trained model.
        verified = prove(exported, recipe, options.engine, options.llama_cpp, options.max_kl)
        if verified.problem and not options.allow_unverified:
            fix = "report it, or keep the export as it is: --allow-unverified; another engine: --engine NAME"
            raise UserError(folder, f"the export is not served as the model was trained: {verified.problem}", fix)
        write_atomically(new / VERIFIED, dump_json({"engine": verified.engines}, indent=1) + "\n")
        # 4. Write the model card, and give the folder its name.
        write_card(new, recipe, exported, verified.engines, options.license)
        record_folder(new, new)
        apply_umask(new)
    return source


def _write_folder(exported: ExportedModel, recipe: Recipe) -> None:
    """Write the model folder that plain transformers loads, version 4 too."""
    copy_model(exported.source, exported.folder)
    if exported.merged and (exported.base is not None or exported.dtype is not None):
        write_weights(
            exported.folder, exported.source, exported.base, exported.dtype or "f32", recipe.trust_remote_code
        )
    make_readable(exported.folder, recipe.model)


def _write_gguf_forms(exported: ExportedModel, recipe: Recipe, options: ExportOptions) -> ExportedModel:
    """Write model.gguf; for adapters that are not merged, the base model and adapter.gguf; for Ollama a Modelfile."""
    from minisft.exporting.llama_cpp import write_any_gguf

    # 1. A model folder: of the model, or of the base model with the tokenizer, template and stop tokens of the run.
    new, source, base = exported.folder, exported.source, exported.base
    plain = new / ".model"
    if base is not None and not exported.merged:
        shutil.copytree(base, plain, copy_function=os.symlink)
        for path in source.iterdir():  # a copy would be written through the link, into the base model
            (plain / path.name).unlink(missing_ok=True)
    copy_model(source, plain, ignore=("adapter_*",) if base is not None and not exported.merged else ())
    if base is not None and exported.merged:
        write_weights(plain, source, base, "f32", recipe.trust_remote_code)
    # 2. The files of the engine.
    dtype = exported.dtype or number_format_of(plain, recipe.trust_remote_code)
    write_any_gguf(plain, new / GGUF, dtype, options.llama_cpp)
    adapter = ""
    if base is not None and not exported.merged:
        from minisft.exporting.gguf_writer import write_adapter_gguf

        adapter = ADAPTER_GGUF
        write_adapter_gguf(source, base, new / adapter)
    if options.to == "ollama":
        write_atomically(new / "Modelfile", _modelfile(plain, recipe))
    shutil.rmtree(plain)
    return ExportedModel(new, source, base, dtype, exported.merged, gguf=GGUF, adapter_gguf=adapter)


def _modelfile(folder: Path, recipe: Recipe) -> str:
    """Return the Modelfile of a model folder, with the context that training and evaluation used."""
    from minisft.evaluation.generation import context_length
    from minisft.exporting.ollama import modelfile

    config, tokenizer = load_config(folder, recipe.trust_remote_code), load_tokenizer(folder, recipe.trust_remote_code)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    stops = generation["eos_token_id"]
    context = recipe.data.max_length + recipe.evaluation.max_new_tokens
    return modelfile(
        tokenizer,
        str(tokenizer.chat_template),
        stop_ids=[stops] if isinstance(stops, int) else stops,
        num_ctx=min(context, context_length(config) or context),
        model=f"./{GGUF}",
    )


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


def find_model(run: RunFolder, checkpoint: str | None) -> Path:
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
