"""The processes of a search: each carries out one job at a time, and none is given to two of them."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minisft.errors import StoppedError
from minisft.processes import exit_with_parent, handle_stop_signals

_POLL_INTERVAL = 0.2  # seconds
STOPPED = 3  # exit status of a job that saved its work because it was asked to stop


@dataclass(frozen=True)
class Job:
    """Something to do in a process of its own.

    Args:
        kind: "train" trains a trial to a rung, "score" scores models on the test rows.
        root: The run folder.
        log: File to append its output to.
        losses: File for the losses of the held-out rows; for "score" a folder; None: they are not computed.
        trial: Number of the trial; None: it belongs to none.
        step: Step to pause at; None: train to the end.
        temporary_steps: Steps of checkpoints of rungs that the recipe itself would not have saved.
        fingerprint: Fingerprint of the base model's weights.
        trust_remote_code: The user's consent to code that comes with the model.
        models: Folders by name, to score.
        metric: The entry of `evaluation.metrics` to score trials by, under "entry"; None: by their losses.
        answers: Folder for the answers that the metric needs.
    """

    kind: str
    root: str
    log: str
    losses: str | None = None
    trial: int | None = None
    step: int | None = None
    temporary_steps: tuple[int, ...] = ()
    fingerprint: str | None = None
    trust_remote_code: bool = False
    models: dict[str, str] = field(default_factory=dict)
    metric: dict[str, Any] | None = None
    answers: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        status: Exit status: 0 done, 2 an error that the user can fix; minus the number of a signal that killed it.
        error: Why it failed, or "".
    """

    status: int
    error: str


class TrialPool:
    """Processes that carry out jobs.

    On GPUs, process number N gets GPU number N modulo their count. On a CPU all share the cores, each with as many
    threads as it would have alone: with other threads a sum can round otherwise, and a trial would not be bit for bit
    what `minisft train` gives.

    Args:
        workers: Number of processes.
        log: File for what the processes themselves print.
    """

    def __init__(self, workers: int, log: Path) -> None:
        self._log = log
        gpus = _visible_gpus()
        self._gpus = [gpus[number % len(gpus)] if workers > 1 and gpus else None for number in range(workers)]
        self._processes: list[subprocess.Popen[str] | None] = [None] * workers
        self._running: dict[int, Job] = {}

    def __enter__(self) -> "TrialPool":
        return self

    def __exit__(self, *error: object) -> None:
        for number, process in enumerate(self._processes):
            if process is not None and process.poll() is None:
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()
                if number in self._running:
                    process.kill()
                process.wait()

    def perform(self, jobs: Sequence[Job], on_wait: Callable[[], object]) -> Iterator[tuple[Job, Outcome]]:
        """Carry out jobs; yield each with its outcome when it has ended.

        Args:
            jobs: The jobs, in the order in which they begin.
            on_wait: Called a few times a second.

        Raises:
            StoppedError: This process was asked to stop, and every job under way has saved its work.
        """
        waiting, asked = list(jobs), 0
        signals: list[int] = []
        with handle_stop_signals(lambda number, _: signals.append(number)):
            while waiting or self._running:
                for number in range(len(self._processes)):
                    if waiting and number not in self._running and not signals:
                        self._begin(number, waiting.pop(0))
                if len(signals) > asked:
                    asked = len(signals)
                    for number in self._running:
                        self._process(number).send_signal(signal.SIGTERM)
                if signals and not self._running:
                    break
                replies: dict[Any, int] = {self._process(number).stdout: number for number in self._running}
                ready, _, _ = select.select(list(replies), [], [], _POLL_INTERVAL)
                for number in map(replies.__getitem__, ready):
                    job = self._running[number]
                    outcome = self._receive(number)
                    del self._running[number]
                    if outcome.status != STOPPED and not (signals and outcome.status not in (0, 2)):
                        yield job, outcome
                on_wait()
        if signals:
            raise StoppedError("stopped as asked; the same command with --resume continues from there")

    def _process(self, number: int) -> "subprocess.Popen[str]":
        process = self._processes[number]
        assert process is not None
        return process

    def _begin(self, number: int, job: Job) -> None:
        process = self._processes[number]
        if process is None or process.poll() is not None:
            with self._log.open("a") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "minisft.search.trial_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # Ctrl-C reaches this process only, which asks the jobs to stop
                    preexec_fn=exit_with_parent,
                )
            self._processes[number] = process
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(job) | {"gpu": self._gpus[number]}) + "\n")
        process.stdin.flush()
        self._running[number] = job

    def _receive(self, number: int) -> Outcome:
        process = self._process(number)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return Outcome(reply["status"], reply["error"])
        status = process.wait()
        return Outcome(status or 1, f"its process ended with status {status}; {self._log} may say why")


def _visible_gpus() -> list[str]:
    """Return the GPUs of this machine, without opening them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(devices, key=int)
