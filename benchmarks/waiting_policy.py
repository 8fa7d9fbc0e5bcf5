"""What a training step costs under several waiting policies of OpenMP, on a quiet machine and beside a busy process.

A thread of libgomp that has nothing to do spins before it sleeps. Spinning is faster where cores are free; where
another process keeps one of them busy, the spinning thread holds the core that the others need. The variables are read
when libgomp is loaded, so each setting has a process of its own, which makes the model once; the processes then take
one step each in turn, with and without the busy process.

    python benchmarks/waiting_policy.py --rounds 9
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "from minisft.processes import exit_with_parent\nexit_with_parent()\nwhile True: pass"
DEFAULT = "nothing set"
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread less": {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1))},
}
ROWS, TOKENS, SUPERVISED = 2, 300, 130  # about a step of the demo
WARM_UP = 2  # steps


def take_steps(layers: int) -> None:
    """Load a model with random weights, and take a step for every line of stdin; print the seconds of each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minisft.models import resolve_model
    from minisft.processes import exit_with_parent
    from minisft.training import attention
    from minisft.training.batching import PackedRow
    from minisft.training.device import prepare_cpu_memory
    from minisft.training.loss import accumulate_embedding_gradient, row_loss

    exit_with_parent()
    prepare_cpu_memory("vanilla", "fp32", True)
    torch.manual_seed(0)
    attention.register()
    config = AutoConfig.from_pretrained(resolve_model("smollm2-135m").folder)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    at = torch.arange(SUPERVISED)
    row = PackedRow(
        torch.randint(config.vocab_size, (1, TOKENS)), torch.arange(TOKENS)[None], (TOKENS,), at, at + 1, ()
    )
    for line in sys.stdin:
        began = time.perf_counter()
        with accumulate_embedding_gradient(model) as lookups:
            for number in range(ROWS):
                lookups.last = number == ROWS - 1
                row_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        print(json.dumps(time.perf_counter() - began), flush=True)
        assert line


class Stepper:
    """A process with one setting."""

    def __init__(self, setting: dict[str, str], layers: int) -> None:
        own = {name for one in SETTINGS.values() for name in one}
        environment = {name: value for name, value in os.environ.items() if name not in own} | setting
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--layers", str(layers), "--take-steps"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def step(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no round after this time")
    parser.add_argument("--layers", type=int, default=10, help="layers of the model; the real one has 30")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--take-steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.take_steps:
        take_steps(arguments.layers)
        return
    steppers = {}
    for name in arguments.settings:
        steppers[name] = Stepper(SETTINGS[name], arguments.layers)
        for _ in range(WARM_UP):
            steppers[name].step()
    seconds: dict[tuple[str, bool], list[float]] = {}
    began = time.monotonic()
    for number in range(arguments.rounds):
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"the time is up after {number} rounds")
            break
        for busy in (False, True):
            with busy_process(busy):
                for name, stepper in steppers.items():
                    seconds.setdefault((name, busy), []).append(stepper.step())
    for stepper in steppers.values():
        stepper.process.communicate()
    report(arguments.settings, seconds)


def report(settings: list[str], seconds: dict[tuple[str, bool], list[float]]) -> None:
    """Print medians, and the fastest step, which other programs on the same cores disturb least."""
    print(f"{len(os.sched_getaffinity(0))} cores, {len(seconds[DEFAULT, False])} rounds; seconds of a step, and")
    print(f"relative to {DEFAULT!r} on a quiet machine: the median, and the fastest\n")
    print("| setting | quiet, median | | quiet, fastest | | busy, median | | busy, fastest | |")
    print("|" + "---|" * 9)
    for name in settings:
        cells = []
        for busy in (False, True):
            for measure in (statistics.median, min):
                found, base = measure(seconds[name, busy]), measure(seconds[DEFAULT, False])
                cells += [f"{found:.2f} s", f"{found / base:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
