"""Templates and rows that would run for hours or take all memory: stopped, with a message and exit status 2."""

import json
import time

import pytest

from minisft.cli import main
from minisft.data.readers import LARGEST_ROW, read_files
from tests.command import refused

ANSWERS = "{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = OP %}{% endfor %}{{ n.s }}"
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "range": "{{ range(10**9) | list }}",
    "times": "{{ 'x' * 10**9 }}",
    "times_late": "{% set n = messages | length * 10**9 %}{{ ('x' * n) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "tilde": DOUBLING.replace("OP", "n.s ~ n.s"),
    "plus": DOUBLING.replace("OP", "n.s + n.s"),
    "lists": DOUBLING.replace("OP", "[n.s, n.s]"),
    "format": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "output": "{% set s = 'x' * 60000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "{# " + "x" * (1 << 21) + " #}",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("minisft.data.renderers.jinja_limits.SECONDS", 0.5)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_run_for_ever_is_stopped(capsys, quick, recipe_file, tmp_path, name):
    template = tmp_path / f"{name}.jinja"
    template.write_text(ANSWERS + BOMBS[name])
    begun = time.monotonic()
    said = refused(capsys, "prepare", recipe_file, f"data.template={template}")
    assert "data.template: the template was stopped" in said
    assert time.monotonic() - begun < 20


def test_a_template_that_loops_only_on_long_rows_is_stopped(capsys, quick, recipe_file, tmp_path):
    """What a template is probed with when it is loaded is short: the limits hold for each rendering."""
    template = tmp_path / "late.jinja"
    template.write_text(ANSWERS + "{% if messages | length > 4 %}" + BOMBS["loops"] + "{% endif %}")
    assert "was stopped" in refused(capsys, "prepare", recipe_file, f"data.template={template}")


def test_chat_refuses_a_model_whose_template_does_not_end(capsys, quick, tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(ANSWERS + BOMBS["tilde"])
    assert "was stopped" in refused(capsys, "chat", folder, "--message", "tea")


def write_rows(path, long_one, kind):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": f"b{n}"}]} for n in range(9)]
    rows.insert(4, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": long_one}]})
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows if kind == "json" else {"data": rows}))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "wrapped"])
def test_a_row_of_100_megabytes_is_a_row_that_cannot_be_used(capsys, recipe_file, tmp_path, kind):
    path = write_rows(tmp_path / f"rows.{kind.replace('wrapped', 'json')}", "word " * 20_000_000, kind)
    begun = time.monotonic()
    said = refused(capsys, "prepare", recipe_file, f"data.source={path}")
    assert "too_large 1" in said
    assert time.monotonic() - begun < 20
    begun = time.monotonic()
    assert main(["prepare", str(recipe_file), f"data.source={path}", "data.invalid=skip"]) == 0
    assert time.monotonic() - begun < 20
    ledger = json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())
    assert ledger["skipped"] == {"too_large": 1}
    assert ledger["rows"]["read"] == 10


def test_a_row_of_a_megabyte_is_used(recipe_file, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", "word " * 200_000, "jsonl")
    assert main(["prepare", str(recipe_file), f"data.source={path}"]) == 0
    assert json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())["rows"]["skipped"] == 0


def test_a_row_after_a_line_that_is_too_long_keeps_its_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    largest = LARGEST_ROW
    # Bytes of the JSON text, quotes included; a line is read in pieces of LARGEST_ROW + 1 bytes.
    for length in (largest + 1, largest - 1, largest, 5 * largest // 2, 2 * (largest + 1)):
        path.write_text(f'1\n"{"x" * (length - 2)}"\n2\n')
        read = [row for chunk in read_files([("rows", path)], 0) for row in chunk.parsed()]
        assert [place for place, _ in read] == ["rows:1", "rows:2", "rows:3"], length
        assert read[0][1] == 1
        assert read[2][1] == 2
        assert isinstance(read[1][1], ValueError) == (length >= largest)
