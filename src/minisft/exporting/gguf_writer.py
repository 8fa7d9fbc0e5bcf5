"""A plain model folder as one GGUF file, by the package gguf's writer and its map of tensor names.

What the file must hold is given by the GGUF specification (ggml/docs/gguf.md) and by llama.cpp's reading of it
(`src/models/*.cpp`). Models that cannot be translated exactly are refused.
"""

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.exporting.gguf_vocabulary import SENTENCE_PIECE, probe_prompt, read_vocabulary, special_ids
from minisft.manifest import record_files
from minisft.models import build_on_meta_device, load_config, load_tokenizer

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast

# llama.cpp's architecture by the model's type.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
DTYPES = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # numbers that share a scale in q8_0
_LARGEST_F16 = 65504.0
_ROPE_FACTORS = "rope_freqs.weight"
_FIX = "pass --llama-cpp FOLDER with llama.cpp's own converter, or export a plain folder"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name and shape, how its numbers are written, and how they are read, as fp32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: "Callable[[], np.ndarray]"


def write_gguf(folder: Path, target: Path, dtype: str) -> None:
    """Write the model of a folder to one GGUF file, completely or not at all.

    Matrices have the number format `dtype`, in q8_0 those whose rows are no multiple of 32 long f16; vectors are fp32,
    as llama.cpp expects. A tied output matrix is left out.

    Args:
        folder: Folder with config.json, safetensors, a fast tokenizer, and a chat template and generation_config.json
            if the model has them.
        target: Path of the file, in a folder that exists.
        dtype: One of DTYPES.

    Raises:
        UserError: The family, its configuration or its tokenizer cannot be translated.
        OSError: The file cannot be written.
    """
    import gguf

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}", f"the writer knows {', '.join(DTYPES)}", "choose one of them")
    config = load_config(folder)
    architecture = require_architecture(config, folder)
    tokenizer = load_tokenizer(folder)
    with open_writer(target, architecture) as writer, open_weights(folder) as weights:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_hyperparameters(writer, config, folder)
        _add_tokenizer(writer, tokenizer, config, folder)
        tensors = list(_tensors_of(config, weights, architecture, dtype, folder))
        write_tensors(writer, tensors, Path(str(writer.path)))


def require_architecture(config: Any, folder: Path) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        UserError: The writer does not know the family.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        problem = f"the GGUF writer knows {', '.join(ARCHITECTURES)}, and not {config.model_type}"
        raise UserError(folder, problem, _FIX)
    return architecture


@contextlib.contextmanager
def open_writer(target: Path, architecture: str) -> "Iterator[gguf.GGUFWriter]":
    """Yield a writer of a file beside `target`, which gets its name and is on the disk when the block has ended."""
    from gguf import GGUFWriter

    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    record_files(temporary, target)
    writer = GGUFWriter(temporary, architecture)
    try:
        yield writer
        writer.flush()
        for file in writer.fout or []:
            os.fsync(file.fileno())
        writer.close()
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # closing writes what is buffered
            writer.close()
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is None:  # numpy's, where a disk took only a part of an array
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise


# --- the configuration ------------------------------------------------------------------------------------


