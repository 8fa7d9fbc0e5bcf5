"""One GPU takes the steps of the padded loop on a CPU, resumes to the same bits, and needs the memory of its plan."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minisft.evaluation.backends import TransformersModel
from minisft.models import load_model
from minisft.run_folder import RunFolder
from minisft.training.attention import Shape, select_kernel
from tests.padded import conversations_of_steps, logged_steps, padded_loop, train_rows
from tests.tiny import byte_tokenizer, minisft, write_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

# With more than one GPU, each process of a test takes the first.
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}
SETTINGS = (
    "{learning_rate: 1.0e-3, weight_decay: 0.0, row_tokens: 120, max_steps: 8, scheduler: constant, warmup_ratio: 0}"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("gpu"), tiny_model, conversations, SETTINGS)


def ran(*words, **environment):
    done = minisft(*words, timeout=480, **(ONE_GPU | environment))
    assert done.returncode == 0, done.stderr
    return done


def train(recipe, output, *words):
    ran("train", recipe, f"output={output}", *words)
    return RunFolder(output)


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_the_steps_are_those_of_a_padded_loop(recipe, tmp_path, tiny_model, precision, tolerance, packing):
    run = train(recipe, tmp_path / "run", f"training.precision={precision}", f"training.packing={packing}")
    logged = logged_steps(run)
    steps = conversations_of_steps(run, global_batch=8, pack_tokens=256 if packing == "true" else None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = padded_loop(model, train_rows(run), steps, [line["learning_rate"] for line in logged])
    assert [line["loss"] for line in logged] == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    assert [line["grad_norm"] for line in logged] == pytest.approx([norm for _, norm in expected], rel=10 * tolerance)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 2e-3)])
def test_zero_takes_the_steps_of_vanilla(recipe, tmp_path, strategy, precision, tolerance):
    pytest.importorskip("deepspeed")
    words = f"training.precision={precision}"
    plain = train(recipe, tmp_path / "plain", words)
    sharded = train(recipe, tmp_path / "sharded", words, f"training.strategy={strategy}")
    losses = [[line["loss"] for line in logged_steps(run)] for run in (sharded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_with_deterministic_kernels_has_the_same_bits(recipe, tmp_path, precision):
    words = f"training.precision={precision}", "training.deterministic=true"
    whole = train(recipe, tmp_path / "whole", *words)
    halves = train(recipe, tmp_path / "halves", *words, "training.max_steps=4")
    train(recipe, tmp_path / "halves", *words, "--resume")
    ours, expected = (load_file(run.model / "model.safetensors") for run in (halves, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def require_package(kernels):
    if kernels == "liger":
        pytest.importorskip("liger_kernel")


def kernels_of(run):
    return json.loads(run.environment.read_text(encoding="utf-8"))["kernels"]


@pytest.mark.parametrize("kernels", ["liger", "compile"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("key", ["packing=true", "gradient_checkpointing=true", "lora={rank: 4}"])
def test_kernels_take_the_steps_of_none(recipe, tmp_path, kernels, precision, tolerance, key):
    require_package(kernels)
    words = f"training.precision={precision}", f"training.{key}"
    plain = train(recipe, tmp_path / "plain", *words, "training.kernels=none")
    fused = train(recipe, tmp_path / "fused", *words, f"training.kernels={kernels}")
    assert kernels_of(fused)["replaced"] == ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"]
    losses = [[line["loss"] for line in logged_steps(run)] for run in (fused, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.parametrize(("kernels", "strategy"), [("liger", "zero2"), ("liger", "zero3"), ("compile", "zero2")])
def test_kernels_under_zero_take_the_steps_of_none(recipe, tmp_path, kernels, strategy):
    require_package(kernels)
    pytest.importorskip("deepspeed")
    words = "training.precision=bf16", f"training.strategy={strategy}"
    plain = train(recipe, tmp_path / "plain", *words, "training.kernels=none")
    fused = train(recipe, tmp_path / "fused", *words, f"training.kernels={kernels}")
    losses = [[line["loss"] for line in logged_steps(run)] for run in (fused, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_auto_has_the_kernels_of_liger_and_keeps_them(recipe, tmp_path):
    require_package("liger")
    run = train(recipe, tmp_path / "run", "training.max_steps=4")
    assert kernels_of(run)["chosen"] == "liger"
    assert kernels_of(train(recipe, tmp_path / "run", "--resume"))["chosen"] == "liger"


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 96])
@pytest.mark.parametrize("head_size", [64, 128])
def test_attention_has_a_kernel(head_size, window, key_heads):
    """`select_kernel` returns one only if its outputs and gradients equal those of plain attention."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("kernels for rows of several conversations need compute capability 8")
    shape = Shape(8, key_heads, head_size, torch.bfloat16, torch.device("cuda"), None, window)
    assert select_kernel(shape, 0.0) is not None


