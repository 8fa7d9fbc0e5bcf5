"""The process that the launcher starts: `... -m minisft.training_worker RUN [CHECKPOINT] [--pause-at=N] [OPTION]`.

The option is --trust-remote-code.
"""

import sys
from pathlib import Path


def main() -> None:
    from minisft.run_folder import TRUST_OPTION
    from minisft.training.distributed import run_worker

    root, *checkpoint = [word for word in sys.argv[1:] if not word.startswith("--")]

    def work() -> None:
        from minisft.runner import train_as_worker
        from minisft.training.run_training import PAUSE_OPTION

        pauses = [int(word.removeprefix(PAUSE_OPTION)) for word in sys.argv[1:] if word.startswith(PAUSE_OPTION)]
        resume_from = Path(checkpoint[0]) if checkpoint else None
        train_as_worker(Path(root), resume_from, TRUST_OPTION in sys.argv[1:], pauses[0] if pauses else None)

    run_worker(work)


if __name__ == "__main__":
    main()
