"""The completion script, asked as bash asks it."""

import shutil
import subprocess

import pytest

from minisft.cli import VERBS
from minisft.recipe_schema import recipe_keys
from tests.command import refused, run

# Calls the function that `complete` registered for minisft, with the words of a line of which the last is completed.
ASK = """
source "$SCRIPT"
compopt() { echo "compopt $*"; }
spec=$(complete -p minisft)
asked=${spec##*-F }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMPREPLY=()
"${asked%% *}" minisft "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(tmp_path, capsys):
    """Return a function that completes the last of some words in bash, in a folder with `recipe.yaml` and `runs/`."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    script = tmp_path / "minisft.bash"
    script.write_text(run(capsys, "completion", "bash").out)
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    (folder / "recipe.yaml").touch()

    def ask(*words):
        command = ["bash", "--norc", "-c", ASK, "bash", "minisft", *words]
        done = subprocess.run(
            command, cwd=folder, env={"SCRIPT": str(script), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.stdout.split("\n")[:-1]

    return ask


def test_commands(complete):
    assert set(VERBS) <= set(complete(""))
    assert complete("ex") == ["export"]


def test_options_and_their_choices(complete):
    assert complete("evaluate", "--f") == ["--follow"]
    assert complete("export", "run", "out", "--to", "") == ["folder", "gguf", "ollama"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]


def test_keys_of_the_recipe_without_a_space_after_them(complete):
    assert complete("train", "recipe.yaml", "training.ep") == ["compopt -o nospace", "training.epochs="]
    assert complete("train", "training.lora.d") == ["compopt -o nospace", "training.lora.dropout="]
    found = complete("demo", "")
    assert {
        f"{key}="
        for key in recipe_keys()
        if key not in ("data", "training", "evaluation", "training.lora", "evaluation.judge")
    } <= set(found)
    assert "training=" not in found


def test_files_and_folders(complete):
    assert complete("train", "rec") == ["recipe.yaml"]
    assert complete("watch", "ru")[-1] == "runs"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_that_the_shell_can_read(shell, capsys, tmp_path):
    script = run(capsys, "completion", shell).out
    assert "training.epochs=" in script
    assert "minisft" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is not read")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_another_shell_is_refused(capsys):
    assert "tcsh" in refused(capsys, "completion", "tcsh")
    refused(capsys, "completion")
