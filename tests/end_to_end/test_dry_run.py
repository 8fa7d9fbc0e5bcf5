"""`minisft plan --dry-run`: what it finds in a model with faults that only a GPU shows, and what passes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from minisft.planning.fake_gpu import build_device, torch_folder
from tests.command import refused, run
from tests.tiny import byte_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class PlantedConfig(LlamaConfig):
    model_type = "planted"


class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        if "buffer" in config.faults:
            self.register_buffer("uncounted", torch.zeros(1 << 28), persistent=False)
        if "cpu" in config.faults:
            self.factors = torch.ones(2)  # neither parameter nor buffer: it stays on the CPU
        if "fp32" in config.faults:
            for layer in self.model.layers:
                attention = layer.self_attn
                for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                    part.register_forward_hook(lambda module, inputs, output: output.float())
                attention.o_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].bfloat16())
        self.post_init()

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        if not output.logits.is_cuda:
            return output
        if "item" in self.config.faults:
            output.logits.sum().item()
        if "cpu" in self.config.faults:
            output.logits = output.logits * self.factors[:1]
        if "rank" in self.config.faults and torch.distributed.get_rank() == 1:
            torch.distributed.all_reduce(torch.ones(3, device=output.logits.device))
        return output
"""

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None and not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def line_of(text):
    return next(number for number, line in enumerate(MODEL_CODE.splitlines(), 1) if text in line)


@pytest.fixture
def planted(tmp_path, recipe_file):
    """Makes the words of a plan for a model with faults; the model has no weights."""

    def words(*faults, processes=1):
        folder = tmp_path / "planted"
        folder.mkdir()
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder)
        config = {
            "model_type": "planted", "architectures": ["PlantedForCausalLM"], "faults": list(faults),
            "auto_map": {"AutoConfig": "modeling_planted.PlantedConfig",
                         "AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM"},
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
            "eos_token_id": 1, "tie_word_embeddings": True,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "modeling_planted.py").write_text(MODEL_CODE, encoding="utf-8")
        return ("plan", recipe_file, f"model={folder}", f"output={tmp_path / 'planted-run'}", "training.precision=bf16",
                "--gpu", "h100", "--count", processes, "--dry-run", "--trust-remote-code")  # fmt: skip

    return words


def faults_of(capsys, words):
    status, out, err = run(capsys, *words, "--json")
    found = json.loads(out)["dry_run"]
    assert found["dry_run"] == "failed", found
    assert status == 2
    assert found["faults"][0]["problem"] in err
    assert "Traceback" not in err
    return {fault["kind"]: fault for fault in found["faults"]}, found


def test_four_faults_of_one_model_are_all_found(capsys, planted):
    """An `.item()` for every row, fp32 queries in bf16, a collective of one rank, and an uncounted 1 GB."""
    faults, found = faults_of(capsys, planted("item", "fp32", "rank", "buffer", processes=2))
    assert set(faults) == {"wait", "attention", "collective", "memory"}
    assert f"modeling_planted.py:{line_of('.item()')}" in faults["wait"]["where"]
    assert "fp32 under bf16" in faults["attention"]["problem"]
    assert "allreduce_(float32[3]) on rank 1" in faults["collective"]["problem"]
    assert f"modeling_planted.py:{line_of('all_reduce')}" in faults["collective"]["where"]
    assert found["kept_bytes"] - found["predicted_kept_bytes"] == pytest.approx(4 << 28, rel=0.01)


def test_a_tensor_of_the_cpu_in_the_step_is_found(capsys, planted):
    faults, _ = faults_of(capsys, planted("cpu"))
    assert set(faults) == {"device"}
    assert f"modeling_planted.py:{line_of('self.factors[:1]')}" in faults["device"]["where"]


def test_a_recipe_with_its_data_passes(capsys, recipe_file):
    words = ("plan", recipe_file, "training.precision=bf16", "training.max_grad_norm=1.0", "--gpu", "4090", "--dry-run")
    status, out, err = run(capsys, *words)
    assert status == 0, err
    assert "dry run of vanilla: passed; 3 steps of 1 row(s)" in out
    assert "attention: torch_varlen bfloat16" in out
    assert "waits for the GPU 0 times in the rows of a step" in out


def test_a_plan_for_a_cpu_has_no_dry_run(capsys, recipe_file):
    assert "for a CPU" in refused(capsys, "plan", recipe_file, "--gpu", "cpu", "--dry-run")


def test_without_a_compiler_the_message_says_what_to_install(capsys, recipe_file, monkeypatch, tmp_path):
    if build_device(torch_folder(), tmp_path) is None:
        pytest.skip("this torch is built with CUDA and needs no compiler")
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    words = ("plan", recipe_file, "--gpu", "h100", "--dry-run")
    assert "cannot be run" in refused(capsys, *words)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(capsys, *words)
    assert "no C++ compiler" in said
    assert "apt install g++" in said


