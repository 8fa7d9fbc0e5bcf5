"""How long `minisft train` takes to its first step and `minisft chat` to its first token, and what it spends that on.

A thread looks at the stack of the main thread every few milliseconds, so that the commands are measured as they are.
The data of the run is prepared before, and the built-in model is converted before. Each command runs in a process of
its own; the commands take turns, and medians over the rounds are reported.

    python benchmarks/startup.py --rounds 5
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).parents[1]
INTERVAL = 0.005  # seconds between two samples
IMPORTER = "<frozen importlib._bootstrap>"
# Parts by the file and the function whose frame is on the stack; of several the first one counts.
PARTS = (
    ("hashing of the weights", "minisft/files.py", "hash_files"),
    ("tokenizer", "minisft/models.py", "load_tokenizer"),
    ("template and encoder", "minisft/data/encoder.py", "__init__"),
    ("loading of the model", "minisft/models.py", "load_model"),
    ("probe of the model", "minisft/training/probe.py", "run"),
    ("search for unreached parameters", "minisft/training/frozen.py", "unreached_parameters"),
    ("estimate of disk space", "minisft/training/disk.py", "require_disk"),
    ("prepared data and preview", "minisft/runner.py", "prepare_run"),
    ("trainer", "minisft/training/run_training.py", "_trainer"),
    ("first step", "minisft/training/trainer.py", "training_step"),
    ("first step", "minisft/training/trainer.py", "_clip_grad_norm"),
    ("first step", "optimizer.py", "step"),
    ("first token", "minisft/chat/session.py", "answer"),
)


class Sampler:
    """Seconds of the main thread by part, until its command takes its first step or prints its first token."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.main = threading.get_ident()
        self.to_first_step: tuple[float, float] | None = None  # seconds, and those of all processors
        self.ended = threading.Event()

    def watch(self, finish: Callable[[dict[str, Any]], None]) -> None:
        """Sample until the step after the first begins to be logged, or `ended` is set; then call `finish`."""
        while not self.ended.wait(INTERVAL):
            frame = sys._current_frames().get(self.main)
            functions = functions_of(frame)
            now = time.perf_counter()
            if self.to_first_step is None and ("minisft/training/trainer.py", "training_step") in functions:
                self.to_first_step = now - self.began, os.times().user
            if ("transformers/trainer.py", "_maybe_log_save_evaluate") in functions:
                break
            self.seconds[part_of(frame, functions)] += now - self.last
            self.last = now
        finish(
            {
                "seconds": time.perf_counter() - self.began,
                "user_seconds": os.times().user,
                "to_first_step": self.to_first_step,
                "parts": dict(self.seconds),
            }
        )


def functions_of(frame: FrameType | None) -> list[tuple[str, str]]:
    """Return the file, from the name of the package on, and function of each frame of a stack, innermost first."""
    found = []
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("minisft/", "transformers/"):
            if f"/{package}" in name:
                name = package + name.rpartition(f"/{package}")[2]
                break
        found.append((name, frame.f_code.co_name))
        frame = frame.f_back
    return found


def part_of(frame: FrameType | None, functions: list[tuple[str, str]]) -> str:
    """Return the part that a stack belongs to; an import counts for the library that is imported."""
    imported = None
    while frame is not None:
        if frame.f_code.co_filename == IMPORTER and frame.f_code.co_name == "_find_and_load":
            name = str(frame.f_locals.get("name", "")).partition(".")[0]
            imported = name if imported is None or name in ("torch", "transformers", "peft", "deepspeed") else imported
            if imported == "torch":
                break
        frame = frame.f_back
    if imported is not None:
        return f"import of {imported}" if imported in IMPORTS else "other imports"
    for part, file, function in PARTS:
        if any(name.endswith(file) and function == called for name, called in functions):
            return part
    return "everything else"


IMPORTS = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "pandas", "matplotlib", "minisft")


class FirstWrite:
    """A standard output that notes when the first text of an answer is written."""

    def __init__(self, stream: Any, ended: threading.Event) -> None:
        self.stream, self.ended = stream, ended

    def write(self, text: str) -> int:
        self.ended.set()
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def measure_here(result: Path, words: list[str]) -> None:
    """Run a command in this process, write what it took to `result`, and end the process at once."""

    def finish(found: dict[str, Any]) -> None:
        result.write_text(json.dumps(found))
        os._exit(0)

    sampler = Sampler()
    if words[0] == "chat":
        sys.stdout = FirstWrite(sys.stdout, sampler.ended)
    thread = threading.Thread(target=sampler.watch, args=(finish,))
    thread.start()
    from minisft.cli import main

    status = main(words)
    sampler.ended.set()
    thread.join()
    sys.exit(status)


def measured(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command in a new process, and return what it took."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--here", str(result), *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not result.exists():
        sys.exit(f"minisft {' '.join(words)} failed:\n{done.stderr}")
    return dict(json.loads(result.read_text()))


def minisft(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "minisft", *words], check=True, stdout=subprocess.DEVNULL)


def report(name: str, results: list[dict[str, Any]]) -> None:
    def median(key: str) -> float:
        return statistics.median(one[key] for one in results)

    print(f"\n## {name}: {median('seconds'):.2f} s, {median('user_seconds'):.2f} s of processor time")
    if results[0]["to_first_step"] is not None:
        seconds, user = (statistics.median(one["to_first_step"][at] for one in results) for at in (0, 1))
        print(f"the first step begins after {seconds:.2f} s, {user:.2f} s of processor time")
    print("\n| part | seconds |\n|---|---|")
    parts = {part: statistics.median(one["parts"].get(part, 0.0) for one in results) for part in results[0]["parts"]}
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        if seconds >= 0.01:
            print(f"| {part} | {seconds:.2f} |")


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        measure_here(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    recipe = str(REPOSITORY / "recipes" / "demo.yaml")
    results: dict[str, list[dict[str, Any]]] = {"train to the end of the first step": [], "chat to the first token": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(arguments.rounds):
            run = f"output={folder / f'run-{number}'}"
            minisft("prepare", recipe, run)
            commands = (["train", recipe, run], ["chat", "smollm2-135m", "--message", "Hello", "--max-new-tokens", "1"])
            for found, words in zip(results.values(), commands, strict=True):
                found.append(measured(words, folder))
                print(f"round {number + 1}: {words[0]}: {found[-1]['seconds']:.2f} s", flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    for title, found in results.items():
        report(title, found)


if __name__ == "__main__":
    main()
