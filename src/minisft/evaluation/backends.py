"""Who generates: transformers or vLLM, in this process or in several.

What a batch comes to depends neither on the process nor on the order: the batches are the same for any number of
processes, and only the process that hands them out writes anything.
"""

import gc
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from minisft.errors import UserError
from minisft.evaluation.generation import Finish, Generated, Sampling, context_length, generate
from minisft.evaluation.metrics import LossRow, sum_of_losses
from minisft.models import is_out_of_memory, load_config, load_model
from minisft.text import first_line

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
            raise UserError(
                weights, f"{type(error).__name__}: {first_line(error)}", "train anew or delete it"
            ) from error
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

    def sum_of_losses(self, rows: Sequence[LossRow]) -> tuple[float, int]:
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
            problem = "vLLM is given whole models here, and this is an adapter"
            raise UserError(weights, problem, "set evaluation.backend to transformers")
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
    fix = "leave evaluation.backend at transformers"
    if importlib.util.find_spec("vllm") is None:
        raise UserError("evaluation.backend", "vllm is not installed", f"pip install vllm, or {fix}")
    if not torch.cuda.is_available():
        raise UserError("evaluation.backend", "vllm is for GPUs, and there is none here", fix)


def _without_terminator(ids: list[int], stops: Sequence[int], full: Finish) -> Generated:
    if ids and ids[-1] in stops:
        return Generated(ids[:-1], "stop")
    return Generated(ids, full)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class ModelSpec:
    """Which model is to be asked, and how it answers.

    Args:
        weights: its folder.
        dtype: of its weights.
        trust_remote_code: let code from the folder run.
        stop_token_ids: the terminators.
        max_new_tokens: of an answer.
        sampling: None for greedy.
        backend: what generates; losses are always computed with transformers.
        base: the folder of the run's base model, which adapters are put on.
    """

    weights: Path
    dtype: torch.dtype
    trust_remote_code: bool
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    base: Path | None = None

    def load(self) -> "TransformersModel | VllmModel":
        """Load it.

        Raises:
            UserError: the folder is damaged or unfinished, or vllm is asked for and absent.
        """
        if self.backend == "vllm":
            return VllmModel(self.weights, self.dtype, self.trust_remote_code)
        return TransformersModel(self.weights, self.dtype, self.trust_remote_code, self.base)


@dataclass(frozen=True)
class AnswerTask:
    """Prompts to be answered as one batch."""

    prompts: list[list[int]]

    def of(self, model: "TransformersModel | VllmModel", spec: ModelSpec) -> list[Generated]:
        return model.answer(
            self.prompts,
            stop_token_ids=spec.stop_token_ids,
            max_new_tokens=spec.max_new_tokens,
            sampling=spec.sampling,
        )


@dataclass(frozen=True)
class LossTask:
    """Rows whose loss is to be computed as one batch."""

    rows: list[LossRow]

    def of(self, model: "TransformersModel | VllmModel", spec: ModelSpec) -> tuple[float, int]:
        assert isinstance(model, TransformersModel)
        return model.sum_of_losses(self.rows)


@dataclass(frozen=True)
class Outcome:
    """What a task came to.

    Args:
        task: its number.
        value: what its `of` gave.
        seconds: Time that it took, without loading.
    """

    task: int
    value: Any
    seconds: float


class Workers:
    """The processes that work; one alone is this process.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._held = _LoadedModel()
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Event | None = None

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            spawn = get_context("spawn")
            self._stop = spawn.Event()
            threads = max(1, torch.get_num_threads() // self.processes)
            given = (spawn.Value("i", 0), _visible_gpus(), threads, self._stop)
            self._pool = ProcessPoolExecutor(self.processes, spawn, _start, given)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._held.release()
        if self._pool is not None and self._stop is not None:
            if kind is not None:
                self._stop.set()  # what is under way is of no more use
            self._pool.shutdown(cancel_futures=True)

    def perform(self, spec: ModelSpec, tasks: Sequence[AnswerTask | LossTask]) -> Iterator[Outcome]:
        """The outcomes of tasks, as they come.

        Raises:
            UserError: the model cannot be loaded.
            RuntimeError: a process died.
        """
        if self._pool is None:
            for number, task in enumerate(tasks):
                yield Outcome(number, *_perform(self._held, spec, task))
            return
        numbers: dict[Future[tuple[Any, float]], int] = {
            self._pool.submit(_perform_here, spec, task): number for number, task in enumerate(tasks)
        }
        try:
            for done in as_completed(numbers):
                yield Outcome(numbers[done], *done.result())
        except BrokenProcessPool as error:
            problem = "a process of the evaluation died, as it does where memory is short"
            raise RuntimeError(f"{problem}; what it answered is kept: evaluate again with fewer processes") from error
        finally:
            for future in numbers:
                future.cancel()


def default_processes() -> int:
    """One for each GPU; one on a CPU, which a single process keeps busy."""
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


class _LoadedModel:
    """The model that a process holds."""

    def __init__(self) -> None:
        self._spec: ModelSpec | None = None
        self._model: TransformersModel | VllmModel | None = None

    def get(self, spec: ModelSpec) -> "TransformersModel | VllmModel":
        if self._model is None or self._spec != spec:
            self.release()  # before the next one is loaded
            self._model, self._spec = spec.load(), spec
        return self._model

    def release(self) -> None:
        if self._model is not None:
            self._model.release()
        self._model, self._spec = None, None


def _perform(held: _LoadedModel, spec: ModelSpec, task: AnswerTask | LossTask) -> tuple[Any, float]:
    model = held.get(spec)
    started = time.perf_counter()
    value = task.of(model, spec)
    return value, time.perf_counter() - started


# --- inside a process of the pool -----------------------------------------------------------------------------

_local_model = _LoadedModel()


def _perform_here(spec: ModelSpec, task: AnswerTask | LossTask) -> tuple[Any, float]:
    return _perform(_local_model, spec, task)


def _start(counter: "Synchronized[int]", gpus: list[str], threads: int, stop: Event) -> None:
    """Take a GPU, or a share of the cores; end with the process that hands out the work, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for that process, which then says `stop`
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: Event) -> None:
    parent = parent_process()
    assert parent is not None
    while parent.is_alive() and not stop.is_set():
        parent.join(_WATCH_SECONDS)
    if not parent.is_alive() or stop.is_set():
        os._exit(1)


def _visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
