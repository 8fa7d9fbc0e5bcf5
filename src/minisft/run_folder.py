"""The run folder: its paths, its resolved recipe, its metrics, and what identifies a run."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json, read_json_lines, refuse_huge_files, write_atomically
from minisft.manifest import size_of_written_files
from minisft.recipe import Override, Recipe, dump_recipe, load_recipe
from minisft.replacement import delete_replaced

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The first line of a run's recipe: it distinguishes a run folder from another folder that holds a recipe.
_MARK = "# The resolved recipe of a MiniSFT run; change the recipe it came from, not this file.\n"
RUN_KIND = "run"  # what the marker of a run folder says
# Consent to run a model's own code, and its absence, as overrides of a recipe.
TRUST_OVERRIDE, DISTRUST_OVERRIDE = "trust_remote_code=true", "trust_remote_code=false"
TRUST_OPTION = "--trust-remote-code"
# Maximum sizes of the small files of a run in bytes, far above those of any real run.
_LARGEST = {
    "recipe.yaml": 1 << 20, "*.json": 64 << 20, "dataset/*.json": 64 << 20, "evaluation/*.json": 64 << 20,
    "checkpoints/*/trainer_state.json": 256 << 20, "metrics.jsonl": 256 << 20, "evaluation/*/*.jsonl": 256 << 20,
    "row_losses.bin": 8 << 30,
    "model/*.json": 128 << 20, "model/*.jinja": 1 << 20, "checkpoints/*/*.jinja": 1 << 20,
    "checkpoints/*/*config.json": 16 << 20, "checkpoints/*/tokenizer.json": 128 << 20,
}  # fmt: skip
# Keys that may change on --resume, since the losses and weights do not depend on them.
_FREE_DATA_KEYS = ("verify", "processes", "seed")
_FREE_TRAINING_KEYS = (
    "strategy", "processes", "batch_size", "gradient_accumulation", "save_every", "log_every",
    "gradient_checkpointing", "row_tokens", "memory_limit_gb", "report_to", "keep_optimizer", "keep_checkpoints",
    "offload", "sequence_parallel",
)  # fmt: skip
# The keys of `evaluation` on which the scores of checkpoints depend.
_SCORE_KEYS = ("metrics", "best_by", "turns", "max_new_tokens", "limit", "temperature", "top_p")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

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
    def row_losses(self) -> Path:
        return self.root / "row_losses.bin"

    @property
    def certificate(self) -> Path:
        return self.root / "certificate.json"

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
        """Folder in which `check` trains a few steps; it deletes the folder at its end."""
        return self.root / ".check"

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoint folders in the order of their steps."""
        return list_checkpoints(self.checkpoints)

    def is_run(self) -> bool:
        """Return whether MiniSFT wrote this folder."""
        return _is_resolved_recipe(self.recipe)

    def is_trained(self) -> bool:
        """Return whether training has ended: the final model is written last, in one rename."""
        return any((self.model / name).exists() for name in ("config.json", "adapter_config.json"))

    def has_begun(self) -> bool:
        """Return whether training has written anything."""
        return self.is_trained() or self.metrics.exists() or bool(self.list_checkpoints())


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N in the order of N; they are complete, since they get their names last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-N."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is not a checkpoint folder"
    return int(match[1])


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: a dict for each logged step, in the order of the steps; a missing file is empty.

    Raises:
        UserError: A line is damaged.
    """
    return read_json_lines(run.metrics, "delete the damaged lines", step=int)


def load_run(root: Path, overrides: Sequence[Override] = (), *, trust_remote_code: bool = False) -> Recipe:
    """Return the resolved recipe of a run folder, which may be untrusted.

    The value of `trust_remote_code` in the file is ignored: only the user can consent, each time.

    Args:
        root: the folder.
        overrides: changes to the recipe that the user gave.
        trust_remote_code: the user, or the process that started this one, consents to the model's own code.

    Raises:
        UserError: The folder is not a run, or one of its small files is far too large.
    """
    run = RunFolder(root)
    if not run.is_run():
        raise UserError(
            root,
            "this is not a run folder (it has no recipe.yaml of a run)",
            "give the `output` of a recipe that was run",
        )
    refuse_huge_files(root, _LARGEST)
    words = [DISTRUST_OVERRIDE, *overrides, *([TRUST_OVERRIDE] if trust_remote_code else [])]
    return replace(load_recipe(run.recipe, words), output=str(root))


def trust_arguments(recipe: Recipe) -> list[str]:
    """Return the options with which a child process must read a run folder: its recipe cannot carry consent."""
    return [TRUST_OPTION] if recipe.trust_remote_code else []


def run_of_recipe(recipe: Path) -> Path | None:
    """Return the run folder if `recipe` is the path of its resolved recipe, else None."""
    return recipe.parent if recipe.name == "recipe.yaml" and _is_resolved_recipe(recipe) else None


def came_with_run(recipe: Path) -> bool:
    """Return whether a recipe file is part of a run, and not the user's own: such a file carries no consent."""
    if _is_resolved_recipe(recipe):
        return True
    run_files = ("checkpoints", "model", "metrics.jsonl", "base_model.json", "dataset/ledger.json")
    return recipe.name == "recipe.yaml" and any((recipe.parent / name).exists() for name in run_files)


