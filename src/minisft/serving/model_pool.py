"""The models of a server by name, and which of them are in memory.

A run has `final` (when its training has ended), `base` and every `checkpoint-N`; any other model folder is `final`.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.generation import context_length, inference_dtype
from minisft.evaluation.placement import count_weights, free_gpu_memory, load_for_inference
from minisft.models import is_adapter, load_config, load_tokenizer, resolve_model, weights_fingerprint
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder, load_run, require_same_base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL, BASE = "final", "base"
_MEMORY_SHARE = 0.8  # of the memory that is free at the start, without --memory


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked for.

    Args:
        name: Its name in requests.
        folder: Its folder; None: the base model of the run, which is found when it is loaded.
        created: Time of the folder in seconds since 1970.
    """

    name: str
    folder: Path | None
    created: int


@dataclass
class LoadedModel:
    """A model in memory; `size` is that of its weights in bytes."""

    name: str
    model: "PreTrainedModel"
    size: int


class ModelPool:
    """The models of one run or folder.

    Args:
        name: A run folder, a model folder or any other model name.
        memory: The most bytes of weights in memory; None: most of what is free now.
        trust_remote_code: Run code that comes with the model.

    Attributes:
        title: Name of the run or model, for people.
        encoder: Renders the prompts of every model, and decodes the answers: the run's own.
        loaded: The models in memory, the least recently used first.

    Raises:
        UserError: There is no such model, or it has no chat template.
    """

    def __init__(self, name: str, memory: int | None = None, trust_remote_code: bool = False) -> None:
        self.title = Path(name).resolve().name
        self.trust = trust_remote_code
        self.limit = memory if memory is not None else int(_free_memory() * _MEMORY_SHARE)
        self.strict = memory is not None  # a model above the user's limit is refused; above a guess it is tried
        self.loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._contexts: dict[str, int | None] = {}
        self._base: Path | None = None
        run = RunFolder(Path(name))
        self.run = run if run.is_run() else None
        self.recipe: Recipe | None = load_run(run.root, trust_remote_code=trust_remote_code) if self.run else None
        self._folder = None if self.run else resolve_model(name, trust_remote_code, adapters=True).folder
        self.encoder = self._make_encoder()

    def models(self) -> dict[str, ServedModel]:
        """Return the models that can be asked for now, by name; a run that trains gets more."""
        if self._folder is not None:
            return {FINAL: ServedModel(FINAL, self._folder, _time_of(self._folder))}
        assert self.run is not None
        found = [ServedModel(FINAL, self.run.model, _time_of(self.run.model))] if self.run.is_trained() else []
        found.append(ServedModel(BASE, None, _time_of(self.run.recipe)))
        newest_first = reversed(self.run.list_checkpoints())
        found += [ServedModel(folder.name, folder, _time_of(folder)) for folder in newest_first]
        return {model.name: model for model in found}

    def context(self, model: ServedModel) -> int | None:
        """Return the most tokens of a prompt and its answer; None: no limit is known.

        Raises:
            UserError: The model cannot be read.
        """
        if model.name not in self._contexts:
            folder, base = self._folders(model)
            self._contexts[model.name] = context_length(load_config(base or folder, self.trust))
        return self._contexts[model.name]

    def size(self, model: ServedModel) -> int:
        """Return the size of a model's weights in memory, in bytes, from the headers of its files.

        Raises:
            UserError: It is larger than the limit that the user gave.
        """
        folder, base = self._folders(model)
        parts = [part for part in (folder, base) if part is not None]
        size = sum(map(count_weights, parts)) * inference_dtype().itemsize
        if self.strict and size > self.limit:
            problem = f"its weights need {size / 1e9:.2f} GB, and the server may use {self.limit / 1e9:.2f} GB"
            raise UserError(model.name, problem, "start the server with a higher --memory")
        return size

    def load(self, model: ServedModel) -> LoadedModel:
        """Load a model as `minisft chat` does. It is not yet in `loaded`: another thread may call this.

        Raises:
            UserError: It cannot be loaded, or the base model is not the one that the run began with.
        """
        folder, base = self._folders(model)
        if self.run is not None and self.recipe is not None and (base or folder) == self._base_folder():
            origin = str(resolve_model(self.recipe.model, self.trust))
            require_same_base_model(self.run, origin, weights_fingerprint(base or folder))
        loaded = load_for_inference(folder, dtype=inference_dtype(), trust_remote_code=self.trust, base=base)
        return LoadedModel(model.name, loaded, self.size(model))

    def add(self, loaded: LoadedModel) -> None:
        """Take a loaded model in."""
        self.loaded[loaded.name] = loaded

    def use(self, name: str) -> LoadedModel | None:
        """Return a model if it is in memory, as the most recently used one."""
        if name in self.loaded:
            self.loaded.move_to_end(name)
        return self.loaded.get(name)

    def evictable(self, size: int, reserved: int, busy: Sequence[str]) -> list[str] | None:
        """Return the models to evict, least recently used first, so that `size` more bytes fit; None: they do not fit.

        Args:
            size: Bytes of the model to load.
            reserved: Bytes of the models that are being loaded.
            busy: Names of the models that are in use. With none in use or loading, any model may be loaded.
        """
        used = reserved + sum(model.size for model in self.loaded.values())
        names = []
        for name, model in self.loaded.items():
            if used + size <= self.limit:
                break
            if name not in busy:
                names.append(name)
                used -= model.size
        return names if used + size <= self.limit or used == 0 else None

    def evict(self, name: str) -> None:
        """Drop a model from memory; the caller has dropped its own references."""
        import torch

        del self.loaded[name]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _make_encoder(self) -> Encoder:
        """Return the encoder of the newest trained folder, or before the first one that of the recipe."""
        if self.run is None or self.recipe is None:
            assert self._folder is not None
            return Encoder(load_tokenizer(self._folder, self.trust), "auto")
        trained = [self.run.model] if self.run.is_trained() else self.run.list_checkpoints()[-1:]
        if trained:
            return Encoder(load_tokenizer(trained[0], self.trust), "auto")
        data = self.recipe.data
        return Encoder(load_tokenizer(self._base_folder(), self.trust), data.template, data.template_options)

    def _base_folder(self) -> Path:
        assert self.recipe is not None
        if self._base is None:  # looked up once: a hub may have to be asked
            self._base = resolve_model(self.recipe.model, self.trust).folder
        return self._base

    def _folders(self, model: ServedModel) -> tuple[Path, Path | None]:
        """Return a model's folder, and for adapters the folder of their base model."""
        folder = model.folder if model.folder is not None else self._base_folder()
        if not is_adapter(folder):
            return folder, None
        if self.recipe is not None:
            return folder, self._base_folder()
        try:
            name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(folder, "its adapter_config.json names no base model", "serve the run instead") from None
        return folder, resolve_model(str(name), self.trust).folder


def _time_of(folder: Path) -> int:
    try:
        return int(folder.stat().st_mtime)
    except OSError:  # a checkpoint that has just been deleted
        return 0


def _free_memory() -> int:
    """Return the bytes that are free on all GPUs together, or on a CPU."""
    import psutil

    return sum(free_gpu_memory()) or int(psutil.virtual_memory().available)
