"""vLLM as a generation backend (Kwon et al. 2023, arXiv 2309.06180)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from minisft.errors import UserError
from minisft.evaluation.batch_memory import free_unused_memory
from minisft.evaluation.generation import Generated, Sampling, context_length
from minisft.models import load_config
from minisft.optional_packages import require_package


class VllmModel:
    """A model in vLLM (Kwon et al. 2023), which schedules the rows of a batch itself.

    Args:
        weights: The model's folder.
        dtype: Dtype of the weights.
        trust_remote_code: Run code from the folder.
        tensor_parallel_size: Number of GPUs that share the model.
        gpu_memory_utilization: The share of a GPU's memory that vLLM may take.

    Raises:
        UserError: The folder holds only an adapter.
    """

    def __init__(
        self,
        weights: Path,
        dtype: torch.dtype,
        trust_remote_code: bool,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        if (weights / "adapter_config.json").exists():
            problem = "this folder holds an adapter, and the vLLM backend loads complete models only"
            raise UserError(weights, problem, "set evaluation.backend to transformers")
        from vllm import LLM

        self.context = context_length(load_config(weights, trust_remote_code))
        self.llm = LLM(
            model=str(weights),
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=not torch.cuda.is_available(),  # compiling for a CPU takes longer than it saves
            generation_config="vllm",  # vLLM would otherwise take the temperature of the folder's file as a default
        )

    def answer(
        self,
        prompts: list[list[int]],
        *,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Generated]:
        """Return the answers to prompts [rows, tokens]; they end by the rules of `generation.generate`."""
        from vllm import SamplingParams

        rooms = [max_new_tokens if self.context is None else self.context - len(prompt) for prompt in prompts]
        rooms = [max(0, min(max_new_tokens, room)) for room in rooms]
        places = [place for place, room in enumerate(rooms) if room > 0]
        settings = [
            SamplingParams(
                temperature=sampling.temperature if sampling else 0.0,
                top_p=sampling.top_p if sampling else 1.0,
                seed=sampling.seed_of(prompts[place]) if sampling else None,
                max_tokens=rooms[place],
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,  # only the trained terminators end an answer
                detokenize=False,
            )
            for place in places
        ]
        requests = [{"prompt_token_ids": prompts[place]} for place in places]
        outputs = self.llm.generate(requests, settings, use_tqdm=False) if requests else []
        answers = [Generated([], "context") for _ in prompts]
        for place, output in zip(places, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            if ids and ids[-1] in stop_token_ids:
                answers[place] = Generated(ids[:-1], "stop")
            else:
                answers[place] = Generated(ids, "length" if rooms[place] == max_new_tokens else "context")
        return answers

    def release(self) -> None:
        """Free the model's memory."""
        del self.llm
        free_unused_memory()


def require_vllm() -> None:
    """Check that vLLM is usable.

    Raises:
        UserError: vLLM is not installed, or there is no GPU and it is not a build for CPUs.
    """
    fix = "leave evaluation.backend at transformers"
    require_package("evaluation.backend", "vllm", fix)
    if not torch.cuda.is_available() and not _is_cpu_build():
        problem = "this build of vLLM needs a GPU, and this machine has none"
        raise UserError("evaluation.backend", problem, f"install vLLM's CPU build, or {fix}")


def _is_cpu_build() -> bool:
    """Return whether vLLM itself finds that it is to run on this machine's CPU."""
    try:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())
    except (ImportError, RuntimeError):
        return False
