"""The proof of an export: each installed engine answers held-out prompts, and is compared with the trained model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import say, waiting, warn
from minisft.errors import UserError
from minisft.exporting.answer_comparison import (
    EngineAnswer,
    HeldOutPrompt,
    Tolerance,
    compare,
    held_out_prompts,
    not_run,
    reference_answers,
)
from minisft.exporting.engines import (
    ENGINES,
    EngineError,
    EngineStartError,
    LlamaCppEngine,
    TransformersEngine,
    VllmEngine,
    find_llama_cpp,
    find_vllm,
)
from minisft.models import load_config, load_model, load_tokenizer
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
    def is_byte_level(self) -> bool:
        """Whether the tokenizer works on bytes, and not on SentencePiece's pieces."""
        return '"ByteLevel"' in self.encoder.tokenizer.backend_tokenizer.to_str()

    @property
    def context(self) -> int:
        """The number of tokens that the longest prompt and its answer need, rounded up."""
        longest = max(len(prompt.ids) for prompt in self.prompts) + self.max_new_tokens
        rounded = -(-(longest + 1) // 256) * 256
        return min(rounded, self.model_context or rounded)


def require_engine(engine: str, form: str, merged: bool, llama_cpp: Path | None) -> None:
    """Refuse an engine that was named and cannot verify a form, before anything is written.

    Raises:
        UserError: It does not read the form, or it is not installed.
    """
    if engine in ("auto", "none"):
        return
    reason = _reason_against(engine, form != "folder", merged, llama_cpp)
    if reason:
        raise UserError(f"--engine {engine}", reason, "use --engine auto, or install it")


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
        UserError: The engine that was named cannot be used.
    """
    verified = Verified({name: not_run("--engine none") for name in ENGINES})
    if engine == "none":
        return verified
    reference: _Reference | str | None = None
    for name in ENGINES:
        if engine not in ("auto", name):
            verified.engines[name] = not_run(f"--engine {engine}")
            continue
        reason = _reason_against(name, bool(exported.gguf), exported.merged, llama_cpp)
        if not reason and name == "transformers" and exported.gguf:
            reason = _unread_by_transformers(exported, recipe)
        if not reason:
            with waiting("answering held-out prompts with the run's own model"):
                reference = reference or _reference(exported, recipe)
            if not isinstance(reference, str):
                with waiting(f"answering held-out prompts with {name}"):
                    verified.engines[name] = _run(name, exported, recipe, reference, llama_cpp, max_kl, engine == name)
                _tell(name, verified)
                continue
            reason = reference
        verified.engines[name] = not_run(reason)
        if reason not in _INAPPLICABLE:
            warn(f"not verified with {name}: {reason}")
    return verified


def _reason_against(engine: str, is_gguf: bool, merged: bool, llama_cpp: Path | None) -> str:
    """Return why an engine cannot verify an export; "" if it can."""
    if engine == "transformers":
        return _NO_ADAPTERS if is_gguf and not merged else ""
    if engine == "llama.cpp":
        if not is_gguf:
            return _GGUF_ONLY
        return "" if find_llama_cpp(llama_cpp) else f"llama-server is not installed; {_INSTALL}"
    if is_gguf or not merged:
        return _FOLDERS_ONLY
    return "" if find_vllm() else f"it is not installed; {_INSTALL}"


def _unread_by_transformers(exported: ExportedModel, recipe: Recipe) -> str:
    """Return why transformers cannot read the GGUF file of this kind of model; "" if it can."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    kind = load_config(exported.base or exported.source, recipe.trust_remote_code).model_type
    if kind in GGUF_SUPPORTED_ARCHITECTURES:
        return ""
    return f"it does not read GGUF files of {kind} models"


def _reference(exported: ExportedModel, recipe: Recipe) -> _Reference | str:
    """Answer the held-out prompts with the run's own model, in fp32; return the reason where that is not possible."""
    import torch

    from minisft.data.encoder import Encoder
    from minisft.evaluation.generation import context_length

    output, trusted = Path(recipe.output), recipe.trust_remote_code
    encoder = Encoder(load_tokenizer(exported.source, trusted), "auto")
    if not (output / "dataset" / "ledger.json").is_file():
        return "the run has no prepared data, which the held-out conversations are part of"
    most = min(NEW_TOKENS, recipe.evaluation.max_new_tokens)
    context = context_length(load_config(exported.base or exported.source, trusted))
    listed = held_out_prompts(output, encoder)
    prompts = [prompt for prompt in listed if context is None or len(prompt.ids) + most <= context]
    if len(prompts) < len(listed):
        warn(f"{len(listed) - len(prompts)} held-out prompts leave no room for an answer, and are not compared")
    if not prompts:
        return "the run has no held-out conversations that could be answered"
    model = load_model(exported.source, dtype=torch.float32, trust_remote_code=trusted, base=exported.base)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    answers = reference_answers(model.to(device).eval(), encoder, prompts, most)
    return _Reference(encoder, prompts, answers, most, context)


def _engine(
    name: str, exported: ExportedModel, recipe: Recipe, reference: _Reference, llama_cpp: Path | None
) -> TransformersEngine | LlamaCppEngine | VllmEngine:
    folder, trusted = exported.folder, recipe.trust_remote_code
    if name == "transformers":
        return TransformersEngine(
            folder,
            exported.gguf,
            weights_only=bool(exported.gguf) and not reference.is_byte_level,
            stop_token_ids=tuple(reference.encoder.stop_token_ids),
            base=exported.base,
            trust_remote_code=trusted,
        )
    if name == "llama.cpp":
        server = find_llama_cpp(llama_cpp)
        assert server is not None
        adapter = folder / exported.adapter_gguf if exported.adapter_gguf else None
        return LlamaCppEngine(server, folder / exported.gguf, reference.context, adapter)
    program = find_vllm()
    assert program is not None
    return VllmEngine(program, folder, reference.context, trust_remote_code=trusted)


def _run(
    name: str,
    exported: ExportedModel,
    recipe: Recipe,
    reference: _Reference,
    llama_cpp: Path | None,
    max_kl: float | None,
    is_named: bool,
) -> dict[str, Any]:
    """Return the entry of one engine in verified.json; one that does not start was `not run`, unless it was named."""
    engine = _engine(name, exported, recipe, reference, llama_cpp)
    try:
        answers = engine.answer(reference.prompts, reference.max_new_tokens)
    except EngineStartError as error:
        return not_run(str(error)) | ({"status": "failed"} if is_named else {})
    except EngineError as error:
        return not_run(str(error)) | {"status": "failed"}
    tolerance = Tolerance.of(exported.dtype or "f32", max_kl)
    entry = compare(reference.prompts, reference.answers, answers, reference.encoder, tolerance).as_report()
    if isinstance(engine, TransformersEngine) and engine.weights_only:
        entry["prompt_ids_equal"] = None
        entry["reason"] = entry["reason"] or "only the weights: it reads this vocabulary differently from llama.cpp"
    return entry


def _tell(name: str, verified: Verified) -> None:
    """Print the result of one engine, and note its fault."""
    entry = verified.engines[name]
    if entry["status"] == "failed":
        verified.problem = verified.problem or f"{name}: {entry['reason']}"
        warn(f"{name}: {entry['reason']}")
        return
    if entry["status"] == "not run":
        warn(f"not verified with {name}: {entry['reason']}")
        return
    count = entry["prompts"]
    equal = entry["prompt_ids_equal"]
    rendered = "the weights only" if equal is None else f"{equal} of {count} prompts"
    say(
        f"verified with {name}: {rendered}, {entry['answers_equal']} of {count} answers equal, "
        f"log-probabilities within {entry['max_logprob_difference']:.1e}, KL divergence {entry['mean_kl']:.1e}"
    )
