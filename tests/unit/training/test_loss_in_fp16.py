"""In fp16 no row of the output layer loses a gradient: it is multiplied by the loss scale before it is rounded."""

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder
from minisft.training import attention, loss
from minisft.training.run_training import make_trainer
from minisft.training.zero import deepspeed_config, set_deepspeed_environment
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


@pytest.mark.parametrize(
    "strategy", ["zero2", pytest.param("zero1", marks=pytest.mark.long), pytest.param("zero3", marks=pytest.mark.long)]
)
def test_gradients_are_those_of_a_deepspeed_engine_in_fp16(strategy, tmp_path, monkeypatch):
    """The engine's own backward of all logits, ours of the supervised ones, and ours under torch's scaler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (address | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_engine_gradients, args=(strategy, tmp_path / "gradients.pt"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    engines = torch.load(tmp_path / "gradients.pt", weights_only=True)

    model, row = confident_model(), make_row()
    factor = 1 / len(row.targets)
    exact = plain_gradients(model, row, SCALE * factor)
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        share = loss.row_loss(model, row, backward_factor=SCALE * factor) * factor
    torch.amp.GradScaler("cpu", init_scale=SCALE).scale(share).backward()
    scaled = {name: weight.grad.float() for name, weight in model.named_parameters()}

    for found in (engines["all logits"], engines["ours"], scaled):
        assert max(relative_error(found, exact).values()) < 0.005
        assert lost_rows(found["lm_head.weight"], exact["lm_head.weight"]) == 0
    assert max(relative_error(engines["ours"], engines["all logits"]).values()) < 0.001
    assert lost_rows(engines["ours without the scale"]["lm_head.weight"], exact["lm_head.weight"]) > 0.5


def write_engine_gradients(strategy, file):
    """Write gradients, multiplied by the loss scale, of an engine whose weights are fp16; in a process of its own."""
    set_deepspeed_environment(on_cpu=True)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_grad

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for fast kernels, and torch has slow ones too
    deepspeed.init_distributed("gloo")
    model, row = confident_model(), make_row()
    factor = 1 / len(row.targets)
    config = deepspeed_config(strategy, precision="fp16", max_grad_norm=1e9, batch_size=1, offload=None, on_cpu=True)
    assert config is not None
    config["fp16"] |= {"initial_scale_power": 15}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config)[0]

    def all_logits():
        logits = loss.forward_row(engine, row)[0].float()
        return torch.nn.functional.cross_entropy(logits, row.targets, reduction="sum")

    losses = {
        "all logits": all_logits,
        "ours": lambda: loss.row_loss(engine, row, backward_factor=SCALE * factor),
        "ours without the scale": lambda: loss.row_loss(engine, row, backward_factor=factor),
    }
    found = {}
    for name, loss_of in losses.items():
        assert float(engine.optimizer.loss_scale) == SCALE
        engine.backward(loss_of() * factor)
        weights = engine.module.named_parameters()
        found[name] = {key: safe_get_full_grad(weight).float().clone() for key, weight in weights}
        engine.step()
    torch.save(found, file)


def make_prepared_trainer(recipe_file, model):
    from minisft.data.preparation import prepare

    recipe = load_recipe(recipe_file, [f"model={model}", "training.precision=fp32"])
    prepare(recipe)
    return make_trainer(recipe, RunFolder(Path(recipe.output)))
