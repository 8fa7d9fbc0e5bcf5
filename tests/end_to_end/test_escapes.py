"""Text of data, models and libraries is text: on a terminal, and in the files that are read in one."""

import io
import json
import re

import pytest

from minisft.cli import main
from minisft.data.encoder import Encoder

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egpj"
PEACEFUL = "猫 é 👩‍👩‍👧 שלום \U0001f600"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
FILES = ("examples.txt", "prompts.txt", "changes.txt", "outputs.jsonl", "prompts.jsonl", "results.json", "results.md",
         "ledger.json")  # fmt: skip


def harmless(text):
    assert not OBEYED.search(text), [text[max(0, m.start() - 40) : m.end() + 20] for m in OBEYED.finditer(text)][:3]
    return text


def clean_run(capsys, *words):
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return harmless(printed.out) + harmless(printed.err)


@pytest.fixture
def evil_recipe(recipe_file, tmp_path):
    """A recipe whose data holds escapes in ids, questions and answers, beside texts of other scripts."""
    rows = [
        {
            "id": f"{EVIL}{number}",
            "conversations": [
                {"from": "human", "value": f"{number} {EVIL} {PEACEFUL}"},
                {"from": "gpt", "value": f"answer {EVIL} {PEACEFUL}"},
            ],
        }
        for number in range(24)
    ]
    path = tmp_path / f"rows{EVIL.replace('/', '')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"what {EVIL} {PEACEFUL}\n")
    text = recipe_file.read_text()
    text = re.sub(r"source: .*", lambda _: f"source: {json.dumps(str(path))}", text)
    text = text.replace("epochs: 2", "max_steps: 2\n  save_every: 1")
    recipe_file.write_text(text.replace("max_new_tokens: 8", f"max_new_tokens: 8\n  prompts: {prompts}"))
    return recipe_file


def test_no_escape_of_data_or_model_reaches_a_terminal(capsys, evil_recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shown = clean_run(capsys, "prepare", evil_recipe) + clean_run(capsys, "inspect", evil_recipe)
    assert "\\x1b]0;owned\\x07" in shown
    assert "\\u202egpj" in shown
    clean_run(capsys, "train", evil_recipe)
    answers = iter(range(10**6))
    monkeypatch.setattr(Encoder, "decode_answer", lambda self, ids: f"{next(answers)} {EVIL} {PEACEFUL}")
    clean_run(capsys, "evaluate", run)
    printed = clean_run(capsys, "evaluate", run, "--json")
    assert json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])["best"]
    clean_run(capsys, "report", run)
    assert "\\x1b]0;owned" in clean_run(capsys, "chat", run, "--message", f"hi {EVIL}")
    from minisft.demo import show_demo

    show_demo(run)
    assert PEACEFUL in harmless(capsys.readouterr().out)
    found = {path.name: path.read_text(encoding="utf-8") for path in run.rglob("*") if path.name in FILES}
    assert set(found) == set(FILES)
    for name, text in found.items():
        harmless(text)
        if name not in ("results.json", "ledger.json"):
            assert PEACEFUL in text, name
    lines = [path.read_text(encoding="utf-8").splitlines()[0] for path in run.rglob("outputs.jsonl")]
    assert all(EVIL in json.loads(line)["prompt"] for line in lines), "JSON says the same, in escapes of its own"


def test_errors_that_quote_data_or_words_are_harmless(capsys, recipe_file, tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in (
        {EVIL: "x"},
        {"conversations": [{"from": EVIL, "value": "a"}]},
        {"id": EVIL, "conversations": [{"from": "human", "value": "a"}]},
    ):
        path.write_text(json.dumps(row) + "\n")
        assert main(["prepare", str(recipe_file), f"data.source={path}"]) == 2
        harmless(capsys.readouterr().err)
    for words in ([EVIL], ["train", EVIL], ["chat", EVIL], ["train", str(recipe_file), f"{EVIL}=1"]):
        assert main(words) == 2
        harmless(capsys.readouterr().err)


def test_output_of_a_library_has_no_control_characters(tmp_path):
    """transformers logs names that it reads in a model's files."""
    code = (
        "import logging, sys, warnings; from minisft.cli import main; main(['--version'])\n"
        f"logging.getLogger('x').error('model %s', {EVIL!r}); warnings.warn({EVIL!r}); raise ValueError({EVIL!r})"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert harmless(done.stderr).count("owned") >= 3


def test_on_a_terminal_styles_alone_are_obeyed():
    """Tables, bars and lines of a terminal with colours, whoever made their text."""
    from rich.progress import Progress
    from rich.table import Table

    from minisft.console import console

    file = io.StringIO()
    terminal = type(console)(file=file, force_terminal=True, color_system="standard", width=200)
    table = Table(EVIL)
    table.add_row(EVIL, style="green")
    terminal.print(table)
    terminal.print(EVIL, style="bold")
    with terminal.status(EVIL), Progress(console=terminal) as progress:
        progress.advance(progress.add_task(EVIL, total=1))
    written = file.getvalue()
    assert "\x1b[32m" in written
    assert "\x1b[31m" not in written
    assert "\x1b]" not in written
    harmless(re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]|\r", "", written))
