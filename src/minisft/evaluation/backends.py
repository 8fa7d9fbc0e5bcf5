"""Generation backends: transformers or vLLM, in this process or in several.

The result of a batch depends neither on the process that computes it nor on the order of the batches. The batches are
the same for any number of processes, and only the process that distributes them writes files.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from minisft.console import warn
from minisft.errors import UserError
from minisft.evaluation.batch_memory import (
    BatchLimit,
    CacheSize,
    cache_budget,
    compute_in_batches,
    free_unused_memory,
    rows_on_cpu,
)
from minisft.evaluation.generation import Generated, Sampling, context_length, generate
from minisft.evaluation.metrics import LossRow, sum_of_losses
from minisft.evaluation.placement import Placement, count_weights, gpu_memory, load_for_inference, place_copies
from minisft.evaluation.vllm_model import VllmModel, require_vllm
from minisft.models import is_out_of_memory, load_model
from minisft.recipe import EvaluationRecipe
from minisft.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersModel:
    """A model in this process, on one device or over several GPUs.

    Args:
        weights: The model's folder.
        dtype: Dtype of the weights.
        trust_remote_code: Run code from the folder.
        base: Folder of the base model if `weights` holds adapters; None: the base model that the adapters name.
        load: Loads the weights.
        memory_share: Share of a device's free memory that this process may use.

    Raises:
        UserError: The folder is damaged or incomplete, or memory does not suffice for it.
    """

    def __init__(
        self,
        weights: Path,
        dtype: torch.dtype,
        trust_remote_code: bool,
        base: Path | None = None,
        load: "Callable[..., PreTrainedModel]" = load_model,
        memory_share: float = 1.0,
    ) -> None:
        from safetensors import SafetensorError

        try:
            model = load_for_inference(weights, dtype=dtype, trust_remote_code=trust_remote_code, base=base, load=load)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):  # the folder is intact, so it must not be reported as damaged
                raise
            raise UserError(
                weights, f"{type(error).__name__}: {first_line(error)}", "train again, or delete it"
            ) from error
        self.model: PreTrainedModel = model
        self.weights = weights
        self._memory_share = memory_share
        self._most_rows: Callable[[int], int] | None = None
        self.answer_limit, self.loss_limit = BatchLimit(), BatchLimit()

    def answer(
        self,
        prompts: list[list[int]],
        *,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Generated]:
        """Return the answers to prompts [rows, tokens], decoded as one batch if memory suffices, else as several.

        Raises:
            UserError: Memory does not suffice for a single prompt.
        """
        context = context_length(self.model.config)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        lengths = lengths if context is None else [min(length, context) for length in lengths]

        def decode(places: list[int]) -> list[Generated]:
            return generate(
                self.model,
                [prompts[place] for place in places],
                stop_token_ids=stop_token_ids,
                max_new_tokens=max_new_tokens,
                batch_size=len(places),
                most_rows=None,
                sampling=sampling,
            )

        answers: dict[int, Generated] = {}
        for places, found in compute_in_batches(lengths, self._rows, decode, self.answer_limit, self.weights):
            answers |= dict(zip(places, found, strict=True))
        return [answers[place] for place in range(len(prompts))]

    def _rows(self, positions: int) -> int:
        """Return the most rows whose keys and values fit; the first call measures what the cache takes."""
        if self._most_rows is None:
            size = CacheSize.measure(self.model)
            budget = cache_budget(size, self._memory_share)
            self._most_rows = partial(size.most_rows, free=budget)
        rows = self._most_rows(positions)
        return rows if torch.cuda.is_available() else min(rows, rows_on_cpu(positions))

    def sum_of_losses(self, rows: Sequence[LossRow]) -> tuple[float, int]:
        """Return what `metrics.sum_of_losses` computes with this model, in several batches if memory runs out.

        Raises:
            UserError: Memory does not suffice for a single row.
        """
        lengths = [len(ids) for ids, _ in rows]
        total, count = 0.0, 0
        for _, (loss, tokens) in compute_in_batches(
            lengths,
            lambda _: len(rows),
            lambda places: sum_of_losses(self.model, [rows[place] for place in places]),
            self.loss_limit,
            self.weights,
        ):
            total, count = total + loss, count + tokens
        return total, count

    @property
    def halved_at(self) -> int | None:
        """The number of rows with which memory ran out, so that batches were halved; None if it never did."""
        return self.answer_limit.halved_at or self.loss_limit.halved_at

    def release(self) -> None:
        """Free the model's memory."""
        del self.model
        self._most_rows = None
        free_unused_memory()


