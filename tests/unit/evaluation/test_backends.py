"""Several processes share the work of an evaluation: the same results, and what happens when one dies."""

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from minisft.errors import UserError
from minisft.evaluation import backends
from minisft.evaluation.backends import (
    AnswerTask,
    LossTask,
    ModelSpec,
    TransformersModel,
    VllmModel,
    Workers,
    default_processes,
    require_vllm,
)
from minisft.evaluation.generation import Generated, Sampling
from tests.tiny import byte_tokenizer


def spec_of(folder, **settings):
    return ModelSpec(Path(folder), torch.float32, False, (1,), 12, **settings)


def tasks():
    tokenizer = byte_tokenizer()
    texts = [f"guest {number} asks for tea" for number in range(12)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    answers = [AnswerTask(ids[place : place + 3]) for place in range(0, 12, 3)]
    return [*answers, LossTask([(ids[0], ids[0]), (ids[1], ids[1])])]


@pytest.mark.parametrize("sampling", [None, Sampling(1.5, 0.9, 7)])
def test_two_processes_give_what_one_gives(tiny_model, sampling):
    spec = spec_of(tiny_model, sampling=sampling)
    found = []
    for processes in (1, 2):
        with Workers(processes) as workers:
            outcomes = list(workers.perform(spec, tasks()))
        assert all(outcome.seconds > 0 for outcome in outcomes)
        found.append([outcome.value for outcome in sorted(outcomes, key=lambda outcome: outcome.task)])
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_a_damaged_model_is_told_by_every_process_and_the_next_one_is_answered(tiny_model, tmp_path):
    (tmp_path / "damaged").mkdir()
    with Workers(2) as workers:
        with pytest.raises(UserError, match="cannot be loaded"):
            list(workers.perform(spec_of(tmp_path / "damaged"), tasks()))
        assert len(list(workers.perform(spec_of(tiny_model), tasks()))) == 5


def pids_of(workers):
    assert workers._pool is not None
    return list(workers._pool._processes)


def kill_all_after_the_first(spec):
    with Workers(2) as workers:
        for outcome in workers.perform(spec, tasks() * 40):
            if outcome.task == 0:
                for process in pids_of(workers):
                    os.kill(process, signal.SIGKILL)


def test_a_process_that_dies_is_said(tiny_model):
    with pytest.raises(RuntimeError, match="a process of the evaluation died"):
        kill_all_after_the_first(spec_of(tiny_model))


def interrupt_after_the_first(spec, processes):
    with Workers(2) as workers:
        for _ in workers.perform(spec, tasks() * 400):
            assert workers._pool is not None
            processes.extend(workers._pool._processes.values())
            raise KeyboardInterrupt


def test_ctrl_c_ends_the_processes_at_once(tiny_model):
    """The batches under way are of no more use."""
    processes: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_after_the_first(spec_of(tiny_model), processes)
    assert processes
    assert not any(process.is_alive() for process in processes)


def test_processes_end_with_the_one_that_hands_out_the_work(tiny_model, tmp_path):
    """Killed, it can say nothing to them."""
    code = (
        "import sys, os, signal\n"
        "from tests.unit.evaluation.test_backends import *\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        for outcome in workers.perform(spec_of(sys.argv[1]), tasks() * 400):\n"
        "            if len(workers._pool._processes) == 2:\n"
        "                print(*workers._pool._processes, flush=True)\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    import subprocess

    script = tmp_path / "work.py"
    script.write_text(code)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, script, tiny_model], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == 2
    end = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_one_process_for_each_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_processes() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_processes() == 4


# --- vLLM, of which a stand-in with its interface is enough ----------------------------------------------------


class StandIn:
    """`vllm.LLM` and `vllm.SamplingParams` as far as they are used, over the tiny model itself."""

    def __init__(self, model: str, dtype: str, trust_remote_code: bool, generation_config: str) -> None:
        assert (dtype, generation_config) == ("float32", "vllm")
        self.model = TransformersModel(Path(model), torch.float32, trust_remote_code)

    def generate(self, prompts: list[dict[str, list[int]]], settings: list[Any], use_tqdm: bool) -> list[Any]:
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, settings, strict=True)]

    def _answer(self, prompt, settings):
        assert settings.ignore_eos
        assert not settings.detokenize
        [answer] = self.model.answer(
            [prompt], stop_token_ids=settings.stop_token_ids, max_new_tokens=settings.max_tokens, sampling=None
        )
        ids = answer.ids + ([settings.stop_token_ids[0]] if answer.finish == "stop" else [])
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])


@pytest.fixture
def vllm(monkeypatch):
    module: Any = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, types.SimpleNamespace
    module.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(backends, "require_vllm", lambda: None)


def test_vllm_is_asked_for_what_the_decoding_loop_gives(vllm, tiny_model):
    prompts = [*tasks()[0].prompts, [5] * 505, [5] * 512]  # the tiny model's context is 512
    settings: Any = {"stop_token_ids": (1, 40, 70), "max_new_tokens": 12, "sampling": None}
    ours = TransformersModel(Path(tiny_model), torch.float32, False).answer(prompts, **settings)
    theirs = VllmModel(Path(tiny_model), torch.float32, False)
    assert theirs.answer(prompts, **settings) == ours
    assert ours[-1] == Generated([], "context")
    theirs.release()


def test_vllm_samples_with_a_seed_of_each_prompt(vllm, tiny_model, monkeypatch):
    given: list[Any] = []

    def note(self, prompts, settings, use_tqdm):
        given.extend(settings)
        return []

    monkeypatch.setattr(StandIn, "generate", note)
    model = VllmModel(Path(tiny_model), torch.float32, False)
    sampling = Sampling(0.7, 0.9, 3)
    with pytest.raises(ValueError, match="shorter"):  # it gives no answers
        model.answer([[5, 6], [7]], stop_token_ids=(1,), max_new_tokens=4, sampling=sampling)
    assert [(s.temperature, s.top_p, s.seed) for s in given] == [
        (0.7, 0.9, sampling.seed_of([5, 6])), (0.7, 0.9, sampling.seed_of([7]))
    ]  # fmt: skip


def test_an_adapter_is_not_for_vllm(vllm, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="given whole models here, and this is an adapter"):
        VllmModel(tmp_path, torch.float32, False)


def test_vllm_that_is_absent_or_has_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"evaluation.backend: vllm is not installed"):
        require_vllm()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="vllm is for GPUs"):
        require_vllm()
