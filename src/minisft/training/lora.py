"""LoRA: low-rank matrices beside frozen weights, by peft.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; with frozen weights of 4 bits, Dettmers et
al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". Only the adapters are trained and saved.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from minisft.errors import UserError
from minisft.optional_packages import require_package
from minisft.recipe import LoraRecipe
from minisft.text import first_line
from minisft.training.device import on_cpu

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Modules that the kernels of a Mamba layer read without their adapters, and the model types whose layers have them:
# peft 0.21, `_check_lora_target_modules_mamba`. It refuses adapters there, with `all-linear` too.
_MAMBA_MODULES = ["conv1d", "out_proj"]
_MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# peft writes a model card, a form to fill in.
_MODEL_CARD = "README.md"


def require_quantisation(lora: LoraRecipe) -> None:
    """Check that 4-bit weights can be loaded, if the recipe asks for them.

    Raises:
        UserError: There is no GPU, or bitsandbytes is missing.
    """
    if not lora.load_in_4bit:
        return
    where = "training.lora.load_in_4bit"
    if on_cpu():
        raise UserError(where, "weights of 4 bits need a GPU, and there is none here", "leave it false")
    require_package(where, "bitsandbytes", "leave it false")


def frozen_dtype(precision: str) -> torch.dtype:
    """Return the number format of the frozen weights: they are not updated, so it is that of the arithmetic."""
    return _DTYPES[precision]


def quantised_loading(lora: LoraRecipe, precision: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load 4-bit NormalFloat weights onto `device`, if LoRA has them."""
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
    """Freeze a model and add fp32 adapters to its matrices; return the `PeftModel`.

    Args:
        model: Causal language model.
        lora: Rank, alpha, dropout and the modules that get adapters.
        base_name: Name under which `from_pretrained` finds the base model; it is saved with the adapters.
        seed: Seed of the adapters, so that they are the same on every process and under every strategy.

    Raises:
        UserError: The model has no such modules, or none that can be adapted.
    """
    from peft import LoraConfig, get_peft_model

    everywhere = lora.target_modules == "all-linear"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft computes with it as it is
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=modules_without_adapters(model) if everywhere else None,
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # warnings about the model that peft reads
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            "training.lora.target_modules",
            first_line(error),
            f"name some of {', '.join(_names_of_linears(model))}" + ("" if everywhere else ", or use all-linear"),
        ) from None


def modules_without_adapters(model: Any) -> list[str] | None:
    """Return the names of the linear modules that `all-linear` leaves out of this model; None: it leaves out none."""
    excluded = _MAMBA_MODULES if model.config.model_type in _MAMBA_TYPES else []
    return [name for name in excluded if name in _names_of_linears(model)] or None


def has_adapters(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def save_adapters(model: Any, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write a plain peft folder: adapter_model.safetensors, adapter_config.json, and the generation config.

    Args:
        model: The `PeftModel`.
        folder: Folder to write to.
        state_dict: Its weights by name, if they had to be gathered; None: those of the model.
    """
    # Embeddings are never resized here; otherwise peft would ask the hub at every checkpoint whether they were.
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    model.generation_config.save_pretrained(folder)
    (folder / _MODEL_CARD).unlink(missing_ok=True)
    # Peft writes the target modules in an order that changes from process to process; equal runs give equal files.
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _names_of_linears(model: Any) -> list[str]:
    return sorted(
        {
            name.rpartition(".")[2]
            for name, part in model.named_modules()
            if isinstance(part, (torch.nn.Linear, Conv1D)) and part is not model.get_output_embeddings()
        }
    )
