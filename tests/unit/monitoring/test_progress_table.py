"""The table of a training: its rows, its numbers, and where it is redrawn."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from minisft.monitoring.progress_table import ProgressTable, spark_line, step_line, trend_of
from minisft.text import duration
from tests.terminal import run_in_terminal

ROWS = ["step", "epoch", "loss", "held-out", "speed", "memory", "left"]
COLOURS = re.compile(rb"\x1b\[[\d;]*3[0-7][\d;]*m")
# Draws a table of four steps, with messages meanwhile, and without the imports of a training.
SCRIPT = """
import sys, time
from minisft.console import display, redraws, say, waiting, warn
from minisft.monitoring.progress_table import ProgressTable, step_line

table = ProgressTable("training \\x1b]0;evil\\x07 run")
table.last_step = 4
with display(waiting_for="preparing", keep=True) as shown:
    time.sleep(0.3)
    shown.body, shown.waiting_for = table, ""
    for step in range(1, 5):
        line = dict(step=step, epoch=step / 4, loss=5.0 - step, supervised_tokens=100, seconds=0.5, peak_memory_mb=1500.0)
        table.add(line)
        if not redraws():
            warn(step_line(line, 4, None))
        time.sleep(0.3)
        if step == 2:
            say("said [/INST] meanwhile")
            print("printed meanwhile", file=sys.stderr)
            with waiting("saving checkpoint-2"):
                time.sleep(1.5)
"""


def line(step, loss=2.0, **more):
    return {"step": step, "epoch": step / 10, "loss": loss, "supervised_tokens": 300, "seconds": 2.0,
            "peak_memory_mb": 2500.0, **more}  # fmt: skip


def rows_of(table):
    """Return the rows of a table as text by their names, in a terminal of 80 characters."""
    output = io.StringIO()
    Console(file=output, width=80, color_system=None).print(table)
    title, *rows = output.getvalue().splitlines()
    return {"title": title.rstrip(), **{row.split()[0]: row[row.index(row.split()[0]) + 8 :].strip() for row in rows}}


def test_the_rows_of_a_training():
    seconds = iter([0.0, 10.0, 10.0, 11.0])
    table = ProgressTable("training x", clock=lambda: next(seconds))
    table.last_step = 40
    table.add(line(9, 4.0, eval_loss=3.0))
    table.add(line(10, 2.0, eval_loss=3.5))
    rows = rows_of(table)
    assert list(rows) == ["title", *ROWS]
    assert rows["step"].startswith("10 of 40")
    assert rows["epoch"] == "1.00"
    assert rows["loss"].split() == ["2.0000", "█▁"]
    assert rows["held-out"] == "loss 3.5000 at step 10  (lowest: 3.0000)"
    assert rows["speed"] == "150 supervised tokens/s"
    assert rows["memory"] == "2.50 GB"
    assert rows["left"] == "59 s"  # 30 steps of 2 s, of which one second has passed


def test_a_table_before_the_first_step_has_the_same_rows():
    assert list(rows_of(ProgressTable("training x"))) == ["title", *ROWS]


def test_what_is_not_finite_or_not_known_is_no_error():
    table = ProgressTable("training x")
    table.add(line(1, float("nan"), epoch=None, peak_memory_mb=None))
    table.add(line(2, float("inf"), seconds=0.0))
    assert rows_of(table)["loss"].startswith("inf")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], ""), ([4, 4, 2, 2], "falling"), ([2, 2, 4, 4], "rising"), ([2, 2, 2, 2.01], "level"),
     ([float("nan"), 4, 4, 2, 2], "falling")],
)  # fmt: skip
def test_the_trend_compares_the_newest_half_with_the_one_before(values, expected):
    assert trend_of(list(values)) == expected


def test_the_line_of_a_curve_has_a_fixed_width_and_both_ends():
    assert spark_line([]) == ""
    assert spark_line([3.0]) == "▁"
    drawn = spark_line([float(value) for value in range(1000, 0, -1)])
    assert len(drawn) == 24
    assert (drawn[0], drawn[-1]) == ("█", "▁")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7265, "2 h 01 min")]
)
def test_a_duration_has_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_step_in_one_line():
    text = step_line(line(3), 10, 14.2)
    assert text == "step 3/10  epoch 0.30  loss 2.0000  150 supervised tokens/s  2.50 GB  14 s left"
    assert step_line(line(3), None, None) == text.replace("/10", "/?").removesuffix("  14 s left")


# --- in a terminal


def test_in_a_terminal_the_table_is_redrawn_and_messages_appear_above_it():
    session = run_in_terminal(["-c", SCRIPT])
    assert session.status == 0, session.last
    lines = session.last.splitlines()
    assert lines[:2] == ["said [/INST] meanwhile", "printed meanwhile"]
    assert lines[2] == "training \\x1b]0;evil\\x07 run"
    assert [row.split()[0] for row in lines[3:]] == ROWS
    assert COLOURS.search(session.raw)
    assert not session.scrolled
    assert session.raw.count(b"\x1b[?25l") == session.raw.count(b"\x1b[?25h") == 1  # the cursor is shown again
    waits = {screen.splitlines()[-1][2:].strip() for screen in session.screens if set(screen) & set("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")}
    assert {"preparing", "saving checkpoint-2"} <= waits


def test_no_colour_where_it_is_not_wanted():
    session = run_in_terminal(["-c", SCRIPT], {"NO_COLOR": "1"})
    assert not COLOURS.search(session.raw)
    assert [row.split()[0] for row in session.last.splitlines()[3:]] == ROWS


def test_ascii_where_the_terminal_has_no_unicode():
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    session = run_in_terminal(["-c", SCRIPT], variables)
    assert session.status == 0, session.last
    assert session.last.isascii()
    assert re.search(r"^loss +1\.0000  @[*#+=]", session.last, re.MULTILINE)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    session = run_in_terminal(["-c", SCRIPT], {"TERM": "dumb"})
    assert b"\x1b" not in session.raw
    assert session.last.splitlines()[0].startswith("step 1/4  epoch 0.25  loss 4.0000")
    assert session.last.count("supervised tokens/s") == 4


def test_only_the_first_of_several_processes_draws():
    session = run_in_terminal(["-c", SCRIPT], {"RANK": "1", "WORLD_SIZE": "2"})
    assert b"\x1b[?25l" not in session.raw
    assert session.last.count("supervised tokens/s") == 4


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1", "TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_lines_and_nothing_is_redrawn(variables):
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "said [/INST] meanwhile" in done.stdout
    assert done.stderr.count("supervised tokens/s") == 4
    assert "\x1b[?25l" not in done.stdout + done.stderr


def test_what_goes_to_a_file_stays_there(tmp_path):
    """Of a command whose stdout is a file, the table is in the terminal, and messages are in the file."""
    file = tmp_path / "out.txt"
    script = f"import sys; sys.stdout = open({str(file)!r}, 'w')\n{SCRIPT}\nprint('printed')\nsys.stdout.flush()"
    session = run_in_terminal(["-c", script])
    assert session.status == 0, session.last
    assert file.read_text() == "said [/INST] meanwhile\nprinted\n"
    assert "said" not in session.last