@dataclass(frozen=True)
class ModelSpec:
    """The model to evaluate, and its generation settings.

    Args:
        weights: The model's folder.
        dtype: Dtype of the weights.
        trust_remote_code: Run code from the folder.
        stop_token_ids: Ids of the terminators.
        max_new_tokens: The most tokens of an answer.
        sampling: Sampling settings; None: greedy decoding.
        backend: The library that generates; losses are always computed with transformers.
        base: Folder of the run's base model, to which adapters are added.
        tensor_parallel_size: Number of GPUs that share the model in vLLM.
        gpu_memory_utilization: The share of a GPU's memory that vLLM may take.
    """

    weights: Path
    dtype: torch.dtype
    trust_remote_code: bool
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    base: Path | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9

    def load(self, memory_share: float = 1.0) -> "TransformersModel | VllmModel":
        """Load the model with the library of the backend.

        Args:
            memory_share: Share of a device's free memory that transformers may use.

        Raises:
            UserError: The folder is damaged or incomplete, or the backend is vllm and cannot be used here.
        """
        if self.backend == "vllm":
            require_vllm()
            return VllmModel(
                self.weights,
                self.dtype,
                self.trust_remote_code,
                self.tensor_parallel_size,
                self.gpu_memory_utilization,
            )
        return TransformersModel(self.weights, self.dtype, self.trust_remote_code, self.base, memory_share=memory_share)


@dataclass(frozen=True)
class AnswerTask:
    """Prompts [rows, tokens] to answer as one batch."""

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
    """Rows whose loss to compute as one batch."""

    rows: list[LossRow]

    def of(self, model: "TransformersModel | VllmModel", spec: ModelSpec) -> tuple[float, int]:
        assert isinstance(model, TransformersModel)
        return model.sum_of_losses(self.rows)


@dataclass(frozen=True)
class Outcome:
    """The result of a task.

    Args:
        task: The task's number.
        value: The return value of its `of`.
        seconds: Time that it took, without loading.
        halved_at: Number of rows with which memory ran out so far in that process, so that batches are smaller.
    """

    task: int
    value: Any
    seconds: float
    halved_at: int | None = None


