"""A command in a process of its own: its exit status, its output, and that signals reach it."""

import os
import signal
import threading
import time

import pytest

from minisft.comparison.shared_files import share
from minisft.errors import StoppedError
from minisft.processes import CompletedVerb, run_verb


def test_an_error_that_the_user_can_fix_has_status_2(tmp_path):
    lines: list[str] = []
    ended = run_verb(["train", str(tmp_path / "none.yaml")], tmp_path / "log", lines.append)
    assert ended.status == 2
    assert ended.error.startswith(f"{tmp_path / 'none.yaml'}: there is no such recipe\n  Fix: ")
    assert lines
    assert (tmp_path / "log").read_text().startswith(f"$ minisft train {tmp_path / 'none.yaml'}\nminisft: ")


def test_the_log_keeps_what_earlier_children_printed(tmp_path):
    log = tmp_path / "log"
    assert run_verb(["--version"], log, lambda line: None).status == 0
    ended = run_verb(["--version"], log, lambda line: None)
    assert ended.printed.count("minisft ") == 1
    assert log.read_text().count("$ minisft --version") == 2


@pytest.mark.parametrize(
    ("status", "printed", "said"),
    [
        (-9, "step 1\n", "killed by SIGKILL: often too little memory"),
        (-15, "", "killed by SIGTERM"),
        (1, "Traceback\nRuntimeError: no\n\n", "exit status 1: RuntimeError: no"),
        (1, "", "exit status 1: it printed nothing"),
        (2, "step 1\nminisft: a: b\n  Fix: c\n", "a: b\n  Fix: c"),
    ],
)
def test_the_error_gives_the_reason_of_the_failed_command(status, printed, said):
    assert CompletedVerb(status, printed).error == said


def test_a_signal_stops_the_child_and_then_this_process(tmp_path):
    """`--follow` waits for data that never arrives; the child has ended before StoppedError is raised."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: m\noutput: {tmp_path / 'run'}\ndata: {{source: s}}\n")
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before, begun = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(StoppedError, match="the same command resumes"):
        run_verb(["evaluate", str(recipe), "--follow"], tmp_path / "log", lambda line: None)
    assert 0.6 < time.monotonic() - begun < 30
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_shared_folder_is_complete_and_replaces_nothing(tmp_path):
    source = tmp_path / "a" / "dataset"
    (source / "train").mkdir(parents=True)
    (source / "train" / "rows").write_text("rows")
    share(source, tmp_path / "b" / "dataset")
    assert (tmp_path / "b" / "dataset" / "train" / "rows").read_text() == "rows"
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["dataset"]
    (source / "train" / "rows").unlink()
    share(source, tmp_path / "b" / "dataset")
    assert (tmp_path / "b" / "dataset" / "train" / "rows").exists()
    share(tmp_path / "none", tmp_path / "c")
    assert not (tmp_path / "c").exists()
