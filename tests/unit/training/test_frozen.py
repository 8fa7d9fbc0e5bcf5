"""Parameters that no loss reaches are found; those with a zero gradient and those of unrouted experts are not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from minisft.training.frozen import unreached_parameters
from tests.unit.training.test_probe import make

UNUSED = ["tower.weight", "tower.bias"]


def with_tower(**options):
    model = make("llama", **options)
    model.tower = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_plain_model_is_reached(kind, tied):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {"head_dim": 8}
    assert unreached_parameters(make(kind, tie_word_embeddings=tied, **sizes)) == []


def test_an_unused_module_is_named_and_a_frozen_one_is_not():
    model = with_tower()
    assert unreached_parameters(model) == UNUSED
    model.tower.bias.requires_grad_(False)
    assert unreached_parameters(model) == UNUSED[:1]


def test_gradient_checkpointing_hides_nothing():
    for reentrant in (True, False):
        model = with_tower().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert unreached_parameters(model) == UNUSED


def test_adapters_whose_gradient_is_zero_are_reached():
    model = get_peft_model(with_tower(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert any("lora_B" in name and not one.any() for name, one in model.named_parameters())
    assert unreached_parameters(model) == []


class Experts(nn.Module):
    """A feed-forward layer that runs some of its experts, and a module of each that does not exist for the loss."""

    def __init__(self, run):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.run = run
        for number in run:
            self.experts[number].unused = nn.Linear(1, 1, bias=False)

    def forward(self, states):
        return sum(self.experts[number](states) for number in self.run)


def test_experts_that_this_forward_does_not_run_are_not_frozen_unless_none_runs():
    model = make("llama")
    model.model.layers[0].mlp = Experts([1, 2])
    names = [f"model.layers.0.mlp.experts.{number}.unused.weight" for number in (1, 2)]
    assert unreached_parameters(model) == names
    model.model.layers[0].mlp.run = []
    model.model.layers[0].mlp.forward = lambda states: states
    assert len(unreached_parameters(model)) == 4 * 2 + 2


def test_layers_that_run_keep_nothing_from_being_frozen():
    """A layer of the same list reaches a parameter of the same name, but this layer runs and does not."""
    model = make("llama")
    layer = model.model.layers[1]
    layer.mlp.forward = lambda states: layer.mlp.down_proj(layer.mlp.gate_proj(states))
    assert unreached_parameters(model) == ["model.layers.1.mlp.up_proj.weight"]


def test_weights_gradients_random_states_and_the_mode_are_left_unchanged():
    model = with_tower()
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        unreached_parameters(model)
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_that_fails_is_left_to_the_probe():
    model = with_tower()
    model.forward = lambda **arguments: (_ for _ in ()).throw(AttributeError("no such thing"))
    assert unreached_parameters(model) == []


def test_experts_in_one_tensor_that_no_token_was_routed_to_stay_trainable():
    model = with_tower()
    model.model.layers[0].mlp.experts = nn.Module()
    model.model.layers[0].mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))
    assert unreached_parameters(model) == UNUSED
