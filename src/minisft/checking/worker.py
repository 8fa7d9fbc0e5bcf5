"""A process that takes the steps of a check: `python -m minisft.checking.worker RUN_FOLDER`."""

import sys
from pathlib import Path


def main() -> None:
    from minisft.training.launch import run_worker

    def work() -> None:
        from minisft.checking.steps import take_steps_twice

        take_steps_twice(Path(sys.argv[1]))

    run_worker(work)


if __name__ == "__main__":
    main()
