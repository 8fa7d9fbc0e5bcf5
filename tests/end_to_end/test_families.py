"""Ten families: eight steps through the command line are those of a plain padded loop of transformers alone."""

import functools
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from minisft.run_folder import RunFolder
from minisft.training.batching import measure_lengths, steps_of_epoch
from tests.padded import padded_loop
from tests.tiny import minisft, write_conversations, write_recipe

SETTINGS = "{learning_rate: 1.0e-4, precision: fp32, weight_decay: 0.0, row_tokens: 120, max_steps: 8}"
FAMILIES = [
    "llama", "qwen3", "qwen3_5_text", "qwen3_next", "lfm2", "gemma2", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1",
]  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Return a function that makes the recipe of a family and the losses and norms of the padded loop, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        models = importlib.import_module("models")

    @functools.cache
    def of(kind):
        from datasets import load_from_disk

        folder = tmp_path_factory.mktemp(kind)
        models.write_model(kind, folder / "model")
        talks = write_conversations(folder / "talks.jsonl", 24)
        recipe = write_recipe(folder, folder / "model", talks, SETTINGS)
        done = minisft("train", recipe)
        assert done.returncode == 0, done.stderr
        run = RunFolder(folder / "run")
        rows = load_from_disk(str(run.dataset / "train"))
        lengths, steps = measure_lengths(rows).tokens, []
        for epoch in range(8):
            found = steps_of_epoch(lengths, global_batch=8, pack_tokens=None, seed=0, epoch=epoch)
            steps += [step.tolist() for step in found]
        logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        rates = [line["learning_rate"] for line in logged]
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
        return recipe, padded_loop(model, rows, steps[:8], rates), logged

    return of


@pytest.mark.long
@pytest.mark.parametrize(("processes", "strategy"), [(1, "vanilla"), (2, "vanilla"), (1, "zero2"), (2, "zero2")])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_takes_the_steps_of_the_padded_loop(family, tmp_path, kind, processes, strategy):
    recipe, expected, logged = family(kind)
    if (processes, strategy) != (1, "vanilla"):  # that run made the recipe's data
        done = minisft(
            "train", recipe, f"output={tmp_path / 'run'}", f"training.strategy={strategy}",
            f"training.processes={processes}", f"training.batch_size={8 // processes}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        logged = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert len(logged) == 8
    np.testing.assert_allclose([(line["loss"], line["grad_norm"]) for line in logged], expected, rtol=2e-4)