def _is_resolved_recipe(path: Path) -> bool:
    """Return whether a file begins as a run's recipe does; no more than that line is read, however large it is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def run_identity(recipe: Recipe) -> dict[str, Any]:
    """Return what identifies a run: model, data, seed, optimization keys and global batch, by dotted key."""
    training = recipe.training
    batch = training.global_batch
    keys: dict[str, Any] = {"model": recipe.model, "seed": recipe.seed}
    keys |= {f"data.{k}": v for k, v in asdict(recipe.data).items() if k not in _FREE_DATA_KEYS}
    if recipe.data_seed != recipe.seed:
        keys["data.seed"] = recipe.data_seed
    free: tuple[str, ...] = _FREE_TRAINING_KEYS
    if training.early_stopping is None or training.early_stopping_by != "loss":
        free += ("eval_every",)
    if training.early_stopping_by == "loss":
        free += ("early_stopping_by",)
    else:  # what its decisions depend on
        free = tuple(key for key in free if key != "save_every")
        keys |= {f"evaluation.{k}": v for k, v in asdict(recipe.evaluation).items() if k in _SCORE_KEYS}
    keys |= {f"training.{k}": v for k, v in asdict(training).items() if k not in free}
    return keys | {"the global batch (batch_size x processes x gradient_accumulation)": batch}


def is_same_run(run: RunFolder, recipe: Recipe) -> bool:
    """Return whether the folder holds the run of `recipe`."""
    return run.is_run() and run_identity(load_run(run.root)) == run_identity(recipe)


def delete_replaced_run(run: RunFolder) -> None:
    """Delete the run that this one replaces, after the first step of this one; the user's files in it stay."""
    warn_each(delete_replaced(run.root, RUN_KIND))


def write_resolved_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Write `recipe` as the resolved recipe of a run that this process has opened."""
    write_atomically(run.recipe, _MARK + dump_recipe(recipe))


def describe_run(run: RunFolder) -> str:
    """Return one line of text: what a run folder holds, and its size."""
    count = len(run.list_checkpoints())
    state = "a trained run" if run.is_trained() else "an unfinished run" if run.has_begun() else "prepared data"
    checkpoints = f" with {count} checkpoint{'s' if count != 1 else ''}" if count else ""
    return f"{run.root} ({state}{checkpoints}, {size_of_written_files(run.root.resolve()) / 1e6:,.1f} MB)"


def warn_each(messages: Sequence[str]) -> None:
    """Print warnings; the console is imported only where there are some, since it takes long."""
    if messages:
        from minisft.console import warn

        for message in messages:
            warn(message)


def write_environment(run: RunFolder, environment: dict[str, Any]) -> None:
    """Record the machine and the library versions of the last training of the run."""
    write_atomically(run.environment, json.dumps(environment, indent=1, ensure_ascii=False) + "\n")


def read_environment(run: RunFolder) -> dict[str, Any]:
    """Return the record of the run's last training; {} if there is none.

    Raises:
        UserError: environment.json is damaged.
    """
    return read_json(run.environment, "restore it from a copy") if run.environment.is_file() else {}


def recorded_threads(run: RunFolder) -> int | None:
    """Return the number of threads of a process in the last training of the run, or None if it is not recorded."""
    threads = read_environment(run).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


def read_kernels(run: RunFolder) -> str | None:
    """Return the kernels that a run trained with; None if it has no record of its training.

    Runs of versions without kernels had none.
    """
    environment = read_environment(run)
    if not environment:
        return None
    kernels = environment.get("kernels")
    return str(kernels.get("chosen", "none")) if isinstance(kernels, dict) else "none"


def trained_alone(run: RunFolder, model: str) -> bool:
    """Return whether a run of `model` gave each conversation its own row, as its environment.json records."""
    try:
        return load_run(run.root).model == model and read_environment(run)["probe"]["verdict"] == "alone"
    except (KeyError, TypeError, UserError):
        return False  # no run, or one without such a record


def record_base_model(run: RunFolder, origin: str, fingerprint: str) -> None:
    """Record the base model of a new run, and refuse to continue a run with another one.

    Raises:
        UserError: The model's name now leads to other weights or another tokenizer.
    """
    now = {"origin": origin, "fingerprint": fingerprint}
    if not run.base_model.exists():
        write_atomically(run.base_model, json.dumps(now, indent=1, ensure_ascii=False))
    require_same_base_model(run, origin, fingerprint)


def require_same_base_model(run: RunFolder, origin: str, fingerprint: str) -> None:
    """Check that a base model is the one that the run began with, if the run has a record of it.

    Raises:
        UserError: It is another model.
    """
    if not run.base_model.exists():
        return
    fix = "restore it from a copy, or delete it if you know that `model` is still what the run began with"
    before = read_json(run.base_model, fix, origin=str, fingerprint=str)
    if before["fingerprint"] != fingerprint:
        raise UserError(
            "model",
            f"this run began with {before['origin']}, and the name now leads to {origin}, which is not the same",
            "give the model's folder as `model`, or pass --force to train again",
        )
