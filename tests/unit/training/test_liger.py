"""Liger's own kernels, forward and backward, against plain torch: by Triton's interpreter, which needs no GPU."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest

from minisft.run_folder import RunFolder

MISSING = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install --no-deps liger-kernel triton"
)


def interpreted(*words, **environment):
    command = [sys.executable, "-m", "tests.interpreted_kernels", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found():
    return json.loads(interpreted())


@pytest.mark.parametrize("kernel", ["rms_norm of Llama", "rms_norm of Gemma", "rotary", "swiglu", "geglu"])
def test_a_kernel_computes_what_plain_torch_computes(found, kernel):
    assert len(found[kernel]) in (3, 4)  # outputs and gradients
    assert max(found[kernel]) < 1e-6


@pytest.mark.parametrize("model", ["Llama", "Qwen3", "Gemma2", "Phi3"])
def test_a_model_gets_kernels(found, model):
    assert found[model]["replaced"] == [f"{model}MLP", f"{model}RMSNorm", "apply_rotary_pos_emb"]
    assert found[model]["difference"] < 1e-5


def test_the_plan_counts_what_the_kernels_keep(found):
    assert len(found["kept"]) == 10
    for kind, (kept, counted) in found["kept"].items():
        assert counted == pytest.approx(kept, rel=0.02), kind


def test_a_model_with_another_activation_is_refused(found):
    """Liger's SwiGLU does not read the activation of the configuration."""
    assert "compute something else than the code of LlamaForCausalLM" in found["Llama with another activation"]


@pytest.mark.long
@pytest.mark.parametrize("key", ["lora={rank: 2}", "gradient_checkpointing=true", "packing=true"])
def test_training_takes_the_same_steps(recipe_file, tmp_path, key):
    words = ("train", recipe_file, f"training.{key}", "training.max_steps=3", "training.row_tokens=64",
             "training.batch_size=1", "training.scheduler=constant", "data.max_length=64")  # fmt: skip
    losses = []
    for kernels in ("none", "liger"):
        interpreted(*words, f"output={tmp_path / kernels}", f"training.kernels={kernels}")
        run = RunFolder(tmp_path / kernels)
        assert json.loads(run.environment.read_text())["kernels"]["chosen"] == kernels
        losses.append([json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


@pytest.mark.long
def test_zero3_gathers_the_weights_that_are_compared(recipe_file, tmp_path):
    """One process, which joins as if a launcher had started it: a worker would not have the interpreter."""
    pytest.importorskip("deepspeed")
    joined = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    words = ("training.strategy=zero3", "training.kernels=liger", "training.max_steps=1", "training.batch_size=1")
    interpreted("train", recipe_file, *words, "training.row_tokens=48", "data.max_length=48", **joined)
    found = json.loads(RunFolder(tmp_path / "run").environment.read_text())["kernels"]
    assert found["chosen"] == "liger"
    assert found["difference"] < 1e-5


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
