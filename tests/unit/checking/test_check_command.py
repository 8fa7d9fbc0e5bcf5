"""`minisft check` as it is called: exit status, table, check.json, and what it leaves behind."""

import json
import os
import re
import signal

import pytest

from minisft.checking import run_checks
from minisft.checking.context import CheckContext
from minisft.checking.result import Check
from minisft.cli import main
from minisft.errors import StoppedError
from minisft.recipe import load_recipe
from minisft.run_start import open_run


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


def test_an_intact_recipe_passes_and_the_table_equals_check_json(recipe_file, report, capsys):
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


def test_json_on_stdout_is_that_of_check_json(recipe_file, report, capsys):
    assert main(["check", str(recipe_file), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report()


def test_a_recipe_can_be_changed_and_checked_again(recipe_file, report):
    """What was checked can be changed and checked again, and then prepared."""
    assert main(["check", str(recipe_file), "--quick"]) == 0
    assert main(["check", str(recipe_file), "--quick", "data.max_length=200"]) == 0
    assert report()["recipe"].count("max_length: 200") == 1
    assert main(["prepare", str(recipe_file)]) == 0


def test_an_error_of_a_library_fails_one_check_and_the_others_run(recipe_file):
    def raise_it(context):
        raise ValueError("no such thing")

    checks = (
        Check("a.broken", "raises", raise_it),
        *run_checks.CHECKS[:4],
        Check("b.after", "", raise_it, ("a.broken",)),
    )
    recipe = load_recipe(recipe_file)
    with open_run(recipe, prepares_only=True) as run:
        results = run_checks.run_checks(
            CheckContext(recipe, run), quick=True, on_result=lambda result: None, checks=checks
        )
    assert run_checks.as_report(recipe, results, quick=True)["status"] == "FAILED"
    found = {result.name: result for result in results}
    assert "ValueError: no such thing (raise_it, line" in found["a.broken"].detail
    assert found["data.rows"].status == "ok"
    assert found["b.after"].detail == "because a.broken failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_checks_that_a_signal_stops_leave_no_scratch_folder(recipe_file, number):
    seen = []

    def receive_signal(context):
        (context.scratch / "left").touch()
        seen.append(context.scratch)
        os.kill(os.getpid(), number)

    recipe = load_recipe(recipe_file)
    with open_run(recipe, prepares_only=True) as run, pytest.raises(KeyboardInterrupt):
        run_checks.run_checks(
            CheckContext(recipe, run), quick=True, on_result=print, checks=(Check("a.stopped", "", receive_signal),)
        )
    assert not seen[0].exists()


def test_a_check_whose_processes_are_stopped_leaves_nothing(recipe_file):
    """A stop signal to a process that takes steps is not a failed check: it ends all checks."""
    scratch_seen = []

    def stop(context):
        (context.scratch / "left").touch()
        scratch_seen.append(context.scratch)
        raise StoppedError("stopped as asked")

    recipe = load_recipe(recipe_file)
    with open_run(recipe, prepares_only=True) as run, pytest.raises(StoppedError):
        run_checks.run_checks(
            CheckContext(recipe, run), quick=True, on_result=print, checks=(Check("a.stopped", "", stop),)
        )
    assert not scratch_seen[0].exists()


def test_an_impossible_recipe_is_refused_before_anything_is_checked(recipe_file, capsys):
    assert main(["check", str(recipe_file), "training.optimizer=none"]) == 2
    assert "training.optimizer" in capsys.readouterr().err