def test_generation_gives_the_answers_of_a_cpu(recipe, tmp_path):
    """In fp32, greedily."""
    run = train(recipe, tmp_path / "run", "training.precision=fp32")
    answers = []
    for devices in ("0", ""):
        ran("evaluate", run.root, "--force", CUDA_VISIBLE_DEVICES=devices)
        answers.append((run.root / "evaluation" / "base" / "outputs.jsonl").read_text(encoding="utf-8"))
    assert answers[0] == answers[1]


def test_a_quantised_model_learns(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    logged = logged_steps(train(recipe, tmp_path / "run", "training.lora={load_in_4bit: true}"))
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_the_guarantees_hold_here(recipe):
    ran("check", recipe)


@pytest.mark.parametrize("words", [(), ("training.gradient_checkpointing=true",), ("training.lora={}",)])
def test_the_peak_memory_is_that_of_the_plan(tmp_path, conversations, words):
    """Within 15 %, for a model whose weights are larger than what the libraries of the GPU take."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = write_recipe(tmp_path, tmp_path / "model", conversations, "{max_steps: 4, precision: bf16}")
    planned = json.loads(ran("plan", recipe, "--json", *words).stdout)
    peak = next(row["memory_bytes"]["peak"] for row in planned["strategies"] if row["strategy"] == "vanilla")
    run = train(recipe, tmp_path / "run", *words)
    measured = max(line["peak_memory_mb"] for line in logged_steps(run)) * 2**20
    assert peak == pytest.approx(measured, rel=0.15)


def test_vllm_gives_the_answers_of_transformers(recipe, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    run = train(recipe, tmp_path / "run", "training.precision=fp32")
    answers = []
    for backend in ("transformers", "vllm"):
        ran("evaluate", run.root, "--force", f"evaluation.backend={backend}")
        lines = (run.root / "evaluation" / "base" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
        answers.append([json.loads(line)["output"] for line in lines])
    equal = sum(one == other for one, other in zip(*answers, strict=True))
    assert equal >= 0.9 * len(answers[0])


@pytest.mark.parametrize("second", ["cpu", 1])
def test_a_model_on_two_devices_gives_the_answers_of_one(tiny_model, second):
    """The second layer is in the memory of the host, or on the second GPU."""
    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs here")
    first = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0)
    load: Any = partial(load_model, device_map={**first, "model.layers.1": second})
    prompts, rows = [[5, 6, 7, 8], list(range(30, 60)), [40, 41]], [(list(range(3, 40)), list(range(3, 40)))]
    settings: Any = {"stop_token_ids": (1,), "max_new_tokens": 12, "sampling": None}
    found = []
    for loads in (load, load_model):
        model = TransformersModel(Path(tiny_model), torch.float32, False, load=loads)
        found.append((model.answer(prompts, **settings), model.sum_of_losses(rows)[0]))
        model.release()
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize(("strategy", "precision", "tolerance"), [("zero3", "fp32", 2e-4), ("vanilla", "bf16", 2e-2)])
def test_two_gpus_that_share_rows_take_the_steps_of_one(recipe, tmp_path, strategy, precision, tolerance):
    one = train(recipe, tmp_path / "one", f"training.precision={precision}")
    output = tmp_path / "two"
    words = f"training.strategy={strategy}", f"training.precision={precision}", "training.sequence_parallel=2"
    done = minisft("train", recipe, f"output={output}", *words, "training.processes=2")
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in logged_steps(run)] for run in (RunFolder(output), one)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize("strategy", ["vanilla", "zero2", "zero3"])
def test_two_gpus_take_the_steps_of_one(recipe, tmp_path, strategy):
    words = f"training.strategy={strategy}", "training.precision=fp32"
    one = train(recipe, tmp_path / "one", "training.precision=fp32")
    output = tmp_path / "two"
    done = minisft("train", recipe, f"output={output}", *words, "training.processes=2", "training.batch_size=4")
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in logged_steps(run)] for run in (RunFolder(output), one)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
