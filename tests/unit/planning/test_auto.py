"""strategy=auto: the cheapest strategy that fits by the plan, confirmed by a trial; the next one if memory runs out."""

from dataclasses import replace

import pytest
import torch

from minisft.cli import main
from minisft.data.preparation import prepare
from minisft.errors import StoppedError, UserError
from minisft.planning.auto import OUT_OF_MEMORY, Trial, is_out_of_memory, settle_strategy, try_strategy
from minisft.planning.machines import GPUS
from minisft.planning.planner import job_of, limited, prepared_sizes
from minisft.planning.workload import workload_assumed
from minisft.recipe import STRATEGIES, load_recipe
from minisft.run_folder import load_run
from minisft.run_start import open_run
from minisft.training.distributed import launch_single
from tests.unit.planning.models_as_files import model_costs

GPU_RECIPE = ("training.strategy=auto", "training.precision=bf16", "training.gradient_checkpointing=true")


@pytest.fixture
def settle(recipe_file):
    """Choose the strategy of a 7B model on eight H100 as if it were trained on them; trials are simulated."""
    recipe = load_recipe(recipe_file, GPU_RECIPE)
    with open_run(recipe):
        prepare(recipe)
    work = workload_assumed(recipe.training, row_tokens=4096, processes=8, length=1024)

    def settle_under(limit, peaks=None):
        """Return the settled strategy and those tried; `peaks` in GB of what does not go as planned, None: no memory."""
        tried = []

        def play(settled, run, job):
            strategy = settled.training.strategy
            tried.append(strategy)
            peak = (peaks or {}).get(strategy, 1.0)
            return Trial(strategy, None if peak is None else peak * 1e9, 0.0, 1.0)

        under_limit = replace(recipe, training=replace(recipe.training, memory_limit_gb=limit))
        small = job_of(under_limit, limited(GPUS["h100"], under_limit), sizes=prepared_sizes(under_limit))
        job = replace(small, model=model_costs("mistral-7b"), processes=8, workload=work)
        with open_run(under_limit) as run:
            settled = settle_strategy(under_limit, run, job=job, strategies=STRATEGIES, try_strategy=play)
        assert load_run(run.root).training.strategy == settled.training.strategy
        return settled.training.strategy, tried

    return settle_under


@pytest.mark.parametrize(
    ("limit", "strategy"), [(1000.0, "vanilla"), (50.0, "zero1"), (40.0, "zero2"), (25.0, "zero3")]
)
def test_the_simplest_that_fits_is_tried_and_taken(settle, limit, strategy):
    assert settle(limit) == (strategy, [strategy])


def test_the_next_one_where_memory_runs_out(settle):
    assert settle(50.0, {"zero1": None}) == ("zero2", ["zero1", "zero2"])
    assert settle(50.0, {"zero1": None, "zero2": None}) == ("zero3", ["zero1", "zero2", "zero3"])


def test_the_next_one_where_the_trial_takes_more_than_the_limit(settle, capsys):
    assert settle(50.0, {"zero1": 50.1}) == ("zero2", ["zero1", "zero2"])
    assert "zero1 took 50.1 GB of 50.0 GB in its trial" in capsys.readouterr().out


def test_nothing_fits_by_the_plan(settle):
    with pytest.raises(UserError) as caught:
        settle(15.0)
    assert caught.value.where == "training.strategy=auto"
    assert "nothing fits in 15.0 GB a process" in caught.value.problem
    for strategy in ("vanilla", "zero1", "zero2", "zero3"):
        assert f"{strategy} " in caught.value.problem
    assert "16 h100 on 2 nodes with training.strategy=zero3" in caught.value.fix


def test_nothing_fits_when_tried(settle):
    with pytest.raises(UserError) as caught:
        settle(25.0, {"zero3": None})
    assert "zero3 ran out of memory" in caught.value.problem
    assert "by the plan vanilla" in caught.value.problem


# --- the trial ----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(recipe_file):
    recipe = load_recipe(recipe_file)
    with open_run(recipe) as run:
        prepare(recipe)
        job = job_of(recipe, GPUS["h100"], sizes=prepared_sizes(recipe))
        yield recipe, run, job


def test_a_trial_takes_the_heaviest_step(prepared):
    """Its data is that step's conversations, all in one step, and its folder is deleted."""
    recipe, run, job = prepared
    seen: list[object] = []

    def look(module, arguments):
        root = run.root / ".trial"
        trial = load_run(root).training
        seen.append((trial.max_steps, trial.batch_size * trial.gradient_accumulation))
        seen.append(sorted(prepared_sizes(load_run(root)).tokens))
        (root / "metrics.jsonl").write_text('{"step": 1, "peak_memory_mb": 700.0, "seconds": 2.0}\n')
        (root / "process_bytes").write_text("400000000")

    assert try_strategy(recipe, run, job, launch_single=look) == Trial("vanilla", 700e6, 400e6, 2.0)
    heaviest = job.workload.heaviest_step
    assert seen == [(2, len(heaviest)), sorted(prepared_sizes(recipe).tokens[heaviest])]
    assert len(heaviest) == 8
    assert not (run.root / ".trial").exists()
    assert not run.has_begun()


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (RuntimeError("a training process failed: Signal 9 (SIGKILL) received by PID 7"), True),
        (UserError(OUT_OF_MEMORY, "CUDA out of memory", "x"), True),
        (RuntimeError("a training process failed: exit status 1"), False),
        (UserError("data", "is broken", "x"), False),
    ],
)
def test_only_a_lack_of_memory_lets_the_next_strategy_be_tried(prepared, error, out_of_memory):
    recipe, run, job = prepared

    def fail(*_):
        raise error

    if out_of_memory:
        assert try_strategy(recipe, run, job, launch_single=fail).peak is None
    else:
        with pytest.raises(type(error)):
            try_strategy(recipe, run, job, launch_single=fail)
    assert not (run.root / ".trial").exists()


def test_a_stop_in_a_trial_stops_the_command(prepared):
    recipe, run, job = prepared
    two = replace(recipe, training=replace(recipe.training, processes=2))
    with pytest.raises(StoppedError):
        try_strategy(two, run, job, launch=lambda *_: True)


def test_errors_of_torch_about_memory_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_error_of_a_single_process_names_its_signal_or_status():
    launch_single("tests.unit.planning.ends", ["0"])
    with pytest.raises(RuntimeError, match="SIGKILL"):
        launch_single("tests.unit.planning.ends", ["SIGKILL"])
    with pytest.raises(RuntimeError, match="exit status 3"):
        launch_single("tests.unit.planning.ends", ["3"])


# --- the command line ---------------------------------------------------------------------------------------


def test_a_launch_in_progress_cannot_choose_the_strategy(recipe_file, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", str(recipe_file), "training.strategy=auto"]) == 2
    assert "name the one that `minisft plan RECIPE` chooses" in capsys.readouterr().err


def test_an_impossible_limit_on_this_machine(recipe_file, capsys):
    assert main(["train", str(recipe_file), "training.strategy=auto", "training.memory_limit_gb=0.3"]) == 2
    said = capsys.readouterr().err
    assert "nothing fits in 0.3 GB a process" in said
    assert "GB for each process, with training.strategy=vanilla" in said
