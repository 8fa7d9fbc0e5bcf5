"""A model folder that other tools load: merged weights, number format, shards, and files that version 4 reads too."""

import json
from pathlib import Path
from typing import Any

from minisft.console import warn
from minisft.files import write_atomically
from minisft.models import SMOLLM2_HUB_ID, is_adapter, load_config, load_model
from minisft.recipe import BUILT_IN_MODELS

TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_SHARD_SIZE = 5_000_000_000  # bytes
_WEIGHTS = "model.safetensors"
# The class of a fast tokenizer under version 4 of transformers, for the names that only version 5 has.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# Where files keep a path of the machine that wrote them.
_PATHS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def number_format_of(folder: Path, trust_remote_code: bool = False) -> str:
    """Return the number format of a model folder's weights, as its configuration names it: f32, f16 or bf16."""
    kind = str(getattr(load_config(folder, trust_remote_code), "dtype", None) or "float32").removeprefix("torch.")
    return {"float16": "f16", "bfloat16": "bf16"}.get(kind, "f32")


def write_weights(folder: Path, source: Path, base: Path | None, dtype: str, trust_remote_code: bool) -> None:
    """Save the model of `source`, with adapters merged in fp32, into a folder that holds a copy of `source`.

    Args:
        folder: The folder; its weights and adapters are replaced.
        source: Folder of the model or of the adapters.
        base: Folder of the adapters' base model.
        dtype: f32, f16 or bf16.
        trust_remote_code: Run code from the folder.
    """
    import torch

    model = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code, base=base, merge=True)
    for path in {*folder.glob("adapter_*"), *folder.glob("*.safetensors*")}:
        path.unlink()
    model.to(getattr(torch, TORCH_DTYPES[dtype])).save_pretrained(folder, max_shard_size=_SHARD_SIZE)


def make_readable(folder: Path, base_name: str) -> None:
    """Complete the files of an exported folder for other tools and other machines.

    1. transformers 4 ignores `rope_parameters` and takes 10000 for the missing `rope_theta` without a word, reads
       `torch_dtype` in place of `dtype`, and does not know the names of version 5's tokenizer classes.
    2. Weights above 5 GB are divided into shards.
    3. No path of this machine stays; adapters name their base model as the recipe does.

    Args:
        folder: The folder.
        base_name: Name of the base model: a hub id, or a path, whose last part is kept.
    """
    if (folder / "config.json").is_file():
        _change_json(folder / "config.json", _with_version_4_keys)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _change_json(folder / name, lambda entries: {k: v for k, v in entries.items() if k not in _PATHS})
    if (folder / "tokenizer_config.json").is_file():
        _change_json(folder / "tokenizer_config.json", _tokenizer_for_version_4)
    if is_adapter(folder):
        named = {"base_model_name_or_path": public_name(base_name)}
        _change_json(folder / "adapter_config.json", lambda entries: entries | named)
    elif (folder / _WEIGHTS).is_file():
        divide_weights(folder, _SHARD_SIZE)


def public_name(name: str) -> str:
    """Return the name of a model or a data source for other machines: its hub id, or the last part of a path."""
    if name in BUILT_IN_MODELS:
        return SMOLLM2_HUB_ID
    return Path(name).name if Path(name).expanduser().exists() or Path(name).is_absolute() else name


def _change_json(path: Path, change: Any) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    changed = change(entries)
    if changed != entries:
        write_atomically(path, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")


def _with_version_4_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that has the keys of version 4 beside those of version 5, in every part of it."""
    completed = {
        key: _with_version_4_keys(value) if isinstance(value, dict) else value for key, value in config.items()
    }
    if "dtype" in config:
        completed["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        completed["rope_parameters"] = rope
        completed["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        completed["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if "partial_rotary_factor" in rope:
            completed["partial_rotary_factor"] = rope["partial_rotary_factor"]
    elif isinstance(rope, dict) and "full_attention" in rope:  # Gemma 3 and others: one set for each kind of layer
        # `rope_scaling` is left out: version 5 would take it for all kinds.
        if rope["full_attention"].get("rope_type", "default") != "default":
            warn("the configuration's RoPE scaling has no form that transformers 4 and 5 both read: use version 5")
        completed["rope_parameters"] = rope
        completed["rope_theta"] = rope["full_attention"]["rope_theta"]
        if "sliding_attention" in rope:
            completed["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return completed


def _tokenizer_for_version_4(config: dict[str, Any]) -> dict[str, Any]:
    changed = dict(config)
    name = changed.get("tokenizer_class", "")
    changed["tokenizer_class"] = _TOKENIZER_CLASSES.get(name, name)
    if isinstance(changed.get("extra_special_tokens"), list):  # version 4 has a mapping under this name
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def divide_weights(folder: Path, size: int) -> None:
    """Divide the one file of weights in a folder into shards of at most `size` bytes, if it is larger.

    The names of the shards and of their index are those of `save_pretrained`. One tensor is in memory at a time for
    each shard.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import safe_open
    from safetensors.torch import save_file

    whole = folder / _WEIGHTS
    if whole.stat().st_size <= size:
        return
    with safe_open(whole, framework="pt") as file:
        import torch

        shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        with torch.device("meta"):
            empty = {
                name: torch.empty(part.get_shape(), dtype=_dtype_of(part.get_dtype())) for name, part in shapes.items()
            }
        plan = split_torch_state_dict_into_shards(empty, max_shard_size=size)
        for name, tensors in plan.filename_to_tensors.items():
            save_file({tensor: file.get_tensor(tensor) for tensor in tensors}, folder / name, {"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    write_atomically(folder / f"{_WEIGHTS}.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    whole.unlink()


def _dtype_of(name: str) -> Any:
    """Return torch's dtype of a name of safetensors, such as BF16."""
    import torch

    kinds = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "BOOL": "bool"}
    return getattr(torch, kinds.get(name) or name.replace("I", "int").lower())
