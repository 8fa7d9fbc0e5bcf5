"""When the held-out loss is computed, when it ends a run, and where it is logged."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from minisft.errors import UserError
from minisft.recipe import load_recipe
from minisft.report.run_data import read_run
from minisft.run_folder import RunFolder, run_identity
from minisft.training.callbacks import MetricsFile
from minisft.training.checkpoints import best_checkpoints, is_last
from minisft.training.held_out import EarlyStopping, HeldOutRows, is_due, stops_early

BY_METRIC = ["training.early_stopping=2", "training.early_stopping_by=best_by", "evaluation.best_by=bleu"]


@pytest.mark.parametrize(
    ("every", "due"), [(None, []), ("epoch", [4, 8, 10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (99, [10])]
)
def test_the_held_out_loss_is_due_after_the_last_step(every, due):
    assert [step for step in range(1, 11) if is_due(step, every=every, epoch_steps=4, last=10)] == due


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),  # not lower
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, math.nan], 1, True),
        ([math.nan, 3.0], 1, False),
    ],
)
def test_a_run_ends_when_the_lowest_is_too_old(losses, patience, stops):
    assert stops_early(losses, patience) == stops


def test_a_higher_score_may_be_the_better_one():
    history = [{"eval_bleu": score, "step": step} for step, score in enumerate((3.0, 9.0, 8.0), 1)]
    assert EarlyStopping(1, "eval_bleu", higher_is_better=True).ends([{"loss": 1.0}, *history])
    assert not EarlyStopping(2, "eval_bleu", higher_is_better=True).ends(history)
    assert not EarlyStopping(1).ends(history), "there is no held-out loss"
    assert str(EarlyStopping(2, "eval_bleu", True)) == "2 evaluations without a higher bleu"
    assert str(EarlyStopping(1)) == "1 evaluation without a lower held-out loss"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_supervised_token_counts_once_however_the_rows_are_shared(processes):
    rows = {"input_ids": [list(range(n)) for n in (5, 90, 30, 2)], "labels": []}
    rows["labels"] = [[-100, *ids[1:]] for ids in rows["input_ids"]]
    dataset = Dataset.from_dict(rows)
    shares: list[float] = []
    forwards: list[int] = []

    def count(model, row):
        forwards[-1] += 1
        return torch.tensor(float(len(row.targets)))

    for rank in range(processes):
        forwards.append(0)
        held_out = HeldOutRows(dataset, row_tokens=40, processes=processes, rank=rank)
        shares.append(float(held_out.sum_of_losses(torch.nn.Identity(), count)))
    assert sum(shares) == held_out.supervised == 4 + 89 + 29 + 1
    assert len(set(forwards)) == 1, "ZeRO-3 gathers in each forward, so all run as many"


def log(file, step, control=False, **logs):
    state = SimpleNamespace(is_world_process_zero=True, global_step=step, epoch=1.0)
    file.on_log(None, state, SimpleNamespace(should_evaluate=control), logs=logs)


def test_it_stands_in_the_line_of_its_step(tmp_path):
    run = RunFolder(tmp_path)
    file = MetricsFile(run.metrics)
    log(file, 1, loss=3.0)
    log(file, 2, control=True, loss=2.0)
    assert len(run.metrics.read_text().splitlines()) == 1
    log(file, 2, eval_loss=2.5, eval_seconds=0.1)
    log(file, 2, train_runtime=1.0)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert "eval_loss" not in lines[0]
    assert (lines[1]["loss"], lines[1]["eval_loss"]) == (2.0, 2.5)
    assert read_run(tmp_path).held_out == [(2, 2.5)]


def test_the_lowest_of_them_makes_the_best_checkpoint(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 4, 6):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((1, 0.5), (2, 3.0), (4, 2.0), (6, 2.5))]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_checkpoints(run) == {"checkpoint-4", None}


def test_the_best_by_the_score_of_early_stopping_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    history = [{"step": step, "eval_bleu": score} for step, score in ((1, 99.0), (2, 1.0), (4, 3.0))]
    for step in (2, 4, 6):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    state = {"global_step": 6, "max_steps": 9, "log_history": history}
    (run.checkpoints / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    assert best_checkpoints(run, EarlyStopping(2, "eval_bleu", True)) == {"checkpoint-4", None}
    assert best_checkpoints(run, EarlyStopping(2, "eval_bleu", False)) == {"checkpoint-2", None}


def test_a_checkpoint_knows_that_the_run_ended_with_it(tmp_path):
    history = [{"eval_loss": loss} for loss in (2.0, 2.5)]
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"global_step": 8, "max_steps": 20, "log_history": history})
    )
    assert is_last(tmp_path, EarlyStopping(1))
    assert not is_last(tmp_path, EarlyStopping(2))
    assert not is_last(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.early_stopping=2"], "no held-out loss to stop on"),
        (["training.eval_every=epoch", "data.test_fraction=0"], "no held-out conversations"),
        (["training.eval_every=0"], "not above zero"),
        (["training.early_stopping_by=best_by"], "there is no early stopping"),
        ([*BY_METRIC[:2]], "evaluation.best_by is not set"),
        ([*BY_METRIC, "evaluation.best_by=loss"], "evaluation.best_by is loss"),
        ([*BY_METRIC, "data.test_fraction=0"], "no held-out conversations to answer"),
        ([*BY_METRIC, "evaluation.backend=vllm"], "GPU memory that training needs"),
        (["training.eval_every=never"], "does not fit"),
    ],
)
def test_what_cannot_be_is_named(recipe_file, overrides, said):
    with pytest.raises(UserError, match=said):
        load_recipe(recipe_file, overrides)


def test_it_may_change_on_resume_unless_it_decides_when_the_run_ends(recipe_file):
    plain, other = (load_recipe(recipe_file, words) for words in ([], ["training.eval_every=5"]))
    assert run_identity(plain) == run_identity(other)
    stopping = [
        load_recipe(recipe_file, ["training.early_stopping=2", f"training.eval_every={every}"]) for every in (5, 6)
    ]
    assert run_identity(stopping[0]) != run_identity(stopping[1])


def test_what_the_scores_depend_on_may_not_change_on_resume(recipe_file):
    by_metric = load_recipe(recipe_file, BY_METRIC)
    for change in ("training.save_every=7", "evaluation.max_new_tokens=9", "evaluation.metrics=[bleu]"):
        assert run_identity(load_recipe(recipe_file, [*BY_METRIC, change])) != run_identity(by_metric)
        assert run_identity(load_recipe(recipe_file, [change])) == run_identity(load_recipe(recipe_file))
    assert run_identity(load_recipe(recipe_file, [*BY_METRIC, "training.eval_every=5"])) == run_identity(by_metric)
