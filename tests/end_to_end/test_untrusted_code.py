"""A model with Python code of its own: it runs where the user consents on this command line, and nowhere else."""

import json
import os

import pytest

from minisft.cli import main
from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_recipe, write_tiny_model

CODE = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path(os.environ["CANARY"]).touch()
class OwnConfig(LlamaConfig):
    model_type = "{type}"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Return the file that a stranger's code makes when it runs."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return path


def with_own_code(folder, name):
    """Turn a model folder into one whose classes are in a file of its own."""
    (folder / "own.py").write_text(CODE.format(type=name))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": name, "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def own_model(tmp_path, request):
    return with_own_code(write_tiny_model(tmp_path / "own"), "own_" + str(abs(hash(request.node.name))))


@pytest.fixture
def recipe(tmp_path, own_model, conversations):
    return write_recipe(tmp_path, own_model, conversations, "{max_steps: 1, precision: fp32}")


@pytest.fixture
def own_run(tmp_path, recipe, canary, capsys):
    """A trained run of such a model, whose recipe.yaml says that its code may run."""
    assert main(["train", str(recipe), "trust_remote_code=true"]) == 0, capsys.readouterr().err
    run = RunFolder(tmp_path / "run")
    assert "trust_remote_code: true" in run.recipe.read_text()
    canary.unlink()
    return run


def refused(capsys, *words):
    status = main([str(word) for word in words])
    said = capsys.readouterr().err
    assert status == 2, said
    assert "--trust-remote-code" in said
    assert "Traceback" not in said


def test_a_run_never_consents_for_the_user(capsys, own_run, canary, tmp_path):
    root = own_run.root
    for words in (
        ["evaluate", root],
        ["chat", root, "--message", "tea"],
        ["chat", own_run.model, "--message", "tea"],
        ["chat", own_run.recipe, "--message", "tea"],
        ["export", root, tmp_path / "exported", "--dtype", "bf16"],
        ["inspect", root],
        ["inspect", own_run.recipe],
        ["prepare", own_run.recipe, f"output={tmp_path / 'other'}"],
        ["plan", own_run.recipe, f"output={tmp_path / 'other'}"],
        ["check", own_run.recipe, "--quick"],
    ):
        refused(capsys, *words)
        assert not canary.exists(), words
    assert main(["report", str(root)]) == 0
    assert not canary.exists()


def test_the_user_consents_on_the_command_line(capsys, own_run, canary, tmp_path):
    root = str(own_run.root)
    for words in (
        ["chat", root, "--message", "tea", "--trust-remote-code"],
        ["export", root, str(tmp_path / "exported"), "--dtype", "bf16", "trust_remote_code=true"],
        ["inspect", root, "--trust-remote-code"],
        ["plan", str(own_run.recipe), "--trust-remote-code"],
    ):
        assert main(words) == 0, capsys.readouterr().err


def test_the_users_own_recipe_consents(capsys, recipe, canary):
    recipe.write_text(recipe.read_text() + "trust_remote_code: true\n")
    assert main(["prepare", str(recipe)]) == 0, capsys.readouterr().err


def test_without_consent_nothing_asks_on_stdin(tmp_path, recipe, canary):
    """An untrusted model: one message and status 2, though stdin would answer yes."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "minisft", "train", str(recipe)]
    done = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "--trust-remote-code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not canary.exists()


def test_a_worker_takes_no_consent_from_the_run_folder(own_run, canary, monkeypatch, capsys):
    """A worker reads the recipe in the run folder; the process that starts it passes the consent."""
    from minisft.errors import UserError
    from minisft.runner import train_as_worker

    with pytest.raises(UserError, match="consent"):
        train_as_worker(own_run.root, None)
    assert not canary.exists()


@pytest.mark.long
@pytest.mark.parametrize("verb", [["train"], ["check"]])
def test_workers_get_the_consent_of_their_command(recipe, canary, verb):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    words = [*verb, recipe, "training.processes=2", "training.batch_size=4"]
    done = minisft(*words, "--trust-remote-code")
    assert "consent" not in done.stderr
    assert canary.exists()
    if verb == ["train"]:
        assert done.returncode == 0, done.stderr
