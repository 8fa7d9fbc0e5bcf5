"""Which strategy is chosen for published models on GPUs, and why; what would fit where none does."""

from dataclasses import replace

import numpy as np
import pytest

from minisft.planning import planner
from minisft.planning.machines import GPUS
from minisft.planning.planner import (
    job_of,
    largest_row,
    make_plan,
    needed_bytes,
    predict_recipe,
    predict_run,
    prepared_sizes,
)
from minisft.planning.prediction import Job, predict
from minisft.planning.workload import workload_assumed, workload_of
from minisft.recipe import LoraRecipe, load_recipe
from minisft.run_folder import RunFolder, trained_alone, write_environment, write_resolved_recipe
from minisft.training.batching import Sizes
from minisft.training.kernels import Obstacle
from tests.unit.planning.models_as_files import MODELS, model_costs

ROW = 16384
CPU = replace(GPUS["h100"], name="cpu", kind="cpu")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\noutput: o\ndata: {source: d.jsonl}\n", encoding="utf-8")
    return load_recipe(path)


def with_training(recipe, **keys):
    return replace(recipe, training=replace(recipe.training, **keys))


def job_on(name, processes, recipe, machine=GPUS["h100"]):
    work = workload_assumed(recipe.training, row_tokens=ROW, processes=processes, length=4096)
    nodes = -(-processes // machine.per_node)
    return Job(model_costs(name), machine, processes, nodes, "bf16", work, ROW)


@pytest.mark.parametrize(
    ("model", "processes", "chosen"),
    [
        ("mistral-7b", 1, None),
        ("mistral-7b", 8, "zero1"),
        ("mistral-7b", 64, "zero1"),
        ("llama3-8b", 1, None),
        ("llama3-8b", 8, "zero1"),
        ("llama3-8b", 64, "zero1"),
        ("llama3-70b", 1, None),
        ("llama3-70b", 8, None),
        ("llama3-70b", 64, "zero3"),
    ],
)
def test_the_choice_on_h100(recipe, model, processes, chosen):
    """Full fine-tuning with gradient checkpointing: 16 bytes a parameter decide, 1.1 TB for 70B."""
    recipe = with_training(recipe, gradient_checkpointing=True)
    plan = make_plan(recipe, job_on(model, processes, recipe))
    assert (plan.chosen.setting.strategy if plan.chosen else None) == chosen
    if plan.chosen is None:
        assert "nothing fits" in plan.reason
        assert plan.suggestions
        return
    assert plan.chosen.fits
    assert f"{chosen} fits" in plan.reason
    assert not plan.suggestions


@pytest.mark.parametrize(
    ("model", "processes", "suggestions"),
    [
        (
            "mistral-7b",
            1,
            ["training.lora={rank: 16} with training.strategy=vanilla", "4 h100 with training.strategy=zero1"],
        ),
        ("llama3-70b", 1, ["32 h100 on 4 nodes with training.strategy=zero3"]),
        ("llama3-70b", 8, ["training.lora={rank: 16} with training.strategy=zero3", "32 h100 on 4 nodes"]),
    ],
)
def test_suggestions_fit(recipe, model, processes, suggestions):
    recipe = with_training(recipe, gradient_checkpointing=True)
    plan = make_plan(recipe, job_on(model, processes, recipe))
    for suggestion in suggestions:
        assert any(suggestion in said for said in plan.suggestions), plan.suggestions
    adapters = predict(plan.job, "zero3", checkpointing=True, lora=LoraRecipe())
    assert adapters.fits == any("lora" in said for said in plan.suggestions)


def test_a_single_change_of_the_recipe_is_suggested(recipe):
    """Without checkpointing a row of 16,384 tokens does not fit on eight; each of these changes alone makes it fit."""
    plan = make_plan(recipe, job_on("mistral-7b", 8, recipe))
    assert plan.chosen is None
    assert "training.gradient_checkpointing=true with training.strategy=zero1" in plan.suggestions
    assert "training.row_tokens=8192 with training.strategy=zero3" in plan.suggestions
    assert make_plan(with_training(recipe, gradient_checkpointing=True), plan.job).chosen is not None


def test_vanilla_where_it_fits_since_nothing_is_faster(recipe):
    recipe = with_training(recipe, lora=LoraRecipe(), gradient_checkpointing=True)
    plan = make_plan(recipe, job_on("mistral-7b", 8, recipe))
    assert plan.chosen is not None
    assert plan.chosen.setting.strategy == "vanilla"


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_the_largest_row_fits_and_a_little_more_does_not(recipe, strategy):
    job = job_on("mistral-7b", 8, recipe)
    at_hand = predict(job, strategy, checkpointing=True)
    tokens = largest_row(job, at_hand)
    fits = [
        predict(job, strategy, checkpointing=True, row=(size, size // 2)).fits for size in (tokens - 64, tokens + 128)
    ]
    assert fits == [True, False]


def test_more_processes_never_need_more_memory(recipe):
    for strategy in ("zero1", "zero2", "zero3"):
        sizes = [needed_bytes(predict(job_on("llama3-8b", count, recipe), strategy)) for count in (2, 8, 64)]
        assert sizes == sorted(sizes, reverse=True)


def test_offload_moves_the_optimizer_to_the_host(recipe):
    job = job_on("llama3-8b", 8, recipe)
    plain, offloaded = (predict(job, "zero2", checkpointing=True, offload=offload) for offload in (False, True))
    assert plain.memory.host == 0 < offloaded.memory.host
    assert offloaded.memory.peak < plain.memory.peak - 12 * 8.0e9 / 8
    assert offloaded.step_seconds > plain.step_seconds


# --- the work -----------------------------------------------------------------------------------------------


def test_the_work_is_that_of_the_sampler(recipe):
    """Ten conversations in steps of four: three steps an epoch, the last of two; rows of at most 100 tokens."""
    recipe = with_training(recipe, batch_size=4, epochs=2, save_every=2)
    sizes = Sizes(np.full(10, 40), np.full(10, 10))
    work = workload_of(sizes, recipe, row_tokens=100, processes=1)
    assert (work.steps, work.checkpoints, work.most_rows, work.longest) == (6, 3, 2, 40)
    assert work.tokens == pytest.approx(400 / 3)
    assert work.row_tokens.tolist() == [80] * 5
    assert work.row_supervised.tolist() == [20] * 5
    shared = workload_of(sizes, with_training(recipe, batch_size=2), row_tokens=100, processes=2)
    assert (shared.steps, shared.most_rows) == (6, 1)
    assert shared.busiest_tokens == work.tokens / 2


def test_the_heaviest_row_weighs_supervised_tokens(recipe):
    recipe = with_training(recipe, batch_size=1)
    work = workload_of(Sizes(np.array([50, 40]), np.array([1, 39])), recipe, row_tokens=64, processes=1)
    assert work.heaviest_row(1.0, 0.0) == (50, 1)
    assert work.heaviest_row(1.0, 1.0) == (40, 39)


# --- this machine -------------------------------------------------------------------------------------------


@pytest.fixture
def published(recipe, tmp_path):
    """A recipe whose model is a configuration of Mistral 7B, with assumed data."""
    return replace(recipe, model=str(MODELS / "mistral-7b"), output=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("kernels", "installed", "machine", "counted"),
    [
        ("liger", False, "h100", True),  # the plan is for another machine
        ("auto", True, "h100", True),
        ("auto", False, "h100", False),
        ("none", True, "h100", False),
        ("compile", True, "h100", False),
        ("auto", True, "cpu", False),
    ],
)
def test_the_kernels_of_liger_are_counted_where_they_would_be_used(
    published, monkeypatch, kernels, installed, machine, counted
):
    monkeypatch.setattr(planner, "find_obstacle", lambda *words: None if installed else Obstacle("not here", "install"))
    gpu = CPU if machine == "cpu" else GPUS[machine]
    jobs = [
        job_of(with_training(published, kernels=one, precision="bf16"), gpu, sizes=None) for one in (kernels, "none")
    ]
    ours, plain = (predict(job, "vanilla").memory for job in jobs)
    assert (ours.activations < plain.activations) == counted
    assert (ours.peak < plain.peak) == counted


def test_the_model_that_scores_checkpoints_is_counted(published):
    """Its bf16 weights, and the cache of the longest prompt and answer: 2 x 8 heads of 128 in 32 layers."""
    scored = with_training(published, early_stopping=2, early_stopping_by="best_by", precision="bf16")
    with_scores, without = (job_of(one, GPUS["h100"], sizes=None, count=8) for one in (scored, published))
    tokens = with_scores.workload.longest + scored.evaluation.max_new_tokens
    expected = 2 * 7_248_023_552 + tokens * 2 * 2 * 8 * 128 * 32
    ours, plain = (predict(job, "zero3", checkpointing=True).memory for job in (with_scores, without))
    assert (ours.scoring, plain.scoring) == (expected, 0)
    held = ours.optimizer + ours.buffers + 2 * 7_248_023_552 / 8
    assert ours.peak == pytest.approx(max(plain.peak, held + expected))
    # Without a second memory to free, as in fp32 on a CPU, it comes on top of the step.
    on_cpu = [replace(job, machine=CPU, precision="fp32") for job in (with_scores, without)]
    ours, plain = (predict(job, "vanilla").memory for job in on_cpu)
    assert ours.peak - plain.peak == ours.scoring == 2 * expected


def test_a_model_that_one_gpu_cannot_score_is_divided(recipe, tmp_path):
    """70B in bf16 is 141 GB: two copies, each over four of eight GPUs of 80 GB."""
    recipe = replace(recipe, model=str(MODELS / "llama3-70b"), output=str(tmp_path / "run"))
    scored = with_training(recipe, early_stopping=2, early_stopping_by="best_by", precision="bf16")
    job = job_of(scored, GPUS["h100"], sizes=None, count=8)
    assert predict(job, "zero3").setting.gpus_each == 4
    assert predict(job, "zero3").memory.scoring == pytest.approx(2 * 70.55e9 / 4, rel=0.05)


def test_predict_run_on_this_machine(recipe_file):
    """The prediction that `check` uses has the recipe's own strategy, memory by its parts, and the time of the run."""
    from minisft.data.preparation import prepare

    recipe = load_recipe(recipe_file)
    prepare(recipe)
    prediction = predict_run(recipe)
    assert prediction.steps == 8
    assert prediction.total_seconds is not None
    assert prediction.total_seconds >= prediction.steps * prediction.step_seconds > 0
    assert 0 < prediction.memory.parameters < prediction.peak_memory_bytes < prediction.process_bytes
    automatic = predict_run(with_training(recipe, strategy="auto"))
    assert automatic.setting.strategy == "vanilla"


def test_one_conversation_in_a_row_where_the_last_run_of_the_model_needed_that(recipe_file, tmp_path):
    from minisft.data.preparation import prepare

    recipe = load_recipe(recipe_file)
    prepare(recipe)
    run = RunFolder(tmp_path / "run")
    write_resolved_recipe(run, recipe)

    def rows(recipe):
        return job_of(recipe, GPUS["4090"], sizes=prepared_sizes(recipe), count=1).workload.most_rows

    assert rows(recipe) == 1
    write_environment(run, {"probe": {"verdict": "right"}})
    assert rows(recipe) == 1
    write_environment(run, {"probe": {"verdict": "alone"}})
    assert rows(recipe) == recipe.training.batch_size
    assert not trained_alone(run, "another model")


def test_a_recipe_under_another_strategy(recipe_file):
    recipe = load_recipe(recipe_file)
    job = job_of(recipe, GPUS["4090"], sizes=None, count=2)
    assert (job.processes, job.precision, job.workload.steps) == (2, "fp32", None)
    assert predict_recipe(recipe, job).setting.strategy == "vanilla"
    assert predict_recipe(recipe, job, "zero2").setting.strategy == "zero2"
