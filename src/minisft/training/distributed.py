"""Several processes on one machine: torch's elastic launcher, and why a process was killed."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from minisft.errors import StoppedError, UserError, WorkerError
from minisft.output_filters import escape_library_output
from minisft.processes import exit_with_parent, handle_stop_signals, hard_exit
from minisft.text import printable
from minisft.training.callbacks import STOP_FILE, StopRequest
from minisft.training.device import on_cpu, threads_of_a_process
from minisft.training.nodes import Nodes
from minisft.training.zero import ZERO_STAGES, start_communication

_LOG = Path("/dev/kmsg")
_CGROUPS = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_FIX = (
    "give it more memory, or use less: a smaller training.row_tokens, training.gradient_checkpointing=true, fewer "
    "processes or a ZeRO stage (`minisft plan RECIPE` says what each needs); then resume with --resume"
)


_SIGTERM_EXIT = 128 + signal.SIGTERM  # exit status of a process that SIGTERM ended, as a shell gives it
_LAUNCHER_NOTICE = 2.0  # seconds in which a launcher that also received SIGTERM has said so


class OutOfMemoryEvidence:
    """The number of processes that the kernel has killed for memory since this object was made.

    Args:
        groups: Folder of the control groups.
        log: The kernel's log.
    """

    def __init__(self, groups: Path = _CGROUPS, log: Path = _LOG) -> None:
        self.groups, self.log = groups, log
        self.before = _count(groups)
        self.began = time.monotonic()

    def evidence(self, pid: int) -> str | None:
        """Return the kernel's message that it killed a process for memory, or None."""
        for line in _log_since(self.log, self.began):
            if f"Killed process {pid} " in line:
                return line
        if _count(self.groups) > self.before:
            return "the memory limit of its control group was reached (oom_kill in memory.events)"
        return None


def killed_worker_error(rank: int, processes: int, signal_name: str, pid: int, kills: OutOfMemoryEvidence) -> Exception:
    """Return the error to raise where a signal ended a process.

    Returns:
        A UserError if the kernel says that memory was short, else a WorkerError, which calls it likely for SIGKILL.
    """
    who = f"rank {rank} of {processes} process{'es' if processes > 1 else ''}"
    if signal_name != "SIGKILL":
        return WorkerError(f"a training process failed: {who} was ended by {signal_name}; resume with --resume")
    evidence = kills.evidence(pid)
    if evidence is not None:
        return UserError(who, f"the kernel killed it (SIGKILL), since memory ran out: {evidence}", _FIX)
    return WorkerError(
        f"a training process failed: {who} was killed (SIGKILL); unless somebody did that, memory is the likely "
        f"reason: {_FIX}"
    )


def _count(groups: Path) -> int:
    """Return the sum of the counts of the control groups of this process, of version 2 or 1."""
    counts = [_COUNT.search(text) for text in _cgroup_files(groups)]
    return sum(int(found[1]) for found in counts if found)


