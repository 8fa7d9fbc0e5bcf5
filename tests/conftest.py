"""What every test needs: one thread (tiny matrices), no hub, a cache of its own, a tiny model."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil

import pytest

from tests.browser import Browser, find_browser
from tests.tiny import write_conversations, write_recipe, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return the folder of a random Llama of 100,000 parameters with a byte-level tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """Return a ShareGPT file of 33 dialogues of 2 to 6 turns."""
    return write_conversations(tmp_path_factory.mktemp("data") / "talks.jsonl", 33)


@pytest.fixture
def recipe_file(tmp_path, tiny_model, conversations):
    """Return a recipe that trains the tiny model for 2 epochs of 4 steps."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\n"
        f"output: {tmp_path / 'run'}\n"
        f"data:\n  source: {conversations}\n  template: mistral\n  max_length: 256\n"
        "training:\n  epochs: 2\n  learning_rate: 1.0e-3\n  precision: fp32\n"
        "evaluation:\n  max_new_tokens: 8\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory, tiny_model, conversations):
    """Return the folder of a trained and scored run: checkpoints of steps 2 and 4, three held-out conversations."""
    from minisft.cli import main

    folder = tmp_path_factory.mktemp("scored")
    settings = "{max_steps: 4, save_every: 2, learning_rate: 1.0e-3, precision: fp32}"
    recipe = write_recipe(folder, tiny_model, conversations, settings)
    assert main(["train", str(recipe)]) == 0
    assert main(["evaluate", str(folder / "run")]) == 0
    assert main(["report", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run_folder(scored_run, tmp_path):
    """Return a copy of the trained and scored run, for a test to change."""
    return shutil.copytree(scored_run, tmp_path / "copied")


@pytest.fixture(scope="session")
def started_browser():
    """Return a running Chromium; a test that uses it is skipped where there is none."""
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here; MINISFT_BROWSER names one")
    browser = Browser(program)
    yield browser
    browser.close()
