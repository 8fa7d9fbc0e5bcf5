"""Generation backends: transformers or vLLM, in this process or in several.

The result of a batch depends neither on the process that computes it nor on the order of the batches. The batches are
the same for any number of processes, and only the process that distributes them writes files.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from minisft.evaluation.generation import Generated, Sampling, context_length, generate
from minisft.evaluation.metrics import LossRow, sum_of_losses
from minisft.models import is_out_of_memory, load_config, load_model
from minisft.optional_packages import require_package
from minisft.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersModel:
    """A model in this process.

    Args:
        weights: The model's folder.
        dtype: Dtype of the weights.
        trust_remote_code: Run code from the folder.
        base: Folder of the base model if `weights` holds adapters; None: the base model that the adapters name.
        load: Loads the weights.

    Raises:
        UserError: The folder is damaged or incomplete.
    """

    def __init__(
        self,
        weights: Path,
        dtype: torch.dtype,
        trust_remote_code: bool,
        base: Path | None = None,
        load: "Callable[..., PreTrainedModel]" = load_model,
    ) -> None:
        from safetensors import SafetensorError

        try:
            model = load(weights, dtype=dtype, trust_remote_code=trust_remote_code, base=base)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):  # the folder is intact, so it must not be reported as damaged
                raise
            raise UserError(
                weights, f"{type(error).__name__}: {first_line(error)}", "train again, or delete it"
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
        """Return the answers to prompts [rows, tokens], decoded as one batch if the key-value cache allows it."""
        return generate(
            self.model,
            prompts,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=len(prompts),
            sampling=sampling,
        )

    def sum_of_losses(self, rows: Sequence[LossRow]) -> tuple[float, int]:
        """Return what `metrics.sum_of_losses` computes with this model."""
        return sum_of_losses(self.model, rows)

    def release(self) -> None:
        """Free the model's memory."""
        del self.model
        _collect()


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
        _collect()


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


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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

    def load(self) -> "TransformersModel | VllmModel":
        """Load the model with the library of the backend.

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
        return TransformersModel(self.weights, self.dtype, self.trust_remote_code, self.base)


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
    """

    task: int
    value: Any
    seconds: float


class Workers:
    """The processes that perform tasks.

    Args:
        processes: Number of processes; 1: this process performs the tasks itself.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._loaded = _LoadedModel()
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Event | None = None

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            spawn = get_context("spawn")
            self._stop = spawn.Event()
            threads = max(1, torch.get_num_threads() // self.processes)
            gpus = [str(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
            if gpus and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
                gpus = visible.split(",")
            self._pool = ProcessPoolExecutor(
                self.processes, spawn, _start_process, (spawn.Value("i", 0), gpus, threads, self._stop)
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
                yield Outcome(number, *_perform(self._loaded, spec, task))
            return
        numbers: dict[Future[tuple[Any, float]], int] = {
            self._pool.submit(_perform, None, spec, task): number for number, task in enumerate(tasks)
        }
        try:
            for done in as_completed(numbers):
                yield Outcome(numbers[done], *done.result())
        except BrokenProcessPool as error:
            problem = "a process of the evaluation died, as happens when memory runs out"
            raise RuntimeError(f"{problem}; its answers are kept: evaluate again with fewer processes") from error
        finally:
            for future in numbers:
                future.cancel()


def default_processes(gpus: int | None = None) -> int:
    """Return the number of processes to use: one per GPU, and one on a CPU, all of whose cores one process uses.

    Args:
        gpus: Number of GPUs; None: as many as this machine has.
    """
    return max(1, torch.cuda.device_count() if gpus is None else gpus)


class _LoadedModel:
    """The model that a process has loaded."""

    def __init__(self) -> None:
        self._spec: ModelSpec | None = None
        self._model: TransformersModel | VllmModel | None = None

    def get(self, spec: ModelSpec) -> "TransformersModel | VllmModel":
        if self._model is None or self._spec != spec:
            self.release()  # first, so that two models never share the memory
            self._model, self._spec = spec.load(), spec
        return self._model

    def release(self) -> None:
        if self._model is not None:
            self._model.release()
        self._model, self._spec = None, None


_model_of_pool_process = _LoadedModel()


def _perform(loaded: _LoadedModel | None, spec: ModelSpec, task: AnswerTask | LossTask) -> tuple[Any, float]:
    """Return a task's value and seconds. `loaded` is None in a process of the pool, which keeps a model of its own."""
    model = (loaded or _model_of_pool_process).get(spec)
    started = time.perf_counter()
    value = task.of(model, spec)
    return value, time.perf_counter() - started


def _start_process(counter: "Synchronized[int]", gpus: list[str], threads: int, stop: Event) -> None:
    """Prepare a process of the pool: assign it a GPU or a share of the cores, and end it together with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sets `stop`
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)

    def exit_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        while parent.is_alive() and not stop.is_set():
            parent.join(0.5)
        os._exit(1)  # a killed parent cannot shut the pool down, and a running batch cannot be cancelled

    threading.Thread(target=exit_with_parent, daemon=True).start()
