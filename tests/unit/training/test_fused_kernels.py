"""Fused kernels are used only where they compute what the model's own code computes, and by this model alone.

The kernels of Liger and the compiled ones are played by functions here; test_liger.py and test_compiled_kernels.py have
the real ones.
"""

import json
from types import MethodType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe
from minisft.run_folder import RunFolder, read_kernels
from minisft.training import attention, kernels
from minisft.training.kernel_proof import Proof, compare
from minisft.training.kernels import find_obstacle, require_kernels, use_kernels
from tests.command import refused, run

CPU = torch.device("cpu")


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)


@pytest.fixture
def play(monkeypatch):
    """Let a function put in the kernels of Liger, which is as if installed, with a GPU."""

    def played(apply):
        monkeypatch.setattr(kernels, "apply_liger", apply)
        monkeypatch.setattr(kernels, "find_obstacle", lambda kernels, strategy, device: None)

    return played


def norms_times(factor, backward_factor=1.0):
    """Return a function that gives a model norms whose output and gradient are too large by factors."""

    def forward(self, hidden):
        exact = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)
        scaled = exact * backward_factor
        return scaled + (exact * factor - scaled).detach()

    def apply(model):
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = MethodType(forward, module)
        return ("LlamaRMSNorm",)

    return apply


def settings(asked="auto", **keys):
    return TrainingRecipe(kernels=asked, **{"precision": "fp32"} | keys)


