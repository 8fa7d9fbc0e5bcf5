"""A process that ends with the given signal or status: `python -m tests.unit.planning.ends SIGKILL | STATUS`."""

import os
import signal
import sys

if __name__ == "__main__":
    if sys.argv[1].isdigit():
        sys.exit(int(sys.argv[1]))
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
