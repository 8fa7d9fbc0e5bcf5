"""A dry run: the trainer's own steps on a GPU that is not there, and what they show.

A process for each of two ranks (dry_run_worker.py) executes them with fake tensors on the device `cuda`, and every
collective returns at once. No weight is loaded and no number computed, so a model of any size runs on a small machine;
what depends on a number (the loss, the probe of the model, the exactness of a kernel) is not shown.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minisft.errors import UserError
from minisft.planning.fake_gpu import build_device, torch_folder
from minisft.planning.machines import MIB, Machine, total_memory
from minisft.planning.memory import ZERO, model_states
from minisft.planning.prediction import Job, predict
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder, trust_arguments, write_resolved_recipe

Outcome = Literal["passed", "failed", "not possible"]

STEPS = 3  # the first steps do what is done once: trials of kernels, and DDP's second division into buckets
_MOST_ROWS = 4  # rows of a step and process that are executed; more of them would show nothing else
_SHARE_SUPERVISED = 2  # every second token, where no data is known
# By how much tracked and predicted memory may differ, as shares of that and in bytes: what is kept between steps is
# known exactly, and the formulas of the peak were found to be between 0.3 % below it and 12 % above it.
KEPT_SHARE, ABOVE_PEAK, BELOW_PEAK, MEMORY_BYTES = 0.002, 0.02, 0.15, 64 * MIB
_WORKER = "minisft.planning.dry_run_worker"


@dataclass(frozen=True)
class Fault:
    """Something that the steps do and should not.

    Attributes:
        kind: device, wait, attention, collective, memory or error.
        where: File and line, or the part of the step.
        problem: What is wrong.
        fix: What to change.
    """

    kind: str
    where: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.fix}"


@dataclass(frozen=True)
class Wait:
    """A place where the CPU waits for the GPU in the last step.

    Attributes:
        where: File and line.
        operator: The operator whose result the CPU waits for.
        in_rows: Whether it is in forward or backward of a row; otherwise once a step.
        times: How many times.
    """

    where: str
    operator: str
    in_rows: bool
    times: int


@dataclass(frozen=True)
class DryRun:
    """What a dry run showed; bytes are those of one process.

    Attributes:
        outcome: Whether it found a fault, or could not be done.
        reason: Why it could not be done; otherwise empty.
        strategy: str whose steps were executed.
        steps: Number of steps.
        rows: Rows of a step, with tokens and supervised tokens of each.
        faults: What was found.
        attention: Number of calls by kernel and number format, such as "torch_varlen bfloat16"; "None ..." is attention
            on one conversation after the other.
        waits: The places where the CPU waits for the GPU.
        collectives: Operators, shapes and formats of the last step's collective operations.
        kept_bytes: Memory of the tensors that are kept from one step to the next.
        predicted_kept_bytes: The same by the formulas of the plan: weights, optimizer states and buffers.
        peak_bytes: Largest memory of the tensors at any moment.
        predicted_bytes: The same by the formulas, for the same rows.
    """

    outcome: Outcome
    reason: str
    strategy: str
    steps: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    faults: tuple[Fault, ...] = ()
    attention: tuple[tuple[str, int], ...] = ()
    waits: tuple[Wait, ...] = ()
    collectives: tuple[str, ...] = ()
    kept_bytes: int = 0
    predicted_kept_bytes: int = 0
    peak_bytes: int = 0
    predicted_bytes: int = 0

    def __post_init__(self) -> None:
        assert (self.outcome == "failed") == bool(self.faults)
        assert (self.outcome == "not possible") == bool(self.reason)

    def as_json(self) -> dict[str, Any]:
        """Return the result as `minisft plan --dry-run --json` prints it under `dry_run`."""
        if self.outcome == "not possible":
            return {"dry_run": self.outcome, "reason": self.reason, "strategy": self.strategy}
        found = asdict(self)
        del found["reason"]
        return {"dry_run": found.pop("outcome"), **found, "attention": dict(self.attention)}

    def lines(self) -> list[str]:
        """Return the result as lines of text."""
        if self.outcome == "not possible":
            return [f"dry run of {self.strategy}: not possible: {self.reason}"]
        said = [f"dry run of {self.strategy}: {self.outcome}"]
        if self.rows:
            longest = max(tokens for tokens, _ in self.rows)
            said[0] += f"; {self.steps} steps of {len(self.rows)} row(s) a process, the longest of {longest:,} tokens"
            kernels = [f"{'no kernel' if name.startswith('None') else name}" for name, _ in self.attention]
            said.append(f"  attention: {', '.join(kernels) or 'no kernel, one conversation after the other'}")
            of_rows = sum(one.times for one in self.waits if one.in_rows)
            others = sum(one.times for one in self.waits) - of_rows
            said.append(f"  the CPU waits for the GPU {of_rows} times in the rows of a step, {others} times outside")
            if self.collectives:
                said.append(f"  {len(self.collectives)} collective operations a step")
            said.append(
                f"  peak memory of the tensors: {self.peak_bytes / 1e9:.2f} GB tracked, "
                f"{self.predicted_bytes / 1e9:.2f} GB by the formulas; between steps {self.kept_bytes / 1e9:.2f} and "
                f"{self.predicted_kept_bytes / 1e9:.2f} GB"
            )
        return said + [f"  fault: {fault}" for fault in self.faults]


def require_gpu(machine: Machine) -> None:
    """Check that a dry run can stand in for a machine.

    Raises:
        UserError: The machine is a CPU.
    """
    if machine.kind == "cpu":
        raise UserError("--dry-run", "the plan is for a CPU, where training itself can run", "name a GPU with --gpu")


def dry_run(recipe: Recipe, job: Job, strategy: str) -> DryRun:
    """Execute steps of a recipe on the planned GPUs, with the rows of the step that has the longest one.

    Args:
        recipe: The recipe; of its model, configuration and tokenizer are read, and the prepared data where there is
            some.
        job: The job that was planned for it.
        strategy: str of the steps.

    Raises:
        UserError: The plan is for a CPU, or the device that stands in for the GPU cannot be built.
    """
    require_gpu(job.machine)
    if recipe.training.lora is not None and recipe.training.lora.load_in_4bit:
        return DryRun("not possible", "the kernels of 4-bit weights exist on a GPU only", strategy)
    if recipe.training.sequence_parallel > 1:
        return DryRun(
            "not possible", "processes that share rows exchange them, and one process stands for all", strategy
        )
    library = build_device(torch_folder())
    with tempfile.TemporaryDirectory(prefix="minisft-dry-run-") as name:
        folder = Path(name)
        # 1. The run: recipe, data and machine.
        _write_run(RunFolder(folder / "run"), recipe, job, strategy)
        task = {
            "library": None if library is None else str(library), "gpu": job.machine.name,
            "total_memory": total_memory(job.machine), "capability": list(job.machine.capability),
            "processes": job.processes, "strategy": strategy, "liger": job.model.liger,
            "trust_remote_code": bool(trust_arguments(recipe)),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(task), encoding="utf-8")
        # 2. The steps of two ranks, or of the only one.
        results, failure = _run_workers(folder, min(job.processes, 2))
    # 3. The verdict.
    if failure:
        return DryRun("not possible", failure, strategy)
    return _judge(results, recipe, job, strategy)


def _write_run(run: RunFolder, recipe: Recipe, job: Job, strategy: str) -> None:
    import datasets

    changes: dict[str, Any] = {
        "strategy": strategy, "processes": job.processes, "max_steps": STEPS, "save_every": 10**9, "log_every": 1,
        "report_to": [], "eval_every": None, "early_stopping": None,
        "early_stopping_by": "loss", "scheduler": "linear", "scheduler_args": {},
    }  # fmt: skip
    training = replace(recipe.training, **changes)
    write_resolved_recipe(run, replace(recipe, output=str(run.root), training=training))
    datasets.disable_progress_bars()
    try:
        rows = _rows_of_step(recipe, job)
        rows.save_to_disk(str(run.dataset / "train"))
    finally:
        datasets.enable_progress_bars()
    (run.dataset / "test").mkdir()
    ledger = {
        "made_from": "a dry run", "rows": {"train": len(rows), "test": 0}, "source_names": {"train": ["dry run"]},
    }  # fmt: skip
    (run.dataset / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")


def _rows_of_step(recipe: Recipe, job: Job) -> Any:
    """Return the longest conversations of the step with the longest row, or rows as the plan assumes them."""
    import datasets

    from minisft.data.prepared import load_train

    work, training = job.workload, recipe.training
    room = _MOST_ROWS * max(job.row_tokens, work.longest) * job.processes  # tokens
    if len(work.heaviest_step):
        data = load_train(recipe.output).select(work.heaviest_step)
        lengths = np.array([len(ids) for ids in data["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        kept = max(job.processes, int(np.searchsorted(np.cumsum(lengths[order]), room, side="right")))
        data = data.select(order[:kept]).select_columns(["input_ids", "labels"])
    else:
        count = training.batch_size * training.gradient_accumulation * job.processes
        length = max(1, work.longest // 2)
        ids, labels = [0] * length, [0 if at % _SHARE_SUPERVISED else -100 for at in range(length)]
        count = max(job.processes, min(count, room // length))
        data = datasets.Dataset.from_dict({"input_ids": [ids] * count, "labels": [labels] * count})
    return data.add_column("source", [0] * len(data))


def _run_workers(folder: Path, ranks: int) -> tuple[list[dict[str, Any]], str]:
    """Return the result of each rank, or why there is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        environment.pop(name, None)
    words = [sys.executable, "-m", _WORKER, str(folder)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        workers = [
            subprocess.Popen([*words, str(rank)], stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment)
            for rank in range(ranks)
        ]
        try:
            statuses = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    files = [folder / f"result-{rank}.json" for rank in range(ranks)]
    if any(statuses) or not all(file.is_file() for file in files):
        return [], f"its process ended with status {statuses} ({lines[-1] if lines else 'it wrote nothing'})"
    return [json.loads(file.read_text(encoding="utf-8")) for file in files], ""


# --- the verdict ------------------------------------------------------------------------------------------


def _judge(results: Sequence[dict[str, Any]], recipe: Recipe, job: Job, strategy: str) -> DryRun:
    first = results[0]
    error = next((result["error"] for result in results if result["error"]), None)
    if error and error["kind"] == "not possible":
        return DryRun("not possible", error["problem"], strategy)
    faults = [_fault_of_error(error)] if error else []
    offload = recipe.training.offload is not None and strategy in ZERO
    faults += _faults_of_waits(first, offload) + _faults_of_attention(first, job.precision)
    if error is None:
        faults += _faults_of_collectives(results)
    rows = tuple((tokens, supervised) for tokens, supervised in first["rows"][-1]) if first["rows"] else ()
    kept = peak = 0
    if rows:
        kept, peak = _predicted_bytes(recipe, job, strategy, rows)
    if rows and error is None:
        faults += _faults_of_memory(first, kept, peak, strategy)
    return DryRun(
        outcome="failed" if faults else "passed",
        reason="",
        strategy=strategy,
        steps=len(first["rows"]),
        rows=rows,
        faults=tuple(faults),
        attention=tuple(sorted(first["kernels"].items())),
        waits=tuple(Wait(where, name, phase == "rows", times) for phase, where, name, times in first["waits"]),
        collectives=tuple(first["collectives"][-1] if first["collectives"] else ()),
        kept_bytes=first["kept_bytes"],
        predicted_kept_bytes=kept,
        peak_bytes=first["peak_bytes"],
        predicted_bytes=peak,
    )


def _predicted_bytes(recipe: Recipe, job: Job, strategy: str, rows: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the plan's memory between steps and at the peak, for exactly these rows."""
    training = recipe.training
    # No checkpoint is scored in these steps.
    job = replace(job, workload=replace(job.workload, most_rows=len(rows)), scored_tokens=0)
    offload = training.offload is not None and strategy in ZERO
    options: dict[str, Any] = {"checkpointing": training.gradient_checkpointing, "lora": training.lora}
    predictions = [predict(job, strategy, offload=offload, row=row, **options) for row in rows]
    weights, _, optimizer = model_states(job.cost(strategy, training.lora), predictions[0].setting)
    # DDP keeps its buckets; DeepSpeed frees its bucket.
    kept = weights + optimizer + (predictions[0].memory.buffers if strategy == "vanilla" else 0)
    return round(kept), round(max(prediction.memory.peak for prediction in predictions))


def _fault_of_error(error: dict[str, Any]) -> Fault:
    fixes = {
        "device": "make the tensor on the device of the others",
        "wait": "compute on the GPU with fixed shapes, without reading a value back",
    }
    return Fault(error["kind"], error["where"], error["problem"], fixes.get(error["kind"], "correct that line"))


def _faults_of_waits(result: dict[str, Any], offload: bool) -> list[Fault]:
    """Return a fault for each wait within a row; with offload DeepSpeed waits for every gradient that it moves."""
    return [
        Fault("wait", where, f"the CPU waits for the GPU in every row ({name}, {times} times a step)",
              "keep the value on the GPU, or copy from pinned memory with non_blocking=True")
        for phase, where, name, times in result["waits"]
        if phase == "rows" and not (offload and where.startswith("deepspeed"))
    ]  # fmt: skip


def _faults_of_attention(result: dict[str, Any], precision: str) -> list[Fault]:
    if precision == "fp32" or not (calls := result["kernels"].get("None float32", 0)):
        return []
    problem = f"queries are fp32 under {precision} in {calls} calls, so no kernel of the GPU takes them"
    return [Fault("attention", "attention", problem, f"compute queries, keys and values in {precision}")]


def _faults_of_collectives(results: Sequence[dict[str, Any]]) -> list[Fault]:
    sequences = [[one for step in result["collectives"] for one in step] for result in results]
    if all(sequence == sequences[0] for sequence in sequences):
        return []
    at = next(
        (number for number, (one, other) in enumerate(zip(*sequences, strict=False)) if one != other),
        min(map(len, sequences)),
    )
    said = [sequence[at] if at < len(sequence) else "nothing" for sequence in sequences]
    places = [result["places"][at] for result in results if at < len(result["places"])]
    problem = f"collective operation {at + 1} is {said[0]} on rank 0 and {said[1]} on rank 1: they would wait for ever"
    return [Fault("collective", places[-1], problem, "let every process issue the same operations in the same order")]


def _faults_of_memory(result: dict[str, Any], kept: int, peak: int, strategy: str) -> list[Fault]:
    """Compare tracked and predicted memory; under ZeRO only the peak, and only from above.

    What DeepSpeed keeps between steps depends on its version, and it gathers less than the formulas of ZeRO-3 allow it.
    """
    checks = [("at the peak", result["peak_bytes"], peak, ABOVE_PEAK, BELOW_PEAK if strategy == "vanilla" else 1.0)]
    if strategy == "vanilla":
        checks.insert(0, ("between two steps", result["kept_bytes"], kept, KEPT_SHARE, KEPT_SHARE))
    faults = []
    for when, tracked, predicted, above, below in checks:
        if -below * predicted - MEMORY_BYTES <= tracked - predicted <= above * predicted + MEMORY_BYTES:
            continue
        problem = f"the tensors take {tracked / 1e9:.2f} GB {when}, and the formulas count {predicted / 1e9:.2f} GB"
        faults.append(Fault("memory", "memory", problem, "look for a tensor that the formulas of the plan do not know"))
    return faults