def _cgroup_files(groups: Path) -> Iterator[str]:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield _read(groups / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            yield _read(groups / "memory" / path.lstrip("/") / "memory.oom_control")


def _log_since(log: Path, began: float) -> Iterator[str]:
    """Yield the kernel's messages since a time of the monotonic clock; none if they may not be read."""
    try:
        for line in _lines(log):
            if line.startswith(" "):  # a field of the previous message
                continue
            head, _, message = line.partition(";")
            if float(head.split(",")[2]) / 1e6 >= began:
                yield message
    except (OSError, IndexError, ValueError):  # the end, or another format
        return


def _lines(log: Path) -> Iterator[str]:
    """Yield the lines of a log; each read of the kernel's device returns one message, and the last one fails."""
    file, begun = os.open(log, os.O_RDONLY | os.O_NONBLOCK), b""
    try:
        while True:
            try:
                text = os.read(file, 8192)
            except BrokenPipeError:  # it was overwritten meanwhile: the next read gives a later one
                continue
            if not text:
                return
            *lines, begun = (begun + text).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
    finally:
        os.close(file)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


_GRACE_SECONDS = timedelta(hours=12)  # the first process may prepare much data
_ERROR_FILE = "MINISFT_ERROR_FILE"
_LAUNCHER = "MINISFT_LAUNCHER"
_TRACEBACK = "traceback-{}.txt"  # beside the error file, by the rank


def is_joined() -> bool:
    """Return whether torchrun, SLURM or DeepSpeed started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm() -> None:
    """Set the variables that torch reads in a process that `srun` started, unless a launcher set them."""
    environment = os.environ
    if is_joined() or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return
    if "SLURM_STEP_NODELIST" not in environment:
        return  # inside an allocation, but not started by srun
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", _first_slurm_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))


def _first_slurm_host(nodes: str) -> str:
    """Return the first host of a list such as gpu[01-04,07], which scontrol knows how to expand."""
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def local_gpu(local_rank: str, visible: int) -> str:
    """Return the number of this process's GPU among those that it can see; accelerate and DeepSpeed read LOCAL_RANK.

    A process that sees one GPU alone, as with SLURM's --gpus-per-task=1, finds it as number 0, whatever its rank.
    """
    return "0" if visible == 1 else local_rank


def join_launch(strategy: str, first_does: Callable[[], None]) -> None:
    """Wait for the other processes of a launch; the first calls `first_does` before all of them continue.

    Raises:
        UserError: In the first process, the error of `first_does`; the others end with the same exit status.
    """
    import torch

    if not on_cpu():
        os.environ["LOCAL_RANK"] = local = local_gpu(os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count())
        torch.cuda.set_device(int(local))
    if strategy in ZERO_STAGES:
        start_communication(on_cpu(), _GRACE_SECONDS)
    else:
        torch.distributed.init_process_group("gloo" if on_cpu() else "nccl", timeout=_GRACE_SECONDS)
    error: UserError | None = None
    if torch.distributed.get_rank() == 0:
        try:
            first_does()
        except UserError as raised:
            error = raised
    failed = [error is not None]
    torch.distributed.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0]:
        sys.exit(2)  # the first process prints the reason


def launch(module: str, arguments: list[str], processes: int, nodes: Nodes | None = None) -> bool:
    """Run `python -m module arguments` in several processes of this machine and wait for them.

    With `nodes` they form one group with those of the other machines.

    SIGINT and SIGTERM are passed on through a file, so that they stop together at the end of a step.

    Returns:
        True if they were asked to stop.

    Raises:
        UserError: A process raised it, or the kernel killed one for memory.
        WorkerError: A process failed or was killed otherwise; the traceback of the first that failed is on stderr.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it prints every failure again
    config = LaunchConfig(
        nproc_per_node=processes, run_id="minisft", max_restarts=0, start_method="spawn", monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT", **_rendezvous(nodes),
    )  # fmt: skip
    kills = OutOfMemoryEvidence()
    with _workers_environment(processes) as (error_file, stop):
        try:
            with handle_stop_signals(stop.receive):
                elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except ChildFailedError as error:
            _raise_recorded_error(error_file)
            ends = {rank: (failure.exitcode, failure.pid) for rank, failure in error.failures.items()}
            raise _failure(error_file, ends, processes * (nodes.count if nodes else 1), kills) from None
        except SignalException:
            raise KeyboardInterrupt from None
    return stop.signalled


def launch_single(module: str, arguments: list[str]) -> bool:
    """Run `python -m module arguments` in one process of its own, and wait for it.

    SIGINT and SIGTERM reach it as they reach the processes of `launch`.

    Returns:
        True if it was asked to stop.

    Raises:
        UserError: The process raised it, or the kernel killed it for memory.
        WorkerError: It failed or was killed otherwise; its traceback is on stderr.
    """
    kills = OutOfMemoryEvidence()
    with _workers_environment(1) as (error_file, stop), handle_stop_signals(stop.receive):
        command = [sys.executable, "-u", "-m", module, *arguments]
        with subprocess.Popen(command, start_new_session=True) as process:  # a terminal's Ctrl-C is for this process
            status = process.wait()
        _raise_recorded_error(error_file)
        if status:
            raise _failure(error_file, {0: (status, process.pid)}, 1, kills)
    return stop.signalled


@contextlib.contextmanager
def _workers_environment(processes: int) -> Iterator[tuple[Path, StopRequest]]:
    """Set the variables that tell workers who started them, where to write errors, and which file asks them to stop."""
    with tempfile.TemporaryDirectory(prefix="minisft-") as folder:
        error_file, stop = Path(folder) / "error.json", StopRequest(Path(folder) / "stop")
        added = {_ERROR_FILE: str(error_file), _LAUNCHER: str(os.getpid()), STOP_FILE: str(stop.file)}
        if "OMP_NUM_THREADS" not in os.environ:
            added["OMP_NUM_THREADS"] = str(threads_of_a_process(processes))
        os.environ |= added
        try:
            yield error_file, stop
        finally:
            for name in added:
                del os.environ[name]


def _failure(
    error_file: Path, ends: dict[int, tuple[int, int]], processes: int, kills: OutOfMemoryEvidence
) -> Exception:
    """Return the error to raise for processes that failed; if none was killed, print the traceback of the first.

    If one was killed, the others fail because it is gone, and their tracebacks would hide the reason.

    Args:
        error_file: File beside which the processes write their tracebacks.
        ends: Exit status (below zero for a signal) and process id of each failed rank.
        processes: Number of all processes.
        kills: Counter that was started before the processes.
    """
    # Elastic ends the other workers of a failed process with SIGTERM.
    by_themselves = {rank: end for rank, end in ends.items() if end[0] not in (-signal.SIGTERM, _SIGTERM_EXIT)} or ends
    for rank, (status, pid) in sorted(by_themselves.items(), key=lambda end: end[1][0] != -signal.SIGKILL):
        if status < 0 or status == _SIGTERM_EXIT:
            name = "SIGTERM" if status == _SIGTERM_EXIT else signal.Signals(-status).name
            return killed_worker_error(rank, processes, name, pid, kills)
    tracebacks = sorted(error_file.parent.glob(_TRACEBACK.format("*")), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks:
        print(tracebacks[0].read_text(encoding="utf-8"), file=sys.stderr, end="")
    rank, (status, _) = next(iter(by_themselves.items()))
    return WorkerError(f"a training process failed: rank {rank} of {processes} with exit status {status}; see above")


def _rendezvous(nodes: Nodes | None) -> dict[str, Any]:
    """Return elastic's settings for the rendezvous of the processes."""
    if nodes is None:
        return {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0"}
    return {
        "min_nodes": nodes.count, "max_nodes": nodes.count, "rdzv_backend": "static",
        "rdzv_endpoint": nodes.endpoint,
        "rdzv_configs": {"rank": nodes.rank, "timeout": int(_GRACE_SECONDS.total_seconds())},
    }  # fmt: skip


def _raise_recorded_error(error_file: Path) -> None:
    if error_file.exists():
        raise UserError(*json.loads(error_file.read_text(encoding="utf-8"))) from None


def run_worker(work: Callable[[], None]) -> NoReturn:
    """Run `work` in a process that `launch` started, and end the process.

    A UserError is passed to the launcher, which prints it once. The process dies with the launcher: elastic
    starts workers in sessions of their own, so they would continue to train without it.
    """
    _exit_with_launcher()
    if STOP_FILE in os.environ:
        # A scheduler may send both signals to all processes of a job: the launcher acts on them.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        _leave_sigterm_to_launcher(Path(os.environ[STOP_FILE]))
    escape_library_output()
    hard_exit(_status_of(work))


def _leave_sigterm_to_launcher(stop_file: Path) -> None:
    """Ignore SIGTERM where the launcher was asked to stop too, and end this process otherwise.

    elastic sends SIGTERM to the other workers of a dead worker. These often wait for it in a collective, where no
    Python handler runs: a thread reads the signals.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGTERM, False)

    def wait_for_signals() -> None:
        while numbers := os.read(read, 64):  # the C handler writes the number of each signal
            deadline = time.monotonic() + _LAUNCHER_NOTICE
            while signal.SIGTERM in numbers and not stop_file.exists():
                if time.monotonic() > deadline:
                    os._exit(_SIGTERM_EXIT)
                time.sleep(0.05)

    threading.Thread(target=wait_for_signals, daemon=True, name="signals").start()


def _status_of(work: Callable[[], None]) -> int:
    try:
        work()
    except StoppedError:
        return 0  # the launcher, which passed the signal on, prints it
    except UserError as error:
        _write_error_file(error)
        return 2
    except BaseException:
        _write_traceback(printable(traceback.format_exc()))
        return 1
    return 0


def _write_error_file(error: UserError) -> None:
    target = os.environ.get(_ERROR_FILE)
    if target is None:
        print(f"minisft: {printable(str(error))}", file=sys.stderr)
        return
    temporary = Path(f"{target}.{os.getpid()}")
    temporary.write_text(json.dumps([error.where, error.problem, error.fix]), encoding="utf-8")
    temporary.replace(target)


def _write_traceback(text: str) -> None:
    """Write a traceback for the launcher, which prints the one that gives the reason; without a launcher, print it."""
    target = os.environ.get(_ERROR_FILE)
    if target is None:
        print(text, file=sys.stderr, end="")
    else:
        Path(target).with_name(_TRACEBACK.format(os.environ.get("RANK", "0"))).write_text(text, encoding="utf-8")


def _exit_with_launcher() -> None:
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    exit_with_parent()
    if os.getppid() != int(launcher):  # the launcher died before the signal was requested
        os._exit(1)
