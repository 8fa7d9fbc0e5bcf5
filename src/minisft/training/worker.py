"""The process that the launcher starts: `python -m minisft.training.worker RUN [CHECKPOINT] [--trust-remote-code]`."""

import sys
from pathlib import Path


def main() -> None:
    from minisft.run_folder import TRUST_OPTION
    from minisft.training.distributed import run_worker

    root, *checkpoint = [word for word in sys.argv[1:] if word != TRUST_OPTION]

    def work() -> None:
        from minisft.training.run_training import train_as_worker

        train_as_worker(Path(root), Path(checkpoint[0]) if checkpoint else None, TRUST_OPTION in sys.argv[1:])

    run_worker(work)


if __name__ == "__main__":
    main()
