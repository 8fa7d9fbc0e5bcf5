"""Steps, checkpoints and generation that are broken in one way each: the check for it is the first to fail."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minisft.checking import overfit_check, scratch, strategy_checks
from minisft.console import console, error_console
from minisft.evaluation import generation
from minisft.training.trainer import SupervisedTokenTrainer
from tests.tiny import byte_tokenizer
from tests.unit.checking.examined import assert_first_to_fail, examined, steps_in_this_process


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Take the steps here, where a test can break what takes them."""
    for one in (console, error_console):
        monkeypatch.setattr(one, "quiet", one.quiet)  # the steps set it
    monkeypatch.setattr(strategy_checks, "run_steps_in_child", steps_in_this_process)


def after_the_steps(monkeypatch, spoil):
    """Let `spoil` do something to the scratch run when its steps are taken."""

    def take(recipe):
        steps_in_this_process(recipe)
        spoil(strategy_checks.RunFolder(strategy_checks.Path(recipe.output)))

    monkeypatch.setattr(strategy_checks, "run_steps_in_child", take)


def test_what_is_sound_is_ok(recipe_file):
    results = examined(recipe_file)
    assert {result.status for name, result in results.items() if not name.startswith("spend.")} == {"ok"}
    assert not (recipe_file.parent / "run" / ".check").exists()


@pytest.mark.long
def test_what_is_sound_is_ok_with_adapters_and_packing(recipe_file, tmp_path):
    """The frozen matrices are those of a model that can say something: scaled down ones could never be near zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    results = examined(recipe_file, f"model={tmp_path / 'model'}", "training.lora={rank: 8}", "training.packing=true")
    assert {result.status for name, result in results.items() if not name.startswith("spend.")} == {"ok"}


def test_gradients_that_are_summed_over_the_processes_and_not_averaged(recipe_file, monkeypatch):
    def take(recipe, own=SupervisedTokenTrainer.training_step):
        def doubled(self, model, inputs, num_items_in_batch=None):
            loss = own(self, model, inputs, num_items_in_batch)
            for weight in model.parameters():
                weight.grad *= 2
            return loss

        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(SupervisedTokenTrainer, "training_step", doubled)
            steps_in_this_process(recipe)

    monkeypatch.setattr(strategy_checks, "run_steps_in_child", take)
    assert "step 1: grad_norm" in assert_first_to_fail(examined(recipe_file, only="strategy.steps"), "strategy.steps")


def test_steps_that_do_not_reach_the_weights(recipe_file, monkeypatch):
    """The first step looks right: its loss and gradient are those of the weights that were loaded."""

    def take(recipe):
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
            steps_in_this_process(recipe)

    monkeypatch.setattr(strategy_checks, "run_steps_in_child", take)
    assert "step 2: loss" in assert_first_to_fail(examined(recipe_file, only="strategy.steps"), "strategy.steps")


def test_a_checkpoint_with_other_weights(recipe_file, monkeypatch):
    from safetensors.torch import load_file, save_file

    def spoil(run):
        file = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        save_file({**weights, name: weights[name] * 1.5}, file, metadata={"format": "pt"})

    after_the_steps(monkeypatch, spoil)
    assert "plain transformers" in assert_first_to_fail(
        examined(recipe_file, only="checkpoint.plain"), "checkpoint.plain"
    )


@pytest.mark.long
def test_a_checkpoint_with_another_template(recipe_file, monkeypatch):
    def spoil(run):
        template = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "chat_template.jinja"
        template.write_text(template.read_text(encoding="utf-8") + "!", encoding="utf-8")

    after_the_steps(monkeypatch, spoil)
    assert "chat template" in assert_first_to_fail(examined(recipe_file, only="checkpoint.plain"), "checkpoint.plain")


@pytest.mark.long
def test_a_checkpoint_whose_generation_stops_elsewhere(recipe_file, monkeypatch):
    def spoil(run):
        file = run.checkpoints / f"checkpoint-{scratch.RESUME_AT}" / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"eos_token_id": 5}))

    after_the_steps(monkeypatch, spoil)
    assert "generation config" in assert_first_to_fail(
        examined(recipe_file, only="checkpoint.plain"), "checkpoint.plain"
    )


def test_a_resumed_run_whose_optimizer_begins_anew(recipe_file, monkeypatch):
    """The step's loss and gradient norm are right, and the weights that come out are not."""

    def without_moments(trainer, run, resume_from=None, own=scratch.take_steps):
        if resume_from is not None:
            file = resume_from / "optimizer.pt"
            state = torch.load(file, weights_only=True)
            for moments in state["state"].values():
                moments["exp_avg"].zero_()
            torch.save(state, file)
        own(trainer, run, resume_from)

    monkeypatch.setattr(scratch, "take_steps", without_moments)
    assert "a weight differs" in assert_first_to_fail(
        examined(recipe_file, only="checkpoint.resume"), "checkpoint.resume"
    )


def test_generation_that_sees_its_padding(recipe_file, monkeypatch):
    def unmasked(prompts, shared, pad, device, own=generation._left_padded):
        tokens, mask = own(prompts, shared, pad, device)
        return tokens, torch.ones_like(mask)

    monkeypatch.setattr(generation, "_left_padded", unmasked)
    assert "generated" in assert_first_to_fail(examined(recipe_file, only="learning.recall"), "learning.recall")


def test_a_model_whose_weights_are_frozen_but_one(recipe_file, monkeypatch):
    def frozen(context, recipe, own=overfit_check.CheckContext.train_in_scratch):
        trainer = own(context, recipe)
        if recipe.output.endswith("learning"):
            for name, weight in trainer.model.named_parameters():
                weight.requires_grad_(name.endswith("norm.weight") and "layers" not in name)
        return trainer

    monkeypatch.setattr(overfit_check.CheckContext, "train_in_scratch", frozen)
    monkeypatch.setattr(overfit_check, "MOST_STEPS", 20)
    assert "after 20 steps" in assert_first_to_fail(examined(recipe_file, only="learning.recall"), "learning.recall")
