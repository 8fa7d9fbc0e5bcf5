"""Options stand where the user likes: before, between and after the recipe and its overrides."""

import itertools
import os
import subprocess
import sys

import pytest

from minisft.cli import VERBS
from tests.command import refused

OPTIONS = {
    "demo": ["--force"],
    "init": ["--gpu", "h100"],
    "prepare": ["--force"],
    "inspect": ["--row", "3"],
    "check": ["--quick"],
    "plan": ["--gpu", "h100"],
    "train": ["--resume"],
    "submit": ["--time", "8:00:00"],
    "evaluate": ["--follow"],
    "contamination": ["--against", "b.txt"],
    "compare": ["--vary", "seed=1,2"],
    "search": ["--budget", "3x"],
    "report": ["--to", "folder"],
    "export": ["--dtype", "bf16"],
    "push": ["--dry-run"],
    "serve": ["--port", "0"],
    "chat": ["--message", "Hi!"],
}


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.reads_keys])
def test_options_and_words_mix_in_every_order(verb):
    words = (["recipe.yaml"] if verb != "demo" else []) + ["seed=1", "data.limit=2"]
    parsed = set()
    for place, second in itertools.product(range(len(words) + 1), repeat=2):
        mixed = list(words)
        mixed[place:place] = OPTIONS[verb]
        if verb not in ("demo", "report") and second <= place:
            mixed.insert(second, "--trust-remote-code")
            parsed.add((True, str(VERBS[verb].parser(verb).parse(mixed))))
        else:
            parsed.add((False, str(VERBS[verb].parser(verb).parse(mixed))))
    assert {found.count("trust_remote_code=True") for with_trust, found in parsed if with_trust} <= {1}
    assert len(parsed) == len({with_trust for with_trust, _ in parsed})


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["check", "recipe.yaml", "--quik"], "did you mean `--quick`? see `minisft check --help`"),
        (["submit", "recipe.yaml", "--time", "90", "--partion=gpu"], "did you mean `--partition`?"),
        (["submit", "recipe.yaml", "--tim", "8:00:00"], "did you mean `--time`?"),  # although --time is missing
        (["inspect", "recipe.yaml", "--split", "tset"], "did you mean `test`?"),
        (["export", "run", "folder", "--to", "guff"], "did you mean `gguf`?"),
        (["train", "recipe.yaml", "--zzz"], "Fix: see `minisft train --help`"),
        (["inspect", "recipe.yaml", "--row", "x"], "Fix: see `minisft inspect --help`"),
    ],
)
def test_a_misspelt_option_or_choice_names_the_nearest(words, fix, capsys):
    assert fix in refused(capsys, *words)


def test_the_list_of_commands_ends_quietly_where_nobody_reads_on():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "minisft"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_list_of_commands_fits_its_terminal():
    narrow = {**os.environ, "COLUMNS": "60"}
    shown = subprocess.run([sys.executable, "-m", "minisft"], env=narrow, capture_output=True, text=True).stdout
    assert max(map(len, shown.splitlines())) <= 72  # the last line has the command to go on with
    assert all(f"  {name} " in shown for name in VERBS)
