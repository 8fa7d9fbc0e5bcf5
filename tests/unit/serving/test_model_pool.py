"""The models of a run by name, their sizes, and adapters on the run's base."""

import json
import shutil

import pytest
import torch

from minisft.errors import UserError
from minisft.models import load_model
from minisft.run_folder import RunFolder
from minisft.serving.model_pool import LoadedModel, ModelPool


def size_of(model):
    return sum(weight.numel() * weight.itemsize for weight in model.parameters())


def test_a_run_has_its_final_model_its_base_and_its_checkpoints(run_folder):
    pool = ModelPool(str(run_folder))
    models = pool.models()
    assert list(models) == ["final", "base", "checkpoint-4", "checkpoint-2"]
    for model in models.values():
        loaded = pool.load(model)
        assert not loaded.model.training
        assert loaded.size == size_of(loaded.model)
        assert pool.context(model) == 512
    base, final = (pool.load(models[name]).model.state_dict() for name in ("base", "final"))
    name = "model.embed_tokens.weight"
    assert not torch.equal(base[name], final[name])
    # A run that trains gets further checkpoints, and loses its oldest ones.
    shutil.copytree(run_folder / "checkpoints/checkpoint-4", run_folder / "checkpoints/checkpoint-6")
    shutil.rmtree(run_folder / "checkpoints/checkpoint-2")
    assert list(pool.models()) == ["final", "base", "checkpoint-6", "checkpoint-4"]
    with pytest.raises(UserError):
        pool.load(models["checkpoint-2"])


def test_a_run_without_a_model_yet_has_its_base_and_the_recipes_template(run_folder):
    whole = ModelPool(str(run_folder)).encoder
    shutil.rmtree(run_folder / "model")
    shutil.rmtree(run_folder / "checkpoints")
    pool = ModelPool(str(run_folder))
    assert list(pool.models()) == ["base"]
    assert pool.encoder.stop_token_ids == whole.stop_token_ids
    assert pool.encoder.template_name.split("-")[0] == whole.template_name.split("-")[0] == "mistral"


def test_a_folder_is_the_final_model(tiny_model, tmp_path):
    from tests.tiny import byte_tokenizer, write_tiny_model

    with pytest.raises(UserError, match="template"):
        ModelPool(str(tiny_model))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    pool = ModelPool(str(write_tiny_model(tmp_path / "model", 0, tokenizer)))
    assert list(pool.models()) == ["final"]
    with pytest.raises(UserError):
        ModelPool(str(tmp_path / "nothing"))


def test_another_base_model_than_the_runs_is_refused(run_folder):
    record = RunFolder(run_folder).base_model
    record.write_text(json.dumps({"origin": "elsewhere", "fingerprint": "0"}))
    pool = ModelPool(str(run_folder))
    with pytest.raises(UserError, match="began with elsewhere"):
        pool.load(pool.models()["base"])
    assert pool.load(pool.models()["final"])


def test_adapters_are_served_on_the_runs_base(run_folder, tiny_model):
    from peft import LoraConfig, get_peft_model

    base = load_model(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder = run_folder / "checkpoints/checkpoint-6"
    adapted.save_pretrained(folder)
    pool = ModelPool(str(run_folder))
    loaded = pool.load(pool.models()["checkpoint-6"])
    assert loaded.size == size_of(loaded.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(loaded.model(ids).logits, adapted(ids).logits, atol=1e-6)


def test_a_model_above_the_users_limit_is_refused(run_folder):
    pool = ModelPool(str(run_folder), memory=1000)
    with pytest.raises(UserError, match="--memory"):
        pool.load(pool.models()["final"])


def test_the_least_recently_used_are_evicted_but_none_in_use(run_folder):
    pool = ModelPool(str(run_folder), memory=30)
    for name in ("a", "b", "c"):
        pool.add(LoadedModel(name, None, 10))  # type: ignore[arg-type]
    pool.use("a")
    assert pool.evictable(10, 0, []) == ["b"]
    assert pool.evictable(10, 0, ["b"]) == ["c"]
    assert pool.evictable(20, 0, ["b"]) == ["c", "a"]
    assert pool.evictable(20, 10, ["b"]) is None
    assert pool.evictable(99, 0, ["b"]) is None
    assert pool.evictable(99, 0, []) == ["b", "c", "a"]  # larger than the limit, but alone
