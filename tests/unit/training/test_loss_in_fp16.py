"""In fp16 no row of the output layer loses a gradient: it is multiplied by the loss scale before it is rounded."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder
from minisft.training import attention, loss
from minisft.training.run_training import make_trainer
from tests.tiny import byte_tokenizer
from tests.unit.training.test_loss_in_chunks import make_row

VOCABULARY, SCALE = 32768, 2.0**15
SMALLEST_NORMAL = torch.finfo(torch.float16).tiny


def confident_model():
    """A model that is certain of token 0: all other probabilities are about 5e-9, which fp16 rounds to zero."""
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
    with torch.no_grad():  # every hidden state is close to a vector of ones, along which token 0 has a logit of 19
        model.get_input_embeddings().weight.normal_().add_(3)
        model.get_output_embeddings().weight.normal_(0, 0.5 / 32**0.5)[0] = 20 / 32
    return model.float().train()


def plain_gradients(model, row, factor):
    """The gradients of all logits at once, in the format of the weights."""
    model.zero_grad()
    logits = loss.forward_row(model, row)[0].float()
    (torch.nn.functional.cross_entropy(logits, row.targets, reduction="sum") * factor).backward()
    return {name: weight.grad.float() for name, weight in model.named_parameters()}


def lost_rows(found, exact):
    """The share of the rows of an output layer that fp16 can hold, and that have no gradient."""
    held = exact.abs().amax(1) > SMALLEST_NORMAL
    assert held.sum() > VOCABULARY / 2
    return float((found[held] == 0).all(1).float().mean())


def relative_error(found, exact):
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast and GradScaler", "fp16 weights, as DeepSpeed's"])
def test_gradients_are_those_of_all_logits_after_the_loss_scale(autocast):
    model, row = confident_model(), make_row()
    factor = 1 / len(row.targets)
    exact = plain_gradients(model, row, SCALE * factor)
    if not autocast:
        model.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        expected = plain_gradients(model, row, SCALE * factor)
        model.zero_grad()
        value = loss.row_loss(model, row, backward_factor=SCALE * factor) * factor
    torch.amp.GradScaler("cpu", init_scale=SCALE).scale(value).backward()
    found = {name: weight.grad.float() for name, weight in model.named_parameters()}
    assert lost_rows(found["lm_head.weight"], exact["lm_head.weight"]) == 0
    errors, their_errors = relative_error(found, exact), relative_error(expected, exact)
    for name, error in errors.items():
        assert error <= 1.2 * their_errors[name] + 1e-4, name


def test_a_factor_that_is_not_applied_later_changes_precision_alone():
    model, row = confident_model(), make_row()
    with torch.autocast("cpu", torch.float16):
        value = loss.row_loss(model, row, backward_factor=512.0)
    (value * 256).backward()
    found = model.get_output_embeddings().weight.grad.clone()
    exact = plain_gradients(model, row, 256)["lm_head.weight"]
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_the_step_of_the_trainer_passes_the_loss_scale(recipe_file, tmp_path):
    """The scaler's path on a CPU: autocast inside the forward, where accelerate puts it, and torch's GradScaler."""
    model = tmp_path / "confident"
    confident_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    trainer = make_prepared_trainer(recipe_file, model)
    batch = next(iter(trainer.get_train_dataloader()))

    trainer.training_step(trainer.model, batch)
    exact = {name: weight.grad * SCALE for name, weight in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    trainer.args.fp16 = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    trainer.model.forward = torch.autocast("cpu", torch.float16)(trainer.model.forward)
    trainer.training_step(trainer.model, batch)
    found = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    assert lost_rows(found["lm_head.weight"], exact["lm_head.weight"]) == 0
    assert max(relative_error(found, exact).values()) < 0.02


def make_prepared_trainer(recipe_file, model):
    from minisft.data.preparation import prepare

    recipe = load_recipe(recipe_file, [f"model={model}", "training.precision=fp32"])
    prepare(recipe)
    return make_trainer(recipe, RunFolder(Path(recipe.output)))
