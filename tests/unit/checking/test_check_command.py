"""`minisft check` as it is called: exit status, table, check.json, and what it leaves behind."""

import json
import re

import pytest

from minisft.checking import run_checks
from minisft.checking.result import Check
from minisft.cli import main
from minisft.errors import StoppedError


@pytest.fixture
def report(recipe_file):
    """Return a function that reads what the last check wrote."""
    return lambda: json.loads((recipe_file.parent / "run" / "check.json").read_text(encoding="utf-8"))


def table(printed):
    """(status, name, detail, fix) of each check in the printed table."""
    pattern = re.compile(
        r"^(ok|FAILED|not run) +([\w.]+) .*\n {28}(.*)\n(?: {28}Fix: (.*)\n)?", re.MULTILINE
    )  # fmt: skip
    return pattern.findall(printed)


def test_a_sound_recipe_is_ok_and_the_table_is_what_is_written(recipe_file, report, capsys):
    assert main(["check", str(recipe_file), "--quick"]) == 0
    written = report()
    assert written["status"] == "ok"
    assert written["quick"]
    assert table(capsys.readouterr().out) == [
        (one["status"], one["name"], one["detail"], one["mend"]) for one in written["checks"]
    ]
    assert [one["name"] for one in written["checks"]] == [one.name for one in run_checks.CHECKS]
    assert not (recipe_file.parent / "run" / ".check").exists()


def test_a_failure_is_status_2_and_names_the_check(recipe_file, report, capsys, tmp_path):
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf-8")
    assert main(["check", str(recipe_file), "--quick", f"data.template={template}"]) == 2
    printed, written = capsys.readouterr(), report()
    assert table(printed.out) == [(one["status"], one["name"], one["detail"], one["mend"]) for one in written["checks"]]
    assert written["status"] == "FAILED"
    assert printed.err.startswith("minisft: data.template: 1 of ")
    assert written["checks"][0]["mend"] in printed.err


def test_json_on_stdout_is_what_is_written(recipe_file, report, capsys):
    assert main(["check", str(recipe_file), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report()


def test_another_word_about_the_same_recipe_is_no_obstacle(recipe_file, report):
    """What was checked can be changed and checked again, and then prepared."""
    assert main(["check", str(recipe_file), "--quick"]) == 0
    assert main(["check", str(recipe_file), "--quick", "data.max_length=200"]) == 0
    assert report()["recipe"].count("max_length: 200") == 1
    assert main(["prepare", str(recipe_file)]) == 0


def test_an_error_of_a_library_is_one_failure_and_the_others_go_on(recipe_file, monkeypatch, report):
    def raise_it(context):
        raise ValueError("no such thing")

    checks = (
        Check("a.broken", "raises", raise_it),
        *run_checks.CHECKS[:4],
        Check("b.after", "", raise_it, ("a.broken",)),
    )
    monkeypatch.setattr(run_checks.run_checks, "__kwdefaults__", {"checks": checks})
    assert main(["check", str(recipe_file), "--quick"]) == 2
    found = {one["name"]: one for one in report()["checks"]}
    assert "ValueError: no such thing (raise_it, line" in found["a.broken"]["detail"]
    assert found["data.rows"]["status"] == "ok"
    assert found["b.after"]["detail"] == "because a.broken failed"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), StoppedError("stopped as asked")])
def test_a_check_that_is_stopped_leaves_nothing_and_says_nothing(recipe_file, monkeypatch, capsys, stop):
    def raise_it(context):
        (context.scratch / "left").touch()
        raise stop

    monkeypatch.setattr(run_checks.run_checks, "__kwdefaults__", {"checks": (Check("a.stopped", "", raise_it),)})
    assert main(["check", str(recipe_file), "--quick"]) == 1
    run = recipe_file.parent / "run"
    assert not (run / ".check").exists()
    assert not (run / "check.json").exists()
    assert "stopped" in capsys.readouterr().err


def test_what_stands_in_the_way_is_said_before_anything_is_checked(recipe_file, capsys):
    assert main(["check", str(recipe_file), "training.optimizer=none"]) == 2
    assert "training.optimizer" in capsys.readouterr().err