class Workers:
    """The processes that perform tasks.

    Args:
        processes: Number of processes; 1: this process performs the tasks itself.
        gpus_each: Number of GPUs that each process uses, if there are any.
    """

    def __init__(self, processes: int, gpus_each: int = 1) -> None:
        self.processes = processes
        self.gpus_each = gpus_each
        self._loaded = _LoadedModel()
        self._told_of_memory = False
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Event | None = None

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            spawn = get_context("spawn")
            self._stop = spawn.Event()
            threads = max(1, torch.get_num_threads() // self.processes)
            groups = gpu_groups(_visible_gpus(), self.gpus_each)
            share = min(1.0, max(1, len(groups)) / self.processes)
            self._pool = ProcessPoolExecutor(
                self.processes, spawn, _start_process, (spawn.Value("i", 0), groups, threads, share, self._stop)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._loaded.release()
        if self._pool is not None and self._stop is not None:
            if kind is not None:
                self._stop.set()  # the results of unfinished batches are not needed any more
            self._pool.shutdown(cancel_futures=True)

    def perform(self, spec: ModelSpec, tasks: Sequence[AnswerTask | LossTask]) -> Iterator[Outcome]:
        """Yield the outcome of each task, in the order in which they finish.

        Raises:
            UserError: The model cannot be loaded.
            RuntimeError: A process died.
        """
        if self._pool is None:
            for number, task in enumerate(tasks):
                yield self._told(Outcome(number, *_perform(self._loaded, spec, task)))
            return
        numbers: dict[Future[tuple[Any, float, int | None]], int] = {
            self._pool.submit(_perform, None, spec, task): number for number, task in enumerate(tasks)
        }
        try:
            for done in as_completed(numbers):
                yield self._told(Outcome(numbers[done], *done.result()))
        except BrokenProcessPool as error:
            problem = "a process of the evaluation died, as happens when memory runs out"
            raise RuntimeError(f"{problem}; its answers are kept: evaluate again with fewer processes") from error
        finally:
            for future in numbers:
                future.cancel()

    def _told(self, outcome: Outcome) -> Outcome:
        """Return the outcome; say once if memory ran out, whichever process it was."""
        if outcome.halved_at is not None and not self._told_of_memory:
            self._told_of_memory = True
            warn(
                f"memory ran out with {outcome.halved_at} rows at once: such batches are halved and computed again, "
                "with the same result; a smaller evaluation.batch_size avoids the attempt"
            )
        return outcome


def place_model(folder: Path, dtype: torch.dtype, settings: EvaluationRecipe) -> Placement:
    """Return how many processes evaluate models as large as the one in `folder`, and how many GPUs each of them uses.

    Raises:
        UserError: The recipe asks for more GPUs than there are, or vLLM has too little memory for the model.
    """
    memory = gpu_memory()
    weights = count_weights(folder) * dtype.itemsize if memory else 0
    placement = place_copies(weights, memory, processes=settings.processes, gpus_each=settings.tensor_parallel_size)
    if settings.backend == "vllm" and memory:
        room = settings.gpu_memory_utilization * min(memory) * placement.gpus_each
        if weights > room:
            problem = (
                f"the weights need {weights / 1e9:.0f} GB, and vLLM may use {room / 1e9:.0f} GB of "
                f"{placement.gpus_each} GPUs"
            )
            fix = "use more GPUs, or leave evaluation.backend at transformers, which keeps the rest on the host"
            raise UserError("evaluation.backend", problem, fix)
    return placement


def _visible_gpus() -> list[str]:
    """Return the GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def gpu_groups(gpus: Sequence[str], gpus_each: int) -> list[str]:
    """Return a value of CUDA_VISIBLE_DEVICES for each group of `gpus_each` GPUs; GPUs that are left over are idle."""
    return [",".join(gpus[start : start + gpus_each]) for start in range(0, len(gpus) - gpus_each + 1, gpus_each)]


class _LoadedModel:
    """The model that a process has loaded; `memory_share` is that of `TransformersModel`."""

    def __init__(self, memory_share: float = 1.0) -> None:
        self.memory_share = memory_share
        self._spec: ModelSpec | None = None
        self._model: TransformersModel | VllmModel | None = None

    def get(self, spec: ModelSpec) -> "TransformersModel | VllmModel":
        if self._model is None or self._spec != spec:
            self.release()  # first, so that two models never share the memory
            self._model, self._spec = spec.load(self.memory_share), spec
        return self._model

    def release(self) -> None:
        if self._model is not None:
            self._model.release()
        self._model, self._spec = None, None


_model_of_pool_process = _LoadedModel()


def _perform(
    loaded: _LoadedModel | None, spec: ModelSpec, task: AnswerTask | LossTask
) -> tuple[Any, float, int | None]:
    """Return a task's value, its seconds, and `halved_at` of `TransformersModel`.

    `loaded` is None in a process of the pool, which keeps a model of its own.
    """
    model = (loaded or _model_of_pool_process).get(spec)
    started = time.perf_counter()
    value = task.of(model, spec)
    halved_at = model.halved_at if isinstance(model, TransformersModel) else None
    return value, time.perf_counter() - started, halved_at


def _start_process(
    counter: "Synchronized[int]", groups: list[str], threads: int, memory_share: float, stop: Event
) -> None:
    """Prepare a process of the pool: assign it GPUs or a share of the cores, and end it together with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sets `stop`
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if groups:
        os.environ["CUDA_VISIBLE_DEVICES"] = groups[number % len(groups)]
    torch.set_num_threads(threads)
    _model_of_pool_process.memory_share = memory_share

    def exit_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        while parent.is_alive() and not stop.is_set():
            parent.join(0.5)
        os._exit(1)  # a killed parent cannot shut the pool down, and a running batch cannot be cancelled

    threading.Thread(target=exit_with_parent, daemon=True).start()
