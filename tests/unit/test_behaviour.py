"""benchmarks/behaviour.py: what is replaced in a record, and how two records are compared."""

import importlib
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def behaviour(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("behaviour")


@pytest.fixture
def plain(behaviour):
    return behaviour.Plain(Path("/tmp/behaviour-x1"), Path("/old/src"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/tmp/behaviour-x1/here/run: no", "<here>/run: no"),
        ("/tmp/behaviour-x1/cache/models", "<work>/cache/models"),
        ("/old/src/minisft/cli.py:12: Warning", "<source>/minisft/cli.py:<line>: Warning"),
        ("[2026-11-25 21:13:20,930] [WARNING]", "<date> [WARNING]"),
        ("done in 3.2 s, 1,200 ms or 2 minutes", "done in <time>, <time> or <time>"),
        ('{"seconds": 0.127, "score": 1.2}', '{"seconds": <time>, "score": 1.2}'),
        ("left 0:00:12", "left <time>"),
        ("5,387 supervised tokens/s  0.53 GB", "<speed>  <size>"),
        ("epoch 0.33  loss 5.5614", "epoch 0.33  loss 5.5614"),
        ('".recipe.yaml.4711"', '".recipe.yaml.<process>"'),
        ("checkpoint-12 of 24 rows, 95 % intervals", "checkpoint-12 of 24 rows, 95 % intervals"),
        ("events.out.tfevents.1764.host.7.0", "events.out.tfevents.<run>"),
    ],
)
def test_only_what_is_another_value_at_each_run_is_replaced(plain, text, expected):
    assert plain.text(text) == expected


def test_a_loose_text_keeps_names_with_numbers(plain):
    assert plain.text("zero2 -0.5 of 12, fp32, checkpoint-3", loose=True) == (
        "zero2 -<number> of <number>, fp32, checkpoint-3"
    )


def test_printed_columns_do_not_depend_on_their_width(behaviour, plain):
    command = behaviour.Command("evaluate", "evaluate run")
    narrow = "        loss  seconds\n ─────────\n base  5.5      0.1\n\nafter 0.1"
    wide = "          loss  seconds\n ────────────\n base  5.5      120.1\n\nafter 0.1"
    assert plain.printed(narrow, command) == plain.printed(wide, command)
    assert plain.printed(narrow, command).splitlines()[2:] == [" base  5.5  <number>", "", "after 0.1"]
    other = narrow.replace("5.5", "5.6")
    assert plain.printed(other, command) != plain.printed(narrow, command)


def test_progress_bars_are_left_out_and_help_is_unchanged(behaviour, plain):
    assert plain.printed("a\r 50%|##  | 1/2\nb", behaviour.Command("train", "train x")) == "a\nb"
    assert plain.printed("  --a     in 3 s", behaviour.Command("help-a", "a --help")) == "  --a     in 3 s"


def test_of_the_steps_of_a_training_the_first_and_the_last_are_kept(behaviour):
    lines = [f"step {step}/9  epoch 0.{step}" for step in (4, 6, 9)]
    assert list(behaviour.without_passing(["a", *lines, "b", *lines])) == [
        "a",
        lines[0],
        lines[2],
        "b",
        lines[0],
        lines[2],
    ]


def test_the_lines_of_several_processes_are_sorted(behaviour, plain):
    command = behaviour.Command("train", "train x", spread=True)
    assert plain.printed("b\na\n", command) == plain.printed("a\nb\n", command) == "a\nb"


def test_json_keeps_its_order_and_all_that_is_not_measured(plain, tmp_path):
    value = {"step": 1, "seconds": 2.5, "peak_memory_mb": None, "learning_rate": 0.1, "made_from": {"program": "ab"}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    found = json.loads(plain.file(tmp_path / "a.json", loose=False))
    assert list(found) == list(value)
    assert found == value | {"seconds": "<number>", "made_from": {"program": "<text>"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(value) + "\n" + json.dumps({"loss": 1}) + "\n")
    assert plain.file(tmp_path / "a.jsonl", loose=True).splitlines()[1] == '{"loss": "<number>"}'


def test_html_is_a_tag_a_line_without_what_is_measured(plain, tmp_path):
    page = (
        '<table><thead><tr><td></td><th scope="col">loss</th><th scope="col">seconds</th></tr></thead>'
        "<tbody><tr><td>base</td><td>5.5</td><td>0.064</td></tr></tbody></table>"
        '<script type="application/json" id="data">{"text": "a<\\/b", "seconds": 3}</script>'
    )
    (tmp_path / "a.html").write_text(page)
    found = plain.file(tmp_path / "a.html", loose=False)
    assert "<td>5.5</td>\n<td><number></td>" in found
    assert '"text": "a</b",\n "seconds": "<number>"' in found


def test_speeds_on_a_page_are_replaced(plain, tmp_path):
    bar = '<rect class="bar" x="0" width="31" height="14"/><text x="37" y="3">0.02</text>'
    tile = '<div><dt>training time</dt><dd class="figure">2 min 54 s</dd><dd>57 supervised tokens/s</dd></div>'
    loss = '<div><dt>held-out loss</dt><dd class="figure">0.256</dd></div>'
    (tmp_path / "a.html").write_text(
        f"<tr><td>tokens a second</td><td>15,656</td></tr><td>epochs</td><td>3</td>{bar}{tile}{loss}"
    )
    found = plain.file(tmp_path / "a.html", loose=False)
    assert "<td>tokens a second</td>\n<td><number></td>" in found
    assert "<td>epochs</td>\n<td>3</td>" in found
    assert 'width="<number>" height="14"/>\n<text x="<number>" y="3"><number></text>' in found
    assert '<dt>training time</dt>\n<dd class="figure"><number></dd>\n<dd><number></dd>' in found
    assert '<dd class="figure">0.256</dd>' in found


def test_what_is_no_text_has_a_word(plain, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("a.png")
    found = {name: plain.file(tmp_path / name, loose=False) for name in ("a.png", "a.safetensors", "empty", "link")}
    assert found["a.png"] == "binary\n"
    assert re.fullmatch("SHA-256 e3b0[0-9a-f]{60}\n", found["a.safetensors"])
    assert (found["empty"], found["link"]) == ("empty\n", "link to a.png\n")


@pytest.fixture
def records(tmp_path):
    """Return two equal records of two commands."""
    for record in ("before", "after"):
        for command in ("000-help", "001-train"):
            folder = tmp_path / record / command
            (folder / "files").mkdir(parents=True)
            (folder / "command.txt").write_text("exit status 0\n")
            (folder / "files" / "a.json.txt").write_text("sum\n 3\n")
    return tmp_path / "before", tmp_path / "after"


def test_equal_records_are_identical(behaviour, records, capsys):
    assert behaviour.compare(*records) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["000-help: identical", "001-train: identical"]


def test_a_difference_is_shown_at_its_command(behaviour, records, capsys):
    (records[1] / "001-train" / "files" / "a.json.txt").write_text("sum\n 4\n")
    assert behaviour.compare(*records) == 1
    printed = capsys.readouterr().out
    assert "000-help: identical\n001-train: DIFFERENT\n" in printed
    assert "    - 3\n    + 4\n" in printed


def test_a_file_or_a_command_that_is_only_on_one_side_differs(behaviour, records):
    (records[1] / "001-train" / "stderr.txt").touch()
    assert behaviour.compare(*records) == 1
    (records[1] / "001-train" / "stderr.txt").unlink()
    (records[0] / "002-more").mkdir()
    (records[0] / "002-more" / "command.txt").write_text("exit status 0\n")
    assert behaviour.compare(*records) == 1


def test_an_intended_rewording_drops_out_and_no_other(behaviour, records, tmp_path):
    (records[0] / "000-help" / "stdout.txt").write_text("To mend it: a\nTo mend it: b\n")
    (records[1] / "000-help" / "stdout.txt").write_text("Fix: a\nFix: b\n")
    (tmp_path / "words").write_text("# words\n\nTo (mend) it: => Fix:\n")
    rewordings = behaviour.read_rewordings(tmp_path / "words")
    assert behaviour.compare(*records) == 1
    assert behaviour.compare(*records, rewordings) == 0
    assert behaviour.compare(records[1], records[0], rewordings) == 1


@pytest.mark.parametrize("line", ["a -> b", "( => b"])
def test_a_line_that_is_no_rewording_is_named(behaviour, tmp_path, line):
    (tmp_path / "words").write_text(f"a => b\n{line}\n")
    with pytest.raises(SystemExit, match="words:2:"):
        behaviour.read_rewordings(tmp_path / "words")


def test_every_command_has_a_name_of_its_own_and_every_verb_its_help(behaviour):
    from minisft.cli import VERBS

    names = [command.name for command in behaviour.all_commands()]
    assert len(set(names)) == len(names)
    assert {f"help-{verb}" for verb in VERBS} <= set(names)
