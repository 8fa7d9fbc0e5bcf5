"""The loss without all logits at once equals the loss with them, and so do the gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTNeoXConfig, LlamaConfig, PhiConfig

from minisft.training import attention, loss
from minisft.training.batching import PackedRow, pack_sequences
from minisft.training.model_call import PADDING_FREE_CALL

VOCABULARY = 300
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA = LlamaConfig(**SMALL, tie_word_embeddings=False)
TIED = LlamaConfig(**SMALL, tie_word_embeddings=True)
NEOX = GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, hidden_dropout=0.5)  # fmt: skip
# They have no plain logits: a soft cap, a scale, a bias.
CAPPED = Gemma2Config(
    **SMALL, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None, sliding_window=4096
)
SCALED = CohereConfig(**SMALL, logit_scale=0.3)
BIASED = PhiConfig(**SMALL)


def make(config):
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
    return model.float().train()


def make_row(conversations=3, tokens=20) -> PackedRow:
    random = np.random.default_rng(0)
    ids = [random.integers(0, VOCABULARY, tokens) for _ in range(conversations)]
    return pack_sequences([(one, np.where(np.arange(tokens) < 5, -100, one)) for one in ids])


def loss_and_gradients(model, row, how, factor=1.0):
    model.zero_grad()
    value = how(model, row) * factor
    value.backward()
    return value.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.fixture(autouse=True)
def chunks_of_seven(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ON_CPU", 7 * VOCABULARY)


@pytest.fixture
def all_logits_refused(monkeypatch):
    def refuse(model, row):
        raise AssertionError("all logits at once")

    monkeypatch.setattr(loss, "_loss_of_all_logits", refuse)


all_at_once = loss._loss_of_all_logits  # before a test replaces it


def plainly(model, row):
    return all_at_once(model, row, PADDING_FREE_CALL)[0]


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_equals_the_loss_of_all_logits(config, all_logits_refused):
    model, row = make(config), make_row()
    expected, by_weight = loss_and_gradients(model, row, plainly, 0.01)
    value, gradients = loss_and_gradients(model, row, loss.row_loss, 0.01)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, by_weight, rtol=1e-4, atol=1e-7)


def test_under_autocast_the_products_are_in_half_precision(all_logits_refused):
    model, row = make(TIED), make_row()
    _, exact = loss_and_gradients(model, row, plainly)
    with torch.autocast("cpu", torch.bfloat16):
        expected, theirs = loss_and_gradients(model, row, plainly)
        value, ours = loss_and_gradients(model, row, loss.row_loss)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() <= 1.2 * (theirs[name] - gradient).norm(), name


def test_a_frozen_output_layer_has_no_gradient(all_logits_refused):
    model, row = make(LLAMA), make_row()
    frozen = model.get_output_embeddings().weight
    frozen.requires_grad_(False)
    plainly(model, row).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    loss.row_loss(model, row).backward()
    assert frozen.grad is None
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_row_without_conversations_takes_part_in_the_backward(all_logits_refused):
    nothing = torch.zeros(0, dtype=torch.long)
    token = torch.zeros((1, 1), dtype=torch.long)
    value, gradients = loss_and_gradients(
        make(TIED), PackedRow(token, token, (1,), nothing, nothing, ()), loss.row_loss
    )
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("config", [CAPPED, SCALED, BIASED], ids=["capped", "scaled", "biased"])
def test_models_that_change_their_logits_have_all_of_them(config):
    model, row = make(config).eval(), make_row()
    expected, by_weight = loss_and_gradients(model, row, plainly)
    value, gradients = loss_and_gradients(model, row, loss.row_loss)
    assert value == expected
    torch.testing.assert_close(gradients, by_weight, rtol=0, atol=0)


def test_a_change_in_place_is_seen():
    model, row = make(LLAMA), make_row()
    own = model.forward

    def halved(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits.mul_(0.5)
        return output

    model.forward = halved
    with torch.no_grad():
        expected = plainly(model, row)
        assert loss.row_loss(model, row) == expected


def test_finding_out_touches_no_random_state(all_logits_refused):
    model, row = make(NEOX), make_row()
    torch.manual_seed(3)
    expected = plainly(model, row)
    torch.manual_seed(3)
    torch.testing.assert_close(loss.row_loss(model, row), expected, rtol=1e-6, atol=0)
    assert model.training


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that some operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *found, 0)
        return made


def test_memory_does_not_grow_with_the_row():
    model, row = make(LLAMA), make_row(conversations=40)
    with Largest() as whole:
        plainly(model, row).backward()
    with Largest() as chunks:
        loss.row_loss(model, row).backward()
    assert whole.elements == len(row.targets) * VOCABULARY == 40 * 15 * VOCABULARY
    assert chunks.elements < whole.elements / 4
    with torch.no_grad(), Largest() as chunks:
        loss.row_loss(model, row)
    assert chunks.elements < whole.elements / 4
