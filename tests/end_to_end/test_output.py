"""What a normal run prints: a line at once, nothing of a library, and a long compilation is announced and can be stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from minisft.cli import main
from tests.tiny import heed_ctrl_c, minisft
from tests.unit.test_models import write_gguf

# Ends at the first thing that is printed, and says what had been imported by then.
FIRST_WORDS = """
import os, sys

class First:
    def __init__(self, name):
        self.name = name
    def write(self, text):
        heavy = [name for name in ("torch", "transformers", "datasets", "deepspeed") if name in sys.modules]
        os.write(1, f"{self.name}|{text}|{heavy}".encode())
        os._exit(0)
    def flush(self):
        pass

sys.stdout, sys.stderr = First("stdout"), First("stderr")
from minisft.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, conversations):
    """Return recipe and folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {folder / 'run'}\n"
        f"data: {{source: {conversations}, template: mistral, max_length: 256}}\n"
        "training: {max_steps: 1, precision: fp32}\nevaluation: {max_new_tokens: 4}\n"
    )
    assert main(["train", str(recipe)]) == 0
    return recipe, folder / "run"


@pytest.mark.parametrize(
    ("words", "stream"),
    [
        (["train", "RECIPE"], "stdout"),
        (["prepare", "RECIPE"], "stdout"),
        (["check", "RECIPE"], "stdout"),
        (["check", "RECIPE", "--json"], "stderr"),
        (["plan", "RECIPE"], "stderr"),
        (["plan", "RECIPE", "--json"], "stderr"),
        (["inspect", "RUN"], "stdout"),
        (["evaluate", "RUN"], "stdout"),
        (["evaluate", "RUN", "--json"], "stderr"),
        (["report", "RUN"], "stdout"),
        (["export", "RUN", "FOLDER"], "stdout"),
        (["compare", "RECIPE"], "stdout"),
        (["chat", "RUN"], "stderr"),
        (["chat", "RUN", "--message", "hello"], "stderr"),
        (["demo"], "stdout"),
    ],
    ids=" ".join,
)
def test_a_line_is_printed_before_anything_heavy_is_imported(trained, words, stream):
    recipe, run = trained
    told = {"RECIPE": str(recipe), "RUN": str(run)}
    command = [sys.executable, "-c", FIRST_WORDS, *(told.get(word, word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    printed_on, text, heavy = done.stdout.split("|")
    assert text.startswith(f"minisft {words[0]}")
    assert printed_on == stream
    assert heavy == "[]", f"{heavy} was imported before a word was said"
    assert not done.stderr


# --- nothing of a library

NUMBER = r"[\d.,]+"
OURS = [
    r"minisft (train|evaluate|chat|demo)\b.*",
    r"model .*: the folder .*",
    r"data .*/dataset( \(prepared before\))?",
    r"  (rows|tokens|turns|lengths|duplicates|padding|template|format|findings|split|test) .*",
    rf"disk {NUMBER} .B for \d+ checkpoints? of .*; .* free",
    rf"step \d+/\d+  epoch {NUMBER}  loss {NUMBER}  \d+ supervised tokens/s  {NUMBER} GB  \d+ s left",
    r"trained: .* \(checkpoints beside it, curve in .*\)",
    r"metrics: .*/metrics\.jsonl; tensorboard --logdir .*/tensorboard",
    r"next: minisft (evaluate|report) .*",
    r"compiling DeepSpeed's communication, once, .*",
]


def foreign(text, known):
    return [line for line in text.splitlines() if line.strip() and not any(re.fullmatch(one, line) for one in known)]


def prints_only_ours(*words, more=()):
    done = minisft(*words)
    assert done.returncode == 0, done.stderr
    assert foreign(done.stdout, [*OURS, *more]) == []
    assert foreign(done.stderr, [*OURS, *more]) == []
    return done


EVALUATED = [
    r"\d+ held-out repl(y|ies) .*",
    r" +(loss|BLEU|chrF|exact|\W)+",
    r" ─+ ?",
    r" (base|checkpoint-\d+( \(.*\))?|constant) +[\d.]+.*",
    r"constant: always '.*'",
    r"All answers and examples: .*",
    r"(base|checkpoint-\d+): \d+ of \d+ answers",
    r"\d+ held-out conversations: fewer than 20 support neither .*",
]
CHATTED = [r"\(cut: the answer reached --max-new-tokens\)"]


def test_train_evaluate_and_chat_print_no_line_of_a_library(trained, tmp_path):
    recipe, run = trained
    prints_only_ours("train", recipe, f"output={tmp_path / 'run'}")
    prints_only_ours("evaluate", run, more=EVALUATED)
    done = minisft("chat", run, "--message", "tea please", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert foreign(done.stderr, [*OURS, *CHATTED]) == []


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2", "zero3"])
def test_several_processes_print_no_line_of_a_library(trained, tmp_path, strategy):
    how = [f"training.strategy={strategy}", "training.processes=2", "training.batch_size=4"]
    prints_only_ours("train", trained[0], f"output={tmp_path / 'run'}", *how)


def test_a_gguf_file_is_converted_without_a_librarys_bar(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    main(["prepare", str(trained[0]), f"model={write_gguf(tmp_path / 'tiny.gguf')}", f"output={tmp_path / 'run'}"])
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "converting tiny.gguf, once; it is kept in the cache"
    assert not any("GGUF tensors" in line for line in said)


def test_an_export_prints_no_line_of_a_library(trained, tmp_path):
    done = minisft("export", trained[1], tmp_path / "exported", "--dtype", "bf16", "--engine", "transformers")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3  # the command, the verification, the folder


def test_what_is_not_known_is_not_held_back(capsys):
    import logging
    import warnings

    from minisft.output_filters import drop_lines, suppress_known_warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        suppress_known_warnings()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("the disk is on fire", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == ["the disk is on fire"]
    logger = logging.getLogger("transformers.trainer_utils")
    record = logging.LogRecord(
        logger.name, logging.WARNING, "", 0, "%s", ("The tokenizer has new PAD/BOS/EOS tokens that",), None
    )
    other = logging.LogRecord(logger.name, logging.WARNING, "", 0, "the tokenizer is on fire", (), None)
    assert not logger.filter(record)
    assert logger.filter(other)
    with drop_lines("built successfully"):
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("DeepSpeed has something else to say")
        print("and ends without a line feed", end="")
    assert capsys.readouterr().out == "DeepSpeed has something else to say\nand ends without a line feed"


# --- the compilation


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_compilation_is_announced_and_stops_at_once(trained, tmp_path, number):
    pytest.importorskip("deepspeed")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no compiler")
    command = [
        sys.executable,
        "-m",
        "minisft",
        "train",
        str(trained[0]),
        f"output={tmp_path / 'run'}",
        "training.strategy=zero2",
    ]
    environment = {**os.environ, "MINISFT_CACHE": str(tmp_path / "cache")}
    environment.pop("TORCH_EXTENSIONS_DIR", None)  # which a run in this process has set
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("compiling DeepSpeed's communication")
    while not list((tmp_path / "cache").glob("**/build.ninja")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stopped while DeepSpeed's communication was compiled" in said
    assert not list((tmp_path / "cache").glob("**/lock"))
