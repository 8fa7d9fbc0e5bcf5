"""How a process ends."""

import subprocess
import sys

LEAVES = """
import atexit, ctypes, sys, threading, time
from minisft.processes import hard_exit

c = ctypes.CDLL(None)
c.on_exit(c.abort, None)  # what a C++ destructor may do while the interpreter is torn down
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("work", end=" ")
{end}
"""


def run(end):
    return subprocess.run([sys.executable, "-c", LEAVES.format(end=end)], capture_output=True, text=True, timeout=60)


def test_what_dies_in_the_teardown_does_not_change_how_the_work_ended():
    done = run("hard_exit(3)")
    assert (done.returncode, done.stdout) == (3, "work thread\nat exit\n")


def test_the_teardown_of_that_program_would_die():
    assert run("sys.exit(0)").returncode == -6
