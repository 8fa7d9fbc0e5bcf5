"""Tiny random models of each family that the GGUF writer knows."""

import shutil
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
# Model types with the configuration that is theirs; a number makes a name of its own.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "sliding_window": 16, "final_logit_softcapping": None}),
}


def write_family(folder: Path, name: str, tokenizer=None, **changes) -> Path:
    """Write a random model of a case; all its parameters are random, norms and biases too, so that none is neutral."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    model_type, options = CASES[name]
    config = AutoConfig.for_model(
        model_type,
        **{**COMMON, **options, **changes},
        vocab_size=len(tokenizer) + 3,  # more rows than tokens, as many models have
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(folder: Path, ids: list[int], **options):
    """Return the fp32 logits [tokens, vocabulary] of a model, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def write_adapter(folder, base, **options: Any):
    """Write random LoRA matrices for all linear layers, and the merged model, as peft computes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**(settings | options))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "adapter")
    merged = shutil.copytree(base, folder / "merged")
    model.merge_and_unload().save_pretrained(merged)
    return folder / "adapter", merged