@pytest.fixture
def wide(tmp_path, recipe_file):
    """Makes the words of a dry run in which activations decide the peak: no weights, and assumed rows of 8,192 tokens."""
    folder = tmp_path / "wide"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(tokenizer),
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def words(*more):
        return ("plan", recipe_file, f"model={folder}", f"output={tmp_path / 'wide-run'}", "training.row_tokens=8192",
                f"data.source={tmp_path / 'none.jsonl'}", "data.max_length=8192", "training.precision=bf16",
                "--gpu", "h100", "--count", "1", "--dry-run", "--json", *more)  # fmt: skip

    return words


def passed(capsys, words):
    status, out, err = run(capsys, *words)
    assert status == 0, err
    planned = json.loads(out)
    assert planned["dry_run"]["dry_run"] == "passed", planned["dry_run"]
    return planned, planned["dry_run"]


@pytest.mark.long
def test_what_liger_saves_is_tracked_and_predicted(capsys, wide):
    plain, liger = (passed(capsys, wide(f"training.kernels={kernels}")) for kernels in ("none", "liger"))
    assert (plain[0]["kernels"], liger[0]["kernels"]) == ("none", "liger")
    tracked, predicted = (plain[1][key] - liger[1][key] for key in ("peak_bytes", "predicted_bytes"))
    assert predicted > 128 << 20
    assert tracked > 0.95 * predicted  # the model's own norms have temporary tensors in fp32 too
    assert liger[1]["peak_bytes"] == pytest.approx(liger[1]["predicted_bytes"], rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize(("fault", "kind", "processes"), [
    ("item", "wait", 1), ("fp32", "attention", 1), ("buffer", "memory", 1), ("rank", "collective", 2),
])  # fmt: skip
def test_each_fault_alone_is_the_only_one(capsys, planted, fault, kind, processes):
    faults, _ = faults_of(capsys, planted(fault, processes=processes))
    assert set(faults) == {kind}


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_included_recipes_pass(capsys, tmp_path, tiny_model, conversations, recipe, lora):
    """With a tiny model and other data, since theirs are on the hub."""
    words = ("plan", recipe, f"model={tiny_model}", f"output={tmp_path / 'run'}", f"data.source={conversations}",
             "data.format=sharegpt", "data.template=mistral", "training.strategy=vanilla",
             *(["training.lora.rank=4"] if lora else []), "--gpu", "h100", "--count", 2, "--dry-run", "--json")  # fmt: skip
    status, out, err = run(capsys, *words)
    assert status == 0, err
    found = json.loads(out)["dry_run"]
    assert found["dry_run"] == "passed"
    assert not any(wait["in_rows"] for wait in found["waits"])
    assert found["attention"].keys() == {"torch_varlen bfloat16"}
    assert any(operation.startswith("allreduce_") for operation in found["collectives"])


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_passes_or_names_deepspeeds_call(capsys, recipe_file, strategy):
    words = ("plan", recipe_file, f"training.strategy={strategy}", "training.precision=bf16", "--gpu", "h100",
             "--count", 8, "--dry-run", "--json")  # fmt: skip
    status, out, err = run(capsys, *words)
    assert status == 0, err
    planned = json.loads(out)
    assert len(planned["strategies"]) == 7
    found = planned["dry_run"]
    if found["dry_run"] == "not possible":
        assert "deepspeed/" in found["reason"]
        return
    assert found["dry_run"] == "passed"
    assert any(operation.startswith("_allgather_base_(bfloat16") for operation in found["collectives"])


@pytest.mark.long
def test_fp16_passes(capsys, recipe_file):
    """Its loss scale is read once a step, before the first row."""
    words = ("plan", recipe_file, "training.precision=fp16", "--gpu", "h100", "--count", 2, "--dry-run", "--json")
    _, found = passed(capsys, words)
    assert found["attention"].keys() == {"torch_varlen float16"}
    assert not any(wait["in_rows"] for wait in found["waits"])


@pytest.mark.long
@pytest.mark.parametrize("words", [
    ("strategy=zero2", "precision=fp16"),
    ("strategy=zero2", "precision=bf16", "offload=optimizer"),
    ("strategy=zero3", "precision=bf16", "offload=parameters"),
], ids=" ".join)  # fmt: skip
def test_what_deepspeed_cannot_do_without_a_gpu_is_named(capsys, recipe_file, words):
    more = [f"training.{word}" for word in words]
    status, out, err = run(capsys, "plan", recipe_file, *more, "--gpu", "h100", "--count", 2, "--dry-run", "--json")
    assert status == 0, err
    found = json.loads(out)["dry_run"]
    if found["dry_run"] == "not possible":
        assert set(found) == {"dry_run", "reason", "strategy"}
        assert re.search(r"(deepspeed|minisft)/.*\.py:\d+", found["reason"])
        return
    assert found["dry_run"] == "passed"
