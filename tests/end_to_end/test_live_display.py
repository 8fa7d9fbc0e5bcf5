"""In a terminal a training is one table that is redrawn in place, and everything else appears above it."""

import re

from tests.terminal import run_in_terminal
from tests.tiny import write_recipe

# Trains slowly, and lets libraries and MiniSFT print between two steps.
SLOW = """
import logging, sys, time, warnings
import minisft
from minisft.console import say, warn
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[2]))
        if state.global_step == 2:
            print("printed by a library")
            print("printed on stderr", file=sys.stderr)
            logging.getLogger("transformers").warning("logged by a library")
            warnings.warn("a library warns")
            say("said [/INST] meanwhile")
            warn("warned meanwhile")

minisft.train(sys.argv[1], callbacks=[Slow()])
"""
SAID = ["printed by a library", "printed on stderr", "logged by a library", "a library warns", "said [/INST] meanwhile",
        "warned meanwhile"]  # fmt: skip
ROWS = ["step", "epoch", "loss", "held-out", "speed", "memory", "left"]


def table_of(screen):
    """Return the first words of the lines from the table's title to its last row."""
    lines = screen.splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith("training ")]
    return [line.split()[0] for line in lines[titles[0] + 1 : titles[0] + 1 + len(ROWS)]] if titles else []


def test_a_training_is_one_table_and_messages_appear_above_it(tmp_path, tiny_model, conversations):
    settings = "{max_steps: 6, eval_every: 3, save_every: 4, learning_rate: 1.0e-3, precision: fp32}"
    recipe = write_recipe(tmp_path, tiny_model, conversations, settings)
    session = run_in_terminal(["-c", SLOW, recipe, 0.3])
    assert session.status == 0
    with_table = [screen for screen in session.screens if "training " in screen and table_of(screen) == ROWS]
    assert len(with_table) >= 6
    assert all(screen.count("supervised tokens/s") <= 1 for screen in session.screens), (
        "the table was not redrawn in place"
    )
    lines = session.last.splitlines()
    title = next(number for number, line in enumerate(lines) if line.startswith("training "))
    for text in SAID:
        [place] = [number for number, line in enumerate(lines) if text in line]
        assert place < title, f"{text} is not above the table"
    assert table_of(session.last) == ROWS
    assert re.search(r"^step +6 of 6 ", session.last, re.MULTILINE)
    assert re.search(r"^loss +\d\.\d{4}  [▁▂▃▄▅▆▇█]+  falling$", session.last, re.MULTILINE)
    assert re.search(r"^held-out  loss \d\.\d{4} at step 6$", session.last, re.MULTILINE)
    below = next(filter(None, lines[title + len(ROWS) + 1 :]))  # rich 14.1 leaves an empty line below the table
    assert "trained: " in below
    assert session.raw.count(b"\x1b[?25l") == session.raw.count(b"\x1b[?25h")  # the cursor is shown again
    assert any("preparing the first step" in screen for screen in session.screens)
