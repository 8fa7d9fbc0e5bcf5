"""A process that takes the steps of a check: `python -m minisft.checking.worker RUN_FOLDER [--trust-remote-code]`."""

import sys
from pathlib import Path


def main() -> None:
    from minisft.training.launch import run_worker

    def work() -> None:
        from minisft.checking.steps import take_steps_twice
        from minisft.runs import TRUST_OPTION

        take_steps_twice(Path(sys.argv[1]), TRUST_OPTION in sys.argv[2:])

    run_worker(work)


if __name__ == "__main__":
    main()
