"""The process that the launcher starts: `python -m minisft.training.worker RUN_FOLDER [CHECKPOINT]`."""

import sys
from pathlib import Path


def main() -> None:
    from minisft.training.launch import run_worker

    root, *checkpoint = sys.argv[1:]

    def work() -> None:
        from minisft.training.train import train_as_worker

        train_as_worker(Path(root), Path(checkpoint[0]) if checkpoint else None)

    run_worker(work)


if __name__ == "__main__":
    main()