def logits(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return model(ids, position_ids=ids, conversation_lengths=(20,), use_cache=False).logits


@pytest.mark.parametrize("asked", ["auto", "liger"])
@pytest.mark.parametrize(("precision", "strategy"), [("fp32", "vanilla"), ("bf16", "vanilla"), ("bf16", "zero2")])
def test_kernels_that_are_right_are_used(model, play, asked, precision, strategy):
    play(norms_times(1.0))
    choice = use_kernels(model, settings(asked, precision=precision, strategy=strategy), CPU)
    assert (choice.asked, choice.chosen, choice.replaced, choice.reason) == (asked, "liger", ("LlamaRMSNorm",), "")
    assert "forward" in vars(model.model.norm)
    assert choice.difference is not None
    assert choice.difference < (1e-5 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("wrong", [norms_times(1.001), norms_times(1.0, 1.001), norms_times(float("nan"))])
def test_kernels_that_are_wrong_are_not_used(model, play, wrong):
    expected = logits(model)
    play(wrong)
    choice = use_kernels(model, settings(), CPU)
    assert choice.chosen == "none"
    assert "compute something else than the code of LlamaForCausalLM" in choice.reason
    assert torch.equal(logits(model), expected)
    with pytest.raises(UserError, match=r"training\.kernels: .*something else[\s\S]*use auto or none"):
        use_kernels(model, settings("liger"), CPU)
    assert torch.equal(logits(model), expected)


def test_kernels_that_fail_are_not_used(model, play):
    def fail(model):
        raise RuntimeError("PTX was compiled with an unsupported toolchain")

    play(fail)
    assert "PTX was compiled" in use_kernels(model, settings(), CPU).reason
    with pytest.raises(UserError, match="PTX was compiled"):
        use_kernels(model, settings("liger"), CPU)


def test_a_model_without_kernels_is_named(model, play):
    play(lambda model: ())
    with pytest.raises(UserError, match="liger has no kernel for LlamaForCausalLM"):
        use_kernels(model, settings("liger"), CPU)


def test_the_comparison_leaves_the_model_as_it_was(model, play):
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    play(norms_times(1.0))
    use_kernels(model, settings(), CPU)
    assert model.training
    assert len(model.model.layers) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize(
    ("strategy", "precision", "lora", "autocast"),
    [("vanilla", "bf16", False, False), ("vanilla", "bf16", True, True), ("zero2", "bf16", False, False)],
)
def test_the_comparison_computes_as_training_does(model, strategy, precision, lora, autocast):
    """Vanilla in bf16 has bf16 weights, and autocast with LoRA only."""
    seen = []
    norm = model.model.norm
    plain = norm.forward

    def forward(hidden):
        seen.append((norm.weight.dtype, torch.is_autocast_enabled("cpu")))
        return plain(hidden)

    norm.forward = forward
    Proof(model, CPU, precision, strategy, lora=lora).run()
    half = torch.float32 if autocast else torch.bfloat16
    assert seen == [(torch.float32, False), (half, autocast)]


def test_every_kind_of_layer_is_compared(model):
    """The second layer is of another kind; a fault there shows, and the third is left out."""

    class OtherMLP(LlamaMLP):
        pass

    model.model.layers[1].mlp.__class__ = OtherMLP
    proof = Proof(model, CPU, "fp32")
    expected = proof.run()
    model.model.layers[2].mlp.forward = lambda hidden: hidden * 0
    assert compare(expected, proof.run())[0] == 0.0
    model.model.layers[1].mlp.forward = lambda hidden: hidden * 0
    assert compare(expected, proof.run())[0] > 0.1


def test_what_cannot_be_used_is_refused_before_anything_is_loaded(capsys, recipe_file, tmp_path):
    said = refused(capsys, "train", recipe_file, "training.kernels=liger")
    assert "training.kernels: Liger's kernels need a GPU" in said
    assert not (tmp_path / "run").exists()


def test_obstacles():
    assert find_obstacle("compile", "zero2", "cpu") is None
    require_kernels("auto", "zero3", "cpu")
    with pytest.raises(UserError, match="ZeRO-3 gathers"):
        require_kernels("compile", "zero3", "cuda")


def test_liger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"liger-kernel is not installed[\s\S]*pip install 'minisft\[gpu\]'"):
        require_kernels("liger", "vanilla", "cuda")


# --- the run's record, and resuming -----------------------------------------------------------------------


@pytest.fixture
def half_trained(capsys, recipe_file, tmp_path):
    status, _, said = run(capsys, "train", recipe_file, "training.max_steps=2", *CONSTANT)
    assert status == 0, said
    return RunFolder(tmp_path / "run")


CONSTANT = ("training.scheduler=constant", "training.warmup_ratio=0")


def record(run_folder, kernels):
    found = json.loads(run_folder.environment.read_text())
    run_folder.environment.write_text(
        json.dumps({name: one for name, one in found.items() if name != "kernels"} | kernels)
    )


def test_the_choice_is_recorded(half_trained):
    found = json.loads(half_trained.environment.read_text())["kernels"]
    assert (found["asked"], found["chosen"], found["replaced"]) == ("auto", "none", [])
    assert found["reason"] == "Liger's kernels need a GPU, and there is none here"
    assert read_kernels(half_trained) == "none"


def test_a_run_is_resumed_with_its_kernels_or_refused(capsys, recipe_file, half_trained):
    words = ("train", recipe_file, "training.max_steps=3", *CONSTANT, "--resume")
    record(half_trained, {"kernels": {"chosen": "liger"}})
    said = refused(capsys, *words)
    assert "training.kernels: this run was trained with the kernels of liger, and Liger's kernels need a GPU" in said
    record(half_trained, {})  # a run of a version without kernels
    assert run(capsys, *words)[0] == 0


def test_another_choice_is_another_run(capsys, recipe_file, half_trained):
    said = refused(capsys, "train", recipe_file, "training.max_steps=2", *CONSTANT, "training.kernels=none", "--resume")
    assert 'training.kernels is "auto" there, "none" here' in said


# --- Liger's way of putting kernels in --------------------------------------------------------------------


def test_other_models_of_the_process_keep_their_code(model, monkeypatch):
    """Liger exchanges functions and classes of transformers' module; here a rotary embedding that turns nothing."""
    import sys
    from types import SimpleNamespace

    from transformers.models.llama import modeling_llama

    other = LlamaForCausalLM(model.config)
    rotary, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm

    def liger_rotary(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    def apply(model, *, cross_entropy, fused_linear_cross_entropy):
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        vars(modeling_llama).update(apply_rotary_pos_emb=liger_rotary, LlamaRMSNorm=torch.nn.LayerNorm)
        model.model.norm.forward = MethodType(norm.forward, model.model.norm)

    patch = SimpleNamespace(_apply_liger_kernel_to_instance=apply)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    expected, others = logits(model), logits(other)
    assert kernels.apply_liger(model) == ("LlamaRMSNorm", "apply_rotary_pos_emb")
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert modeling_llama.LlamaRMSNorm is norm
    assert torch.equal(logits(other), others)
    assert not torch.allclose(logits(model), expected)
