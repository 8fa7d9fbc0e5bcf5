"""An exported folder for other tools and machines: version 4 of transformers, shards, permissions, no paths."""

import json
import os
import stat
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisft.exporting.engines import engines_folder
from minisft.exporting.export import ExportOptions, export
from minisft.exporting.model_folder import divide_weights, make_readable
from minisft.run_folder import load_run
from tests.tiny import write_tiny_model

VERSION_4 = engines_folder().absolute() / "transformers4" / "bin" / "python"
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": "tea with milk and more sugar, please"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
print(json.dumps([ids, model(torch.tensor([ids])).logits[0, -1].tolist(), model.generation_config.eos_token_id]))
"""


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture
def folder(answering_run, tmp_path):
    export(load_run(answering_run), tmp_path / "out", ExportOptions(engine="none"))
    return tmp_path / "out"


def test_the_configuration_has_the_keys_of_version_4(folder):
    config = config_of(folder)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"]
    assert config_of(folder, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("parameters", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 777.0}, 777.0, None),
        ({"rope_type": "linear", "rope_theta": 777.0, "factor": 2.0}, 777.0, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_both_versions_read_the_same_rotation(tmp_path, parameters, theta, scaling):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"rope_parameters": parameters}))
    make_readable(folder, "base")
    config = config_of(folder)
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)
    read = AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters
    assert {key: read[key] for key in parameters} == parameters


@pytest.mark.skipif(not VERSION_4.exists(), reason="transformers 4 is not installed: make engines")
def test_version_4_computes_the_same(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    parameters = {"rope_type": "default", "rope_theta": 50.0}
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"rope_parameters": parameters}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    make_readable(folder, "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "tea with milk and more sugar, please"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    done = subprocess.run([VERSION_4, "-c", PROGRAM, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    their_ids, their_logits, stops = json.loads(done.stdout.splitlines()[-1])
    assert their_ids == ids
    assert stops == model.generation_config.eos_token_id
    ours = model(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(their_logits), ours, atol=1e-4)
    config = config_of(folder)
    del config["rope_theta"]  # so that the test shows what the key is for
    (folder / "config.json").write_text(json.dumps(config))
    wrong = subprocess.run([VERSION_4, "-c", PROGRAM, folder], capture_output=True, text=True, check=False)
    assert not torch.allclose(torch.tensor(json.loads(wrong.stdout.splitlines()[-1])[1]), ours, atol=1e-4)


def test_layers_of_two_kinds_keep_their_own_rotation(tmp_path):
    parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "rope_parameters": parameters}))
    make_readable(tmp_path, "base")
    config = config_of(tmp_path)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_parameters"] == parameters
    assert "rope_scaling" not in config


def test_weights_are_divided(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    before = load_file(folder / "model.safetensors")
    divide_weights(folder, 20_000)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not (folder / "model.safetensors").exists()
    assert all(shard.stat().st_size < 50_000 for shard in shards)
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_files_are_readable_by_others(folder):
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if not path.name.startswith(".minisft"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_no_path_of_this_machine_stays(answering_run, lora_run, tmp_path):
    for run, merge in ((answering_run, True), (lora_run, True), (lora_run, False)):
        target = tmp_path / f"{run.parent.name}-{merge}"
        export(load_run(run), target, ExportOptions(engine="none", merge=merge))
        for path in target.iterdir():
            if path.suffix in (".json", ".md", ".jinja") and not path.name.startswith(".minisft"):
                assert str(run.parent) not in path.read_text(), path
    assert config_of(target, "adapter_config.json")["base_model_name_or_path"] == "model"
