"""`training.sequence_parallel`: two processes that share every row take the steps of a single one."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from minisft.row_losses import read_row_losses
from minisft.run_folder import RunFolder
from tests.padded import logged_steps
from tests.tiny import minisft, write_recipe

SETTINGS = "{learning_rate: 1.0e-3, precision: fp32, row_tokens: 121, max_steps: 4, packing: true, eval_every: 2}"


def train(recipe, output, *overrides):
    done = minisft("train", recipe, f"output={output}", "training.batch_size=2", *overrides)
    assert done.returncode == 0, done.stderr
    return RunFolder(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model, conversations):
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, tiny_model, conversations, SETTINGS)
    return recipe, train(recipe, folder / "run")


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("vanilla", marks=pytest.mark.long)])
def test_two_processes_that_share_rows_take_the_steps_of_one(alone, tmp_path, strategy):
    recipe, expected = alone
    sharing = ("training.processes=2", "training.sequence_parallel=2", f"training.strategy={strategy}")
    run = train(recipe, tmp_path / "run", *sharing)
    # losses, gradient norms and held-out losses
    keys = ("loss", "grad_norm", "eval_loss", "tokens", "supervised_tokens")
    found, reference = ([[line.get(key, 0.0) for key in keys] for line in logged_steps(r)] for r in (run, expected))
    assert len(found) == len(reference)
    np.testing.assert_allclose(found, reference, rtol=2e-4)
    # the loss of every row
    ours, theirs = read_row_losses(run.row_losses), read_row_losses(expected.row_losses)
    assert ours["row"].tolist() == theirs["row"].tolist()
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-4)
    # weights
    final, whole = (AutoModelForCausalLM.from_pretrained(r.model).state_dict() for r in (run, expected))
    for name, weight in whole.items():
        np.testing.assert_allclose(final[name], weight, atol=1e-5)


def test_more_shares_than_processes_are_refused(tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{processes: 2, sequence_parallel: 4}")
    done = minisft("train", recipe)
    assert done.returncode == 2
    assert "training.sequence_parallel: 4 does not divide training.processes, which is 2" in done.stderr
