"""A process that takes the steps of a check: `python -m minisft.checking.worker RUN_FOLDER`."""

import sys
from pathlib import Path

from minisft.processes import leave


def main() -> int:
    from minisft.training.launch import run_worker

    def work() -> None:
        from minisft.checking.steps import take_steps_twice

        take_steps_twice(Path(sys.argv[1]))

    return run_worker(work)


if __name__ == "__main__":
    leave(main())
