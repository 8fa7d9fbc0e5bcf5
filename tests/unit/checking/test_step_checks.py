"""Steps, checkpoints and generation that are broken in one way each: the check for it is the first to fail."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minisft.checking import overfit_check, scratch
from minisft.run_folder import RunFolder, read_metrics
from tests.tiny import byte_tokenizer, write_tiny_model
from tests.unit.checking.examined import StepsInThisProcess, assert_first_to_fail, examined


def spoiled_after_steps(spoil):
    """Return a context class that calls `spoil` with the scratch run once its steps are taken."""

    class Spoiled(StepsInThisProcess):
        def take_steps(self, recipe):
            super().take_steps(recipe)
            spoil(RunFolder(Path(recipe.output)))

    return Spoiled


def test_check_passes_on_an_intact_recipe(recipe_file):
    results = examined(recipe_file, context=StepsInThisProcess)
    assert {result.status for name, result in results.items() if not name.startswith("spend.")} == {"ok"}
    assert not (recipe_file.parent / "run" / ".check").exists()


@pytest.mark.long
def test_check_passes_on_adapters_and_packing(recipe_file, tmp_path):
    """The frozen matrices are those of a model that can say something: scaled down ones could never be near zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    overrides = (f"model={tmp_path / 'model'}", "training.lora={rank: 8}", "training.packing=true")
    results = examined(recipe_file, *overrides, context=StepsInThisProcess)
    assert {result.status for name, result in results.items() if not name.startswith("spend.")} == {"ok"}


def test_gradients_that_are_summed_over_the_processes_and_not_averaged(recipe_file):
    """As the log has them then: with AdamW the losses stay as they are, whatever the gradients are multiplied by."""

    def spoil(run):
        doubled = [line | {"grad_norm": 2 * line["grad_norm"]} for line in read_metrics(run)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in doubled), encoding="utf-8")

    results = examined(recipe_file, only="strategy.steps", context=spoiled_after_steps(spoil))
    assert "step 1: grad_norm" in assert_first_to_fail(results, "strategy.steps")


def test_steps_that_do_not_reach_the_weights(recipe_file):
    """The first step looks right: its loss and gradient are those of the weights that were loaded."""

    class WithoutUpdates(StepsInThisProcess):
        def take_steps(self, recipe):
            with pytest.MonkeyPatch.context() as broken:
                broken.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
                super().take_steps(recipe)

    results = examined(recipe_file, only="strategy.steps", context=WithoutUpdates)
    assert "step 2: loss" in assert_first_to_fail(results, "strategy.steps")


def test_a_checkpoint_with_other_weights(recipe_file):
    from safetensors.torch import load_file, save_file

    def spoil(run):
        file = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        save_file({**weights, name: weights[name] * 1.5}, file, metadata={"format": "pt"})

    results = examined(recipe_file, only="checkpoint.plain", context=spoiled_after_steps(spoil))
    assert "plain transformers" in assert_first_to_fail(results, "checkpoint.plain")


@pytest.mark.long
def test_a_checkpoint_with_another_template(recipe_file):
    def spoil(run):
        template = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "chat_template.jinja"
        template.write_text(template.read_text(encoding="utf-8") + "!", encoding="utf-8")

    results = examined(recipe_file, only="checkpoint.plain", context=spoiled_after_steps(spoil))
    assert "chat template" in assert_first_to_fail(results, "checkpoint.plain")


@pytest.mark.long
def test_a_checkpoint_whose_generation_stops_elsewhere(recipe_file):
    def spoil(run):
        file = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"eos_token_id": 5}))

    results = examined(recipe_file, only="checkpoint.plain", context=spoiled_after_steps(spoil))
    assert "generation config" in assert_first_to_fail(results, "checkpoint.plain")


def test_a_resumed_run_that_ends_with_other_weights(recipe_file):
    """As where the optimizer starts over: the step's loss and gradient norm are right, and what comes out is not."""
    from safetensors.torch import load_file, save_file

    def spoil(run):
        file = scratch.resumed_run(run).checkpoints / f"checkpoint-{scratch.STEPS}" / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights[name][0, 0] += 1e-6
        save_file(weights, file, metadata={"format": "pt"})

    results = examined(recipe_file, only="checkpoint.resume", context=spoiled_after_steps(spoil))
    assert "a weight differs" in assert_first_to_fail(results, "checkpoint.resume")


class PaddingConfig(LlamaConfig):
    model_type = "padding_llama"


class PaddingModel(LlamaForCausalLM):
    """Sees the padding of the prompts that it continues, as if it were text."""

    config_class = PaddingConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None:
            attention_mask = torch.ones_like(attention_mask)
            position_ids = (attention_mask.cumsum(dim=1) - 1)[:, -input_ids.shape[1] :]
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


class FrozenConfig(LlamaConfig):
    model_type = "frozen_llama"


class FrozenModel(LlamaForCausalLM):
    """Learns in its last norm alone."""

    config_class = FrozenConfig

    def forward(self, *args, **kwargs):
        for weight in self.parameters():
            weight.requires_grad_(weight is self.model.norm.weight)
        return super().forward(*args, **kwargs)


for config, model in ((PaddingConfig, PaddingModel), (FrozenConfig, FrozenModel)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)


def model_of_class(model_class, folder):
    """Write the tiny model as one of another class; return the override of a recipe that takes it."""
    write_tiny_model(folder)
    settings = LlamaConfig.from_pretrained(folder).to_dict()
    settings.pop("model_type")
    model_class.from_pretrained(folder, config=model_class.config_class(**settings)).save_pretrained(folder)
    return f"model={folder}"


def test_generation_that_sees_its_padding(recipe_file, tmp_path):
    model = model_of_class(PaddingModel, tmp_path / "model")
    results = examined(recipe_file, model, only="learning.recall")
    assert "generated" in assert_first_to_fail(results, "learning.recall")


def test_a_model_whose_weights_are_frozen_but_one(recipe_file, tmp_path):
    model = model_of_class(FrozenModel, tmp_path / "model")
    in_20_steps = {"learning.recall": partial(overfit_check.can_overfit_batch, max_steps=20)}
    results = examined(recipe_file, model, only="learning.recall", runs=in_20_steps)
    assert "after 20 steps" in assert_first_to_fail(results, "learning.recall")
