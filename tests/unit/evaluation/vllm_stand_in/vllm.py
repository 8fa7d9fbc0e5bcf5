"""A package with the interface of vLLM, as far as the vLLM backend uses it, that runs a tiny model on the CPU."""

import types
from pathlib import Path
from typing import Any

import torch

from minisft.evaluation.backends import TransformersModel

SamplingParams = types.SimpleNamespace


class LLM:
    """Greedy whatever the sampling parameters say; `settings` holds those of the last call."""

    def __init__(
        self,
        model: str,
        dtype: str,
        trust_remote_code: bool,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        generation_config: str,
    ) -> None:
        assert (dtype, generation_config) == ("float32", "vllm")
        assert enforce_eager or torch.cuda.is_available()
        assert (tensor_parallel_size, gpu_memory_utilization) == (1, 0.9)
        self.model = TransformersModel(Path(model), torch.float32, trust_remote_code)
        self.settings: list[Any] = []

    def generate(self, prompts: list[dict[str, list[int]]], settings: list[Any], use_tqdm: bool) -> list[Any]:
        self.settings = settings
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, settings, strict=True)]

    def _answer(self, prompt: list[int], settings: Any) -> Any:
        assert settings.ignore_eos
        assert not settings.detokenize
        [answer] = self.model.answer(
            [prompt], stop_token_ids=settings.stop_token_ids, max_new_tokens=settings.max_tokens, sampling=None
        )
        ids = answer.ids + ([settings.stop_token_ids[0]] if answer.finish == "stop" else [])
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])
