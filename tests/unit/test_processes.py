"""How a process ends, and how its threads wait."""

import os
import re
import subprocess
import sys

import pytest

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


IMPORTS = "from minisft.recipe_argument import set_library_environment as set_it\n{before}set_it()\n{after}"


def waiting_of_libgomp(before="", after="import torch", **own):
    """Return the waiting policy and the spin count that libgomp itself reports when torch loads it."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(before=before, after=after)],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | own, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return tuple(re.findall(r"(?:OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "777"}, "777"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_sleep_soon_where_the_user_set_nothing(own, expected):
    found = waiting_of_libgomp(**own)
    if not found:
        pytest.skip("this torch has another OpenMP than libgomp")
    assert found[1] == expected


def test_a_variable_that_would_be_set_too_late_is_not_set():
    assert (
        waiting_of_libgomp(before="import torch, os\n", after="assert 'GOMP_SPINCOUNT' not in os.environ") is not None
    )
