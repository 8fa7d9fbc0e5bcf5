"""Several processes share the work of an evaluation: the same results, and what happens when one dies."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minisft.errors import UserError
from minisft.evaluation.backends import (
    AnswerTask,
    LossTask,
    ModelSpec,
    TransformersModel,
    Workers,
    gpu_groups,
)
from minisft.evaluation.generation import Generated, Sampling
from minisft.evaluation.vllm_model import VllmModel, require_vllm
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


def test_a_damaged_model_raises_in_every_process_and_the_next_model_still_answers(tiny_model, tmp_path):
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


def test_a_process_that_dies_raises_an_error(tiny_model):
    with pytest.raises(RuntimeError, match="a process of the evaluation died"):
        kill_all_after_the_first(spec_of(tiny_model))


def interrupt_after_the_first(spec, processes):
    with Workers(2) as workers:
        for _ in workers.perform(spec, tasks() * 400):
            assert workers._pool is not None
            processes.extend(workers._pool._processes.values())
            raise KeyboardInterrupt


def test_ctrl_c_ends_the_processes_at_once(tiny_model):
    """Nobody needs the batches that are running."""
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


def test_each_process_gets_its_own_gpus():
    assert gpu_groups(["0", "1", "5"], 1) == ["0", "1", "5"]
    assert gpu_groups(["0", "1", "2", "3", "7"], 2) == ["0,1", "2,3"]
    assert gpu_groups([], 1) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ZeroDivisionError("a bug"),
    ],
)
def test_lack_of_memory_or_a_bug_during_loading_is_not_reported_as_a_damaged_folder(tmp_path, error):
    def load(*args, **settings):
        raise error

    with pytest.raises(type(error)) as raised:
        TransformersModel(tmp_path, torch.float32, False, load=load)
    assert raised.value is error


def test_weights_that_do_not_fit_the_config_are_reported_with_the_first_line_of_the_error(tmp_path):
    def load(*args, **settings):
        raise RuntimeError("size mismatch for lm_head\nand more")

    with pytest.raises(UserError) as raised:
        TransformersModel(tmp_path, torch.float32, False, load=load)
    assert (raised.value.where, raised.value.problem) == (str(tmp_path), "RuntimeError: size mismatch for lm_head")


# --- memory that runs out --------------------------------------------------------------------------------------


class LimitedModel(torch.nn.Module):
    """A model whose forward runs out of memory with more than `rows` rows; `seen` holds the rows of each call."""

    def __init__(self, model, rows):
        super().__init__()
        self.inner, self.rows, self.seen = model, rows, []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, input_ids, position_ids=None, logits_to_keep=0, **kwargs):
        self.seen.append(len(input_ids))
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)


def answer(model, prompts):
    return model.answer(prompts, stop_token_ids=(1,), max_new_tokens=6, sampling=Sampling(1.5, 0.9, 7))


@pytest.fixture
def long_and_short(tiny_model):
    """Return 8 prompts of two lengths, and what an unlimited model answers."""
    ids = byte_tokenizer()("guest asks for tea with milk and one sugar please")["input_ids"]
    prompts = [ids[place : place + size] for place in range(4) for size in (12, 40)]
    return prompts, answer(TransformersModel(Path(tiny_model), torch.float32, False), prompts)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_with_the_same_answers(tiny_model, long_and_short, rows):
    prompts, expected = long_and_short
    model = TransformersModel(Path(tiny_model), torch.float32, False)
    model.model = limited = LimitedModel(model.model, rows)  # type: ignore[assignment]
    assert answer(model, prompts) == expected
    assert model.halved_at == 8
    tried = len(limited.seen)
    assert answer(model, prompts) == expected
    assert max(limited.seen[tried:]) <= rows  # a later batch does not try the size that failed again


def test_the_losses_of_a_batch_that_does_not_fit_are_those_of_its_halves(tiny_model, long_and_short):
    rows = sorted(((ids, ids) for ids in long_and_short[0]), key=lambda row: -len(row[0]))
    model = TransformersModel(Path(tiny_model), torch.float32, False)
    loss, tokens = model.sum_of_losses(rows)
    model.model = LimitedModel(model.model, 2)  # type: ignore[assignment]
    halved, counted = model.sum_of_losses(rows)
    assert counted == tokens
    assert halved == pytest.approx(loss, rel=1e-6)
    assert model.halved_at == 8


def test_a_single_row_that_does_not_fit_is_an_error_of_the_user(tiny_model):
    model = TransformersModel(Path(tiny_model), torch.float32, False)
    model._rows(10)  # measured before memory runs out
    model.model = LimitedModel(model.model, 0)  # type: ignore[assignment]
    with pytest.raises(UserError, match="memory ran out with a single row of 13 tokens"):
        answer(model, [[5, 6, 7, 8, 9, 10, 11]])


def test_an_evaluation_says_once_that_batches_are_halved(tiny_model, long_and_short, capsys):
    prompts, expected = long_and_short
    with Workers(1) as workers:
        spec = ModelSpec(Path(tiny_model), torch.float32, False, (1,), 6, Sampling(1.5, 0.9, 7))
        model: Any = workers._loaded.get(spec)
        model.model = LimitedModel(model.model, 2)
        outcomes = list(workers.perform(spec, [AnswerTask(prompts), AnswerTask(prompts)]))
    assert [outcome.value for outcome in outcomes] == [expected, expected]
    assert capsys.readouterr().err.count("memory ran out with 8 rows at once") == 1


# --- vLLM: a stand-in with its interface -----------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in in place of vLLM, on the import path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "vllm_stand_in"))
    yield
    sys.modules.pop("vllm", None)


def test_the_vllm_backend_gives_the_answers_of_the_decoding_loop(vllm, tiny_model):
    prompts = [*tasks()[0].prompts, [5] * 505, [5] * 512]  # the tiny model's context is 512
    settings: Any = {"stop_token_ids": (1, 40, 70), "max_new_tokens": 12, "sampling": None}
    ours = TransformersModel(Path(tiny_model), torch.float32, False).answer(prompts, **settings)
    theirs = VllmModel(Path(tiny_model), torch.float32, False)
    assert theirs.answer(prompts, **settings) == ours
    assert ours[-1] == Generated([], "context")
    theirs.release()


def test_vllm_samples_with_a_seed_of_each_prompt(vllm, tiny_model):
    model = VllmModel(Path(tiny_model), torch.float32, False)
    sampling = Sampling(0.7, 0.9, 3)
    model.answer([[5, 6], [7]], stop_token_ids=(1,), max_new_tokens=4, sampling=sampling)
    assert [(s.temperature, s.top_p, s.seed) for s in model.llm.settings] == [
        (0.7, 0.9, sampling.seed_of([5, 6])), (0.7, 0.9, sampling.seed_of([7]))
    ]  # fmt: skip


def test_the_vllm_backend_refuses_an_adapter(vllm, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, and the vLLM backend loads complete models only"):
        VllmModel(tmp_path, torch.float32, False)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_vllm_backend_without_vllm_is_refused(tiny_model):
    for refused in (require_vllm, spec_of(tiny_model, backend="vllm").load):
        with pytest.raises(UserError, match=r"evaluation.backend: vLLM is not installed"):
            refused()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_vllm_backend_without_a_gpu_is_refused(vllm, tiny_model):
    for refused in (require_vllm, spec_of(tiny_model, backend="vllm").load):
        with pytest.raises(UserError, match="this build of vLLM needs a GPU"):
            refused()