def _add_hyperparameters(writer: "gguf.GGUFWriter", config: Any, folder: Path) -> None:
    """Write what llama.cpp builds the model from.

    Raises:
        UserError: The configuration has something that llama.cpp's architecture does not have.
    """
    head_dim = _head_dim(config)
    _refuse_other_arithmetic(config, head_dim, folder)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in ("gemma2", "gemma3_text"):
        _add_gemma(writer, config)
    elif any(getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")):
        raise UserError(folder, f"{config.model_type} with softcapping is not known to llama.cpp", _FIX)
    _add_rope(writer, config, folder)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context_length(config: Any) -> int:
    """Return how many tokens the model takes.

    llama.cpp has no sliding window for llama and qwen: there, it is the window, within which attention is the same.
    """
    longest = int(config.max_position_embeddings)
    if config.model_type in ("gemma2", "gemma3_text") or not _slides(config):
        return longest
    return min(longest, int(config.sliding_window))


def _slides(config: Any) -> bool:
    """Return whether any layer attends to a window only."""
    if not getattr(config, "sliding_window", None):
        return False
    layers = getattr(config, "layer_types", None)
    return "sliding_attention" in layers if layers else bool(getattr(config, "use_sliding_window", True))


def _refuse_other_arithmetic(config: Any, head_dim: int, folder: Path) -> None:
    """Refuse what llama.cpp would silently compute in another way."""
    family = config.model_type
    is_gemma = family.startswith("gemma")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    allowed = ("gelu_pytorch_tanh", "gelu") if family == "gemma" else ("gelu_pytorch_tanh",) if is_gemma else ("silu",)
    expected_scale = head_dim
    if (family, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62)):  # llama.cpp's 27B
        expected_scale = config.hidden_size // config.num_attention_heads
    others = {
        f"the activation {activation}": activation not in allowed,
        "partial rotary embeddings": getattr(config, "partial_rotary_factor", None) not in (None, 1.0),
        "bidirectional attention": bool(getattr(config, "use_bidirectional_attention", False)),
        f"query_pre_attn_scalar {getattr(config, 'query_pre_attn_scalar', None)}": (
            getattr(config, "query_pre_attn_scalar", None) not in (None, expected_scale)
        ),
        f"head_dim {head_dim}": family == "qwen2" and head_dim * config.num_attention_heads != config.hidden_size,
        "quantised weights": getattr(config, "quantization_config", None) is not None,
        "a decoder that is not causal": getattr(config, "is_causal", True) is False,
    }
    for name, present in others.items():
        if present:
            raise UserError(folder / "config.json", f"{family} with {name} is not what llama.cpp computes", _FIX)


