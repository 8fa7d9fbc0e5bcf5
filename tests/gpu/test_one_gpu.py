"""One GPU takes the steps of the padded loop on a CPU, resumes to the same bits, and needs the memory of its plan."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
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
VLLM_SHARE = "evaluation.gpu_memory_utilization=0.3"  # other tests use the GPU at the same time
LIGER = importlib.util.find_spec("liger_kernel") is not None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("gpu"), tiny_model, conversations, SETTINGS)


def ran(*words, **environment):
    done = minisft(*words, timeout=480, **(ONE_GPU | environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(recipe, output, *words):
    ran("train", recipe, f"output={output}", *words)
    return RunFolder(output)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """Return a function that trains with some settings, once for all tests of this process; no test changes the run."""
    runs: dict[tuple[str, ...], RunFolder] = {}

    def run_of(*words):
        if words not in runs:
            runs[words] = train(recipe, tmp_path_factory.mktemp("run") / "run", *words)
        return runs[words]

    return run_of


def losses_of(run):
    return [line["loss"] for line in logged_steps(run)]


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_the_steps_are_those_of_a_padded_loop(trained, tiny_model, precision, tolerance, packing):
    """In fp16 a step whose scaled gradients overflow is skipped, and the scale halved: at most the first ones."""
    run = trained(f"training.precision={precision}", *(["training.packing=true"] if packing == "true" else []))
    logged = logged_steps(run)
    skipped = {number for number, line in enumerate(logged) if not math.isfinite(line["grad_norm"])}
    assert skipped <= ({0, 1, 2} if precision == "fp16" else set())
    steps = conversations_of_steps(run, global_batch=8, pack_tokens=256 if packing == "true" else None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rates = [line["learning_rate"] for line in logged]
    expected = padded_loop(model, train_rows(run), steps, rates, skipped=skipped)
    assert losses_of(run) == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    norms = [
        (line["grad_norm"], norm)
        for number, (line, (_, norm)) in enumerate(zip(logged, expected, strict=True))
        if number not in skipped
    ]
    assert [ours for ours, _ in norms] == pytest.approx([norm for _, norm in norms], rel=10 * tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 2e-3)])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_takes_the_steps_of_vanilla(trained, strategy, precision, tolerance):
    pytest.importorskip("deepspeed")
    words = f"training.precision={precision}"
    sharded = trained(words, f"training.strategy={strategy}")
    assert losses_of(sharded) == pytest.approx(losses_of(trained(words)), rel=tolerance)


def test_a_resumed_run_with_deterministic_kernels_has_the_same_bits(recipe, tmp_path):
    words = "training.precision=bf16", "training.deterministic=true"
    whole = train(recipe, tmp_path / "whole", *words)
    halves = train(recipe, tmp_path / "halves", *words, "training.max_steps=4")
    train(recipe, tmp_path / "halves", *words, "--resume")
    ours, expected = (load_file(run.model / "model.safetensors") for run in (halves, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [kernels_of(run)["chosen"] for run in (halves, whole)] == ["liger" if LIGER else "none"] * 2


def require_package(kernels):
    if kernels == "liger" and not LIGER:
        pytest.skip("liger-kernel is not installed")


def kernels_of(run):
    return json.loads(run.environment.read_text(encoding="utf-8"))["kernels"]


@pytest.mark.parametrize(("kernels", "precision", "tolerance", "key"), [
    ("liger", "bf16", 2e-2, "packing=true"),
    ("liger", "bf16", 2e-2, "gradient_checkpointing=true"),
    ("liger", "bf16", 2e-2, "lora={rank: 4}"),
    ("liger", "fp32", 2e-4, "gradient_checkpointing=true"),
    ("compile", "bf16", 2e-2, "gradient_checkpointing=true"),
    ("compile", "fp32", 2e-4, "gradient_checkpointing=true"),
])  # fmt: skip
def test_kernels_take_the_steps_of_none(trained, kernels, precision, tolerance, key):
    require_package(kernels)
    words = f"training.precision={precision}", f"training.{key}"
    plain, fused = (trained(*words, f"training.kernels={one}") for one in ("none", kernels))
    assert kernels_of(fused)["replaced"] == ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"]
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=tolerance)


@pytest.mark.parametrize(("kernels", "strategy"), [("liger", "zero3"), ("compile", "zero2")])
def test_kernels_under_zero_take_the_steps_of_none(trained, kernels, strategy):
    require_package(kernels)
    pytest.importorskip("deepspeed")
    words = "training.precision=bf16", f"training.strategy={strategy}"
    plain, fused = (trained(*words, f"training.kernels={one}") for one in ("none", kernels))
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=2e-2)


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
    run = train(recipe, tmp_path / "run", "training.precision=fp32", "training.max_steps=2")
    answers = []
    for devices in ("0", ""):
        ran("evaluate", run.root, "--force", CUDA_VISIBLE_DEVICES=devices)
        answers.append((run.root / "evaluation" / "base" / "outputs.jsonl").read_text(encoding="utf-8"))
    assert answers[0] == answers[1]


def test_a_quantised_model_learns(trained):
    pytest.importorskip("bitsandbytes")
    losses = losses_of(trained("training.lora={load_in_4bit: true}"))
    assert losses[-1] < losses[0]


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
    planned = json.loads(ran("plan", recipe, "--json", *words))
    peak = next(row["memory_bytes"]["peak"] for row in planned["strategies"] if row["strategy"] == "vanilla")
    run = train(recipe, tmp_path / "run", *words)
    measured = max(line["peak_memory_mb"] for line in logged_steps(run)) * 1e6
    assert peak == pytest.approx(measured, rel=0.15)


def test_vllm_gives_the_answers_of_transformers(recipe, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    run = train(recipe, tmp_path / "run", "training.precision=fp32", "training.max_steps=2")
    answers = []
    for words in (["evaluation.backend=transformers"], ["evaluation.backend=vllm", VLLM_SHARE]):
        ran("evaluate", run.root, "--force", *words)
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


def test_two_processes_on_one_gpu_take_the_steps_of_one(trained, recipe, tmp_path):
    """By gloo, since NCCL refuses two processes of one GPU."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    words = ["train", recipe, f"output={tmp_path / 'two'}", "training.precision=fp32", "training.batch_size=4"]
    joined = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.gloo_on_one_gpu", *map(str, words)], stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | ONE_GPU | joined | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    one = trained("training.precision=fp32")
    assert losses_of(RunFolder(tmp_path / "two")) == pytest.approx(losses_of(one), rel=2e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize(("words", "tolerance"), [
    (("strategy=vanilla", "precision=fp32", "batch_size=4"), 2e-4),
    (("strategy=zero2", "precision=fp32", "batch_size=4"), 2e-4),
    (("strategy=zero3", "precision=fp32", "batch_size=4"), 2e-4),
    (("strategy=zero3", "precision=fp32", "sequence_parallel=2"), 2e-4),
    (("strategy=vanilla", "precision=bf16", "sequence_parallel=2"), 2e-2),
])  # fmt: skip
def test_two_gpus_take_the_steps_of_one(trained, recipe, tmp_path, words, tolerance):
    one = trained(f"training.{words[1]}")
    output = tmp_path / "two"
    more = [f"training.{word}" for word in words]
    done = minisft("train", recipe, f"output={output}", *more, "training.processes=2")
    assert done.returncode == 0, done.stderr
    assert losses_of(RunFolder(output)) == pytest.approx(losses_of(one), rel=tolerance)
