"""What a model is asked through: transformers with the decoding loop of `generation`, or vLLM on a GPU."""

import gc
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from minisft.errors import UserError
from minisft.evaluation.generation import Finish, Generated, context_length, generate
from minisft.evaluation.loss import Row, sum_of_losses
from minisft.evaluation.sampling import Sampling
from minisft.models import is_out_of_memory, load_config, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersModel:
    """A model in this process.

    Args:
        weights: its folder.
        dtype: of its weights.
        trust_remote_code: let code from the folder run.
        base: the folder of the base model where `weights` holds adapters; None: the one that they name.

    Raises:
        UserError: the folder is damaged or unfinished.
    """

    def __init__(self, weights: Path, dtype: torch.dtype, trust_remote_code: bool, base: Path | None = None) -> None:
        from safetensors import SafetensorError

        try:
            model = load_model(weights, dtype=dtype, trust_remote_code=trust_remote_code, base=base)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            first = str(error).strip().split("\n")[0]
            raise UserError(weights, f"{type(error).__name__}: {first}", "train anew or delete it") from error
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: PreTrainedModel = model.to(device).eval()

    def answer(
        self,
        prompts: list[list[int]],
        *,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Generated]:
        """Answers to prompts, decoded as one batch as far as there is room."""
        return generate(
            self.model,
            prompts,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=len(prompts),
            sampling=sampling,
        )

    def sum_of_losses(self, rows: Sequence[Row]) -> tuple[float, int]:
        """As `loss.sum_of_losses`."""
        return sum_of_losses(self.model, rows)

    def release(self) -> None:
        """Give its memory back."""
        del self.model
        _collect()


class VllmModel:
    """A model in vLLM (Kwon et al. 2023), which schedules the rows of a batch itself.

    Args:
        weights: its folder.
        dtype: of its weights.
        trust_remote_code: let code from the folder run.

    Raises:
        UserError: vLLM is not installed, there is no GPU, or the folder holds an adapter only.
    """

    def __init__(self, weights: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
        require_vllm()
        if (weights / "adapter_config.json").exists():
            what = "vLLM is given whole models here, and this is an adapter"
            raise UserError(weights, what, "set evaluation.backend to transformers")
        from vllm import LLM

        self.context = context_length(load_config(weights, trust_remote_code))
        self.llm = LLM(
            model=str(weights),
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
            generation_config="vllm",  # not the folder's: its temperature would be taken
        )

    def answer(
        self,
        prompts: list[list[int]],
        *,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Generated]:
        """Answers to prompts; the same rules for ends as in `generation.generate`."""
        from vllm import SamplingParams

        rooms = [max_new_tokens if self.context is None else self.context - len(prompt) for prompt in prompts]
        rooms = [max(0, min(max_new_tokens, room)) for room in rooms]
        asked = [place for place, room in enumerate(rooms) if room > 0]
        settings = [
            SamplingParams(
                temperature=sampling.temperature if sampling else 0.0,
                top_p=sampling.top_p if sampling else 1.0,
                seed=sampling.seed_of(prompts[place]) if sampling else None,
                max_tokens=rooms[place],
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,  # the trained terminators alone end an answer
                detokenize=False,
            )
            for place in asked
        ]
        given = [{"prompt_token_ids": prompts[place]} for place in asked]
        outputs = self.llm.generate(given, settings, use_tqdm=False) if given else []
        answers = [Generated([], "context") for _ in prompts]
        for place, output in zip(asked, outputs, strict=True):
            full: Literal["length", "context"] = "length" if rooms[place] == max_new_tokens else "context"
            answers[place] = _without_terminator(list(output.outputs[0].token_ids), stop_token_ids, full)
        return answers

    def release(self) -> None:
        """Give its memory back."""
        del self.llm
        _collect()


def require_vllm() -> None:
    """Check that vLLM can be used.

    Raises:
        UserError: it is not installed, or there is no GPU.
    """
    mend = "leave evaluation.backend at transformers"
    if importlib.util.find_spec("vllm") is None:
        raise UserError("evaluation.backend", "vllm is not installed", f"pip install vllm, or {mend}")
    if not torch.cuda.is_available():
        raise UserError("evaluation.backend", "vllm is for GPUs, and there is none here", mend)


def _without_terminator(ids: list[int], stops: Sequence[int], full: Finish) -> Generated:
    if ids and ids[-1] in stops:
        return Generated(ids[:-1], "stop")
    return Generated(ids, full)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
