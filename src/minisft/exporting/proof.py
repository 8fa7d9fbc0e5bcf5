"""The proof of an export: each installed engine answers held-out prompts, and is compared with the trained model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import say, warn
from minisft.errors import UserError
from minisft.exporting.engines import (
    ENGINES,
    EngineError,
    LlamaCppEngine,
    TransformersEngine,
    VllmEngine,
    find_llama_cpp,
    find_vllm,
)
from minisft.exporting.verification import (
    Engine,
    EngineAnswer,
    HeldOutPrompt,
    Tolerance,
    compare,
    held_out_prompts,
    not_run,
    reference_answers,
)
from minisft.models import load_config, load_model, load_tokenizer, resolve_model
from minisft.recipe import Recipe

if TYPE_CHECKING:
    from minisft.data.encoder import Encoder

VERIFIED = "verified.json"
NEW_TOKENS = 64  # the most tokens of an answer that are compared
_INSTALL = "`make engines` of the source code installs it, or name its folder in MINISFT_ENGINES"
_GGUF_ONLY, _FOLDERS_ONLY = "it reads GGUF files only: --to gguf", "it reads complete model folders only"
_NO_ADAPTERS = "it does not read adapters in GGUF"
_INAPPLICABLE = (_GGUF_ONLY, _FOLDERS_ONLY, _NO_ADAPTERS)


@dataclass(frozen=True)
class ExportedModel:
    """An export that is not yet finished.

    Args:
        folder: The folder that it is written to.
        source: Folder of the run's model or checkpoint.
        base: Folder of the base model that the adapters in `source` belong to; None: `source` is a model.
        dtype: Number format of the weights, such as f16; None: that of `source`.
        merged: Whether the adapters, if there are any, are merged into the weights.
        gguf: Name of the GGUF file in the folder; "": the export is a model folder.
        adapter_gguf: Name of the GGUF file of the adapters in the folder; "": none.
    """

    folder: Path
    source: Path
    base: Path | None
    dtype: str | None
    merged: bool = True
    gguf: str = ""
    adapter_gguf: str = ""


@dataclass
class Verified:
    """The entry of each engine in verified.json, and the first fault as a sentence ("": none)."""

    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class _Reference:
    """What the engines are compared with; `model_context` is the most tokens that the model supports, if known."""

    encoder: "Encoder"
    prompts: list[HeldOutPrompt]
    answers: list[EngineAnswer]
    max_new_tokens: int
    model_context: int | None = None

    @property
    def is_sentencepiece(self) -> bool:
        """Whether the vocabulary is of SentencePiece's kind, which writes spaces as ▁."""
        return "▁" in "".join(list(self.encoder.tokenizer.get_vocab())[:2000])

    @property
    def context(self) -> int:
        """The number of tokens that the longest prompt and its answer need, rounded up."""
        longest = max(len(prompt.ids) for prompt in self.prompts) + self.max_new_tokens
        rounded = -(-(longest + 1) // 256) * 256
        return min(rounded, self.model_context or rounded)


def prove(
    exported: ExportedModel, recipe: Recipe, engine: str, llama_cpp: Path | None, max_kl: float | None
) -> Verified:
    """Let the engines answer the prompts of held-out conversations, and compare them with the trained model.

    Args:
        exported: The export.
        recipe: The run's recipe.
        engine: "auto": all that are installed; "none"; or the name of one.
        llama_cpp: A folder of llama.cpp that the user named.
        max_kl: The largest accepted mean KL divergence of a quantised model; None: that of the format.

    Raises:
        UserError: The engine that was named is not installed, or does not read this form.
    """
    found = _engines(exported, llama_cpp)
    if engine not in ("auto", "none") and isinstance(found[engine], str):
        raise UserError(f"--engine {engine}", str(found[engine]), "use --engine auto, or install it")
    verified = Verified({name: not_run("--engine none") for name in ENGINES})
    if engine == "none":
        return verified
    reference: _Reference | None = None
    for name in ENGINES:
        builder = found[name] if engine in ("auto", name) else f"--engine {engine}"
        if not isinstance(builder, str):
            reference = reference or _reference(exported, recipe)
            if reference.prompts:
                verified.engines[name] = _run(builder(reference), exported, reference, max_kl)
                _tell(name, verified, reference)
                continue
            builder = "the run has no held-out conversations"
        verified.engines[name] = not_run(builder)
        if engine == "auto" and builder not in _INAPPLICABLE:
            warn(f"not verified with {name}: {builder}")
    return verified


def _engines(exported: ExportedModel, llama_cpp: Path | None) -> dict[str, "str | Callable[[_Reference], Engine]"]:
    """Return each engine for an export, or the reason why it does not run."""
    folder, server, vllm = exported.folder, find_llama_cpp(llama_cpp), find_vllm()
    model = folder / exported.gguf
    adapter = folder / exported.adapter_gguf if exported.adapter_gguf else None
    found: dict[str, str | Callable[[_Reference], Engine]] = {}
    if adapter:
        found["transformers"] = _NO_ADAPTERS
    elif exported.gguf and (reason := _unread_by_transformers(exported)):
        found["transformers"] = reason
    else:
        found["transformers"] = lambda reference: TransformersEngine(
            folder, exported.gguf, weights_only=reference.is_sentencepiece and bool(exported.gguf)
        )
    if not exported.gguf:
        found["llama.cpp"] = _GGUF_ONLY
    elif server is None:
        found["llama.cpp"] = f"llama-server is not installed; {_INSTALL}"
    else:
        program = server
        found["llama.cpp"] = lambda reference: LlamaCppEngine(program, model, reference.context, adapter)
    if exported.gguf or not exported.merged:
        found["vllm"] = _FOLDERS_ONLY
    elif vllm is None:
        found["vllm"] = f"it is not installed; {_INSTALL}"
    else:
        program_of_vllm, dtype = vllm, _vllm_dtype(exported)
        found["vllm"] = lambda reference: VllmEngine(program_of_vllm, folder, reference.context, dtype)
    return found


def _unread_by_transformers(exported: ExportedModel) -> str:
    """Return why transformers cannot read the GGUF file of this kind of model; "" if it can."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    kind = load_config(exported.base or exported.source).model_type
    if kind in GGUF_SUPPORTED_ARCHITECTURES:
        return ""
    return f"it does not read GGUF files of {kind} models"


def _vllm_dtype(exported: ExportedModel) -> str:
    """Return the number format of vLLM's arithmetic: fp32 on a CPU, elsewhere that of the weights."""
    import torch

    if not torch.cuda.is_available():
        return "float32"
    return {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}.get(exported.dtype or "", "auto")


def _reference(exported: ExportedModel, recipe: Recipe) -> _Reference:
    """Answer the held-out prompts with the run's own model, in fp32."""
    import torch

    from minisft.data.encoder import Encoder
    from minisft.evaluation.generation import context_length

    output, trusted = Path(recipe.output), recipe.trust_remote_code
    folder = resolve_model(recipe.model, trusted, weights=False).folder
    encoder = Encoder(load_tokenizer(folder, trusted), recipe.data.template, recipe.data.template_options)
    prompts = held_out_prompts(output, encoder)
    most = min(NEW_TOKENS, recipe.evaluation.max_new_tokens)
    if not prompts:
        return _Reference(encoder, [], [], most)
    model = load_model(exported.source, dtype=torch.float32, trust_remote_code=trusted, base=exported.base)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    answers = reference_answers(model.to(device).eval(), encoder, prompts, most)
    return _Reference(encoder, prompts, answers, most, context_length(model.config))


def _run(engine: Engine, exported: ExportedModel, reference: _Reference, max_kl: float | None) -> dict[str, Any]:
    """Return the entry of one engine in verified.json."""
    try:
        answers = engine.answer(reference.prompts, reference.max_new_tokens)
    except EngineError as error:
        return not_run(str(error)) | {"status": "failed"}
    tolerance = Tolerance.of(exported.dtype or "f32", max_kl)
    entry = compare(reference.prompts, reference.answers, answers, reference.encoder, tolerance).as_report()
    if isinstance(engine, TransformersEngine) and engine.weights_only:
        entry["prompt_ids_equal"] = None
        entry["reason"] = entry["reason"] or "only the weights: it reads this vocabulary otherwise than llama.cpp"
    return entry


def _tell(name: str, verified: Verified, reference: _Reference) -> None:
    """Print the result of one engine, and note its fault."""
    entry = verified.engines[name]
    if entry["status"] == "failed":
        verified.problem = verified.problem or f"{name}: {entry['reason']}"
        warn(f"{name}: {entry['reason']}")
        return
    count = entry["prompts"]
    equal = entry["prompt_ids_equal"]
    rendered = "the weights only" if equal is None else f"{equal} of {count} prompts"
    say(
        f"verified with {name}: {rendered}, {entry['answers_equal']} of {count} answers equal, "
        f"log-probabilities within {entry['max_logprob_difference']:.1e}, KL divergence {entry['mean_kl']:.1e}"
    )
