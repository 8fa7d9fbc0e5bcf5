"""LoRA: small matrices beside frozen ones, by peft.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; with frozen weights of 4 bits, Dettmers et
al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". What is trained and saved are the adapters alone.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from minisft.errors import UserError
from minisft.recipe import LoraRecipe
from minisft.text import first_line
from minisft.training.device import on_cpu

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# peft writes a form for the authors of a model to fill in.
_MODEL_CARD = "README.md"


def require_quantisation(lora: LoraRecipe) -> None:
    """Make sure that weights of 4 bits can be loaded, where the recipe asks for them.

    Raises:
        UserError: there is no GPU, or bitsandbytes is missing.
    """
    if not lora.load_in_4bit:
        return
    where = "training.lora.load_in_4bit"
    if on_cpu():
        raise UserError(where, "weights of 4 bits need a GPU, and there is none here", "leave it false")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(where, "bitsandbytes is not installed", "pip install 'minisft[quantized]', or leave it false")


def frozen_dtype(precision: str) -> torch.dtype:
    """Return the format of the frozen weights: nothing is added to them, so they stay in that of the arithmetic."""
    return _DTYPES[precision]


def quantised_loading(lora: LoraRecipe, precision: str, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load 4-bit NormalFloat weights onto `device`; nothing for plain ones."""
    if not lora.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=frozen_dtype(precision),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def add_lora(model: Any, lora: LoraRecipe, *, base_name: str, seed: int) -> Any:
    """Freeze a model and put fp32 adapters beside its matrices; return the `PeftModel`.

    Args:
        model: a causal language model.
        lora: rank, alpha, dropout and the modules that get adapters.
        base_name: under which `from_pretrained` finds the base model; adapters are saved with it.
        seed: of the adapters, so that they begin alike on every process and under every strategy.

    Raises:
        UserError: the model has no such modules, or none that can be adapted.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft computes with it as it is
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what peft reads of the model
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            "training.lora.target_modules",
            first_line(error),
            f"use all-linear, or names among {', '.join(_names_of_linears(model))}",
        ) from None


def has_adapters(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def save_adapters(model: Any, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write a plain peft folder: adapter_model.safetensors, adapter_config.json, and the generation config.

    Args:
        model: the `PeftModel`.
        folder: where to.
        state_dict: its weights by name, where they must be gathered first; None: those it holds.
    """
    # Embeddings are never resized here; else peft would ask the hub at every checkpoint whether they were.
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    model.generation_config.save_pretrained(folder)
    (folder / _MODEL_CARD).unlink(missing_ok=True)
    # Peft writes the target modules in an order that changes from process to process; equal runs give equal files.
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _names_of_linears(model: torch.nn.Module) -> list[str]:
    return sorted(
        {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    )