def _add_gemma(writer: "gguf.GGUFWriter", config: Any) -> None:
    """Write the soft caps and the sliding window of Gemma 2 and 3."""
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if _slides(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _add_rope(writer: "gguf.GGUFWriter", config: Any, folder: Path) -> None:
    """Write the base of the rotary embeddings, and their scaling; that of Llama 3 is a tensor, see `_rope_factors`.

    Raises:
        UserError: The scaling is not linear, llama3 or yarn.
    """
    import gguf

    rope = rope_parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_attention" in config.rope_parameters:
        local = config.rope_parameters["sliding_attention"]
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
        if local.get("rope_type", "default") != "default":
            raise UserError(folder / "config.json", "its layers with a window scale their positions", _FIX)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        special = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & {
            k for k in rope if rope[k] is not None
        }
        if special:
            raise UserError(folder / "config.json", f"yarn with {', '.join(sorted(special))} is not translated", _FIX)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
    elif kind not in ("default", "llama3"):
        problem = f"its positions are scaled by {kind}, and the writer knows linear, llama3 and yarn"
        raise UserError(folder / "config.json", problem, _FIX)


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters; of layers with full attention where those with a window differ."""
    parameters = config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


# --- the tokenizer ----------------------------------------------------------------------------------------


def _add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: "PreTrainedTokenizerFast", config: Any, folder: Path) -> None:
    """Write the vocabulary, the special tokens and the chat template.

    `add_bos_token` says what the trained prompts begin with, and not what the tokenizer does to a plain text.
    """
    prompt, begins_with_bos = probe_prompt(tokenizer)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, prompt.startswith(tuple(control or ("\0",))))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == SENTENCE_PIECE:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, id in special_ids(tokenizer, _stop_ids(tokenizer, config, folder)).items():
        getattr(writer, f"add_{name}_token_id")(id)
    writer.add_add_bos_token(begins_with_bos)
    writer.add_add_eos_token(False)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _stop_ids(tokenizer: "PreTrainedTokenizerFast", config: Any, folder: Path) -> list[int]:
    """Return the ids at which generation ends: those of the generation config, else of the configuration."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    stops = GenerationConfig.from_pretrained(folder).eos_token_id if file.is_file() else None
    stops = stops if stops is not None else config.eos_token_id
    stops = stops if stops is not None else tokenizer.eos_token_id
    return [int(id) for id in stops] if isinstance(stops, list) else [int(stops)] if stops is not None else []


# --- the tensors ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_weights(folder: Path) -> "Iterator[dict[str, Callable[[], torch.Tensor]]]":
    """Yield the reader of each tensor of a folder's safetensors, by name; a tensor is in memory only while used."""
    import functools

    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            readers |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        yield readers


def _tensors_of(
    config: Any, weights: "dict[str, Callable[[], torch.Tensor]]", architecture: str, dtype: str, folder: Path
) -> Iterator[_Tensor]:
    """Yield the tensors of the file.

    Raises:
        UserError: The folder's tensors are not those of its configuration.
    """
    import functools

    import gguf
    import torch

    # 1. The tensors that the configuration means; a tied output matrix is that of the embedding.
    with torch.device("meta"):
        model = build_on_meta_device(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    missing = [name for name in shapes if name not in weights]
    if missing:
        problem = f"its safetensors lack {missing[0]}, which its config.json asks for"
        raise UserError(folder, problem, "give a folder that save_pretrained wrote")
    # 2. Their names, and what is done to their numbers.
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for name, shape in shapes.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(folder, f"llama.cpp's {architecture} has no place for the tensor {name}", _FIX)
        read = functools.partial(_read, weights[name], name, shape, config, folder)
        yield _Tensor(new, shape, tensor_dtype(shape, dtype), read)
    # 3. The factors of Llama 3's rotary embedding.
    if rope_parameters(config).get("rope_type") == "llama3":
        yield _Tensor(_ROPE_FACTORS, (_head_dim(config) // 2,), "f32", functools.partial(_rope_factors, config))


def tensor_dtype(shape: tuple[int, ...], dtype: str) -> str:
    """Return the number format of a tensor: vectors are fp32, and rows that are not whole blocks are not quantised."""
    if len(shape) < 2:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype


def _read(
    read: "Callable[[], torch.Tensor]", name: str, shape: tuple[int, ...], config: Any, folder: Path
) -> "np.ndarray":
    """Return a tensor's numbers in fp32, as llama.cpp expects them."""
    import torch

    tensor = read()
    if tuple(tensor.shape) != shape:
        problem = f"its tensor {name} has the shape {tuple(tensor.shape)}, and its config.json means {shape}"
        raise UserError(folder, problem, "give a folder that save_pretrained wrote")
    tensor = tensor.to(torch.float32)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1.0  # Gemma multiplies by 1 + weight, llama.cpp by what the file holds
    if is_permuted(config, name):
        tensor = pair_rotary_rows(tensor, heads_of(config, name))
    return tensor.contiguous().numpy()


def is_permuted(config: Any, name: str) -> bool:
    """Return whether a tensor's rows are in another order in llama.cpp: queries and keys of its `llama`."""
    projections = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    return ARCHITECTURES[config.model_type] == "llama" and name.endswith(projections)


def heads_of(config: Any, name: str) -> int:
    return int(config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)


def pair_rotary_rows(tensor: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder the rows of queries or keys from halves to neighbours.

    transformers rotates row i of a head with row i + head_dim / 2, llama.cpp's `llama` rotates rows 2i and 2i + 1.

    Args:
        tensor: [heads * head_dim, ...].
        heads: Number of heads.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))  # [heads, 2, head_dim / 2, ...]
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> "np.ndarray":
    """Return by what Llama 3's scaling divides each frequency: fp32 [head_dim / 2]."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = _head_dim(config)
    base = float(rope_parameters(config)["rope_theta"])
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).to(torch.float32).numpy()


# --- adapters ---------------------------------------------------------------------------------------------


def write_adapter_gguf(adapter: Path, base: Path, target: Path) -> None:
    """Write peft's LoRA matrices, unmerged and in fp32, to a GGUF file for llama.cpp's `--lora`.

    llama.cpp adds B A x times alpha / rank. Where peft scales otherwise (rslora, a rank or alpha of a module's own),
    the matrix B makes up for it.

    Args:
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        base: Folder of the model that they were trained on.
        target: Path of the file, in a folder that exists.

    Raises:
        UserError: They are no plain LoRA, or they adapt what llama.cpp's architecture does not have.
        OSError: The file cannot be written.
    """
    import gguf
    from peft import PeftConfig

    config = load_config(base)
    architecture = require_architecture(config, base)
    lora: Any = PeftConfig.from_pretrained(str(adapter))
    _refuse_other_adapters(lora, adapter)
    with open_writer(target, architecture) as writer, open_weights(adapter) as weights:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.lora_alpha))
        tensors = list(_matrices_of(config, lora, weights, architecture, adapter))
        write_tensors(writer, tensors, Path(str(writer.path)))


def _refuse_other_adapters(lora: Any, folder: Path) -> None:
    others = {
        f"adapters of type {lora.peft_type}": str(getattr(lora.peft_type, "value", lora.peft_type)) != "LORA",
        "DoRA": bool(getattr(lora, "use_dora", False)),
        "trained biases": getattr(lora, "bias", "none") != "none",
        "completely trained modules": bool(getattr(lora, "modules_to_save", None)),
    }
    for name, present in others.items():
        if present:
            fix = "export the merged model: leave out --no-merge"
            raise UserError(folder, f"llama.cpp's adapters are plain LoRA, and these have {name}", fix)


def _matrices_of(
    config: Any, lora: Any, weights: "dict[str, Callable[[], torch.Tensor]]", architecture: str, folder: Path
) -> Iterator[_Tensor]:
    """Yield lora_a [rank, inputs] and lora_b [outputs, rank] of every adapted matrix."""
    import functools

    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for name in sorted(weights):
        module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if not found:
            if ".lora_B." in name:
                continue
            raise UserError(folder, f"{name} is no matrix of LoRA", "export the merged model: leave out --no-merge")
        new = names.get_name(module)
        tied = module == "lm_head" and config.tie_word_embeddings
        if new is None or tied or new == "token_embd":
            problem = f"llama.cpp's {architecture} takes no adapter of {module}"
            raise UserError(folder, problem, "export the merged model: leave out --no-merge")
        a, b = weights[name], weights[name.replace(".lora_A.", ".lora_B.")]
        rank = a().shape[0]
        scale = _scale_of(lora, module, rank) / (lora.lora_alpha / rank)
        read = functools.partial(_read_matrix, f"{module}.weight", config)
        yield _Tensor(f"{new}.weight.lora_a", tuple(a().shape), "f32", functools.partial(read, a, 1.0, False))
        yield _Tensor(f"{new}.weight.lora_b", tuple(b().shape), "f32", functools.partial(read, b, scale, True))


def _scale_of(lora: Any, module: str, rank: int) -> float:
    """Return peft's factor of B A for one module."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = lora.alpha_pattern or {}
    alpha: Any = patterns.get(get_pattern_key(list(patterns), module), lora.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if lora.use_rslora else rank)


def _read_matrix(
    weight: str, config: Any, read: "Callable[[], torch.Tensor]", scale: float, is_b: bool
) -> "np.ndarray":
    """Return A or B in fp32; B has the rows of the matrix `weight` that it is added to, and so their order."""
    import torch

    tensor = read().to(torch.float32) * scale
    if is_b and is_permuted(config, weight):
        tensor = pair_rotary_rows(tensor, heads_of(config, weight))
    return tensor.contiguous().numpy()


# --- writing ----------------------------------------------------------------------------------------------


def write_tensors(writer: "gguf.GGUFWriter", tensors: list[_Tensor], path: Path) -> None:
    """Write the file: header, metadata, and one tensor after the other, so that one at a time is in memory.

    Raises:
        UserError: A number is too large for f16, or not finite.
    """
    import gguf
    import numpy as np

    kinds = {name: gguf.GGMLQuantizationType[name.upper()] for name in DTYPES}
    for tensor in tensors:
        kind = kinds[tensor.dtype]
        shape = tensor.shape
        if tensor.dtype in ("bf16", "q8_0"):
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        numbers = np.dtype({"f32": np.float32, "f16": np.float16}.get(tensor.dtype, np.uint8))
        writer.add_tensor_info(tensor.name, shape, numbers, math.prod(shape) * numbers.itemsize, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = tensor.read()
        largest = float(np.abs(values).max(initial=0.0))
        if not math.isfinite(largest):
            raise UserError(
                tensor.name, "this tensor has numbers that are not finite", "train again: this model is broken"
            )
        if tensor.dtype == "f16" and largest > _LARGEST_F16:
            problem = f"this tensor has numbers up to {largest:.3g}, which f16 cannot hold"
            raise UserError(tensor.name, problem, "use --dtype bf16 or f32")
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[tensor.dtype]))
