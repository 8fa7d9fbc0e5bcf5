"""row_losses.bin of real runs: each row and step exactly once, and the losses of metrics.jsonl."""

import importlib
from pathlib import Path

import numpy as np
import pytest

import minisft
from minisft.run_folder import RunFolder
from minisft.training.batching import measure_lengths, steps_of_epoch
from tests.command import run


def require_complete(folder, epochs=2):
    """Check the file against the order of the rows, which needs no training, and against metrics.jsonl."""
    from minisft.data.prepared import load_train

    found = minisft.load(folder)
    sizes = measure_lengths(load_train(folder))
    records = found.row_losses
    step = 0
    for epoch in range(epochs):
        for rows in steps_of_epoch(sizes.tokens, global_batch=8, pack_tokens=None, seed=0, epoch=epoch):
            step += 1
            of_step = records[records["step"] == step]
            assert sorted(of_step["row"]) == sorted(rows)
            [line] = [line for line in found.metrics if line["step"] == step]
            weights = sizes.supervised[of_step["row"]]
            assert np.average(of_step["loss"].astype(float), weights=weights) == pytest.approx(line["loss"], rel=1e-6)
    assert records["step"].max() == step
    return records


def test_a_run_has_the_loss_of_every_row_at_every_step(capsys, recipe_file, tmp_path):
    assert run(capsys, "train", recipe_file).status == 0
    records = require_complete(tmp_path / "run")
    first, second = records[records["step"] <= 4], records[records["step"] > 4]
    assert sorted(first["row"]) == sorted(second["row"])
    assert second["loss"].mean() < first["loss"].mean()


def test_steps_that_are_not_logged_have_their_losses_too(capsys, recipe_file, tmp_path):
    assert run(capsys, "train", recipe_file, "training.log_every=3", f"output={tmp_path / 'rare'}").status == 0
    assert run(capsys, "train", recipe_file).status == 0
    rare, each = (minisft.load(tmp_path / name).row_losses for name in ("rare", "run"))
    assert (rare == each).all()


def test_a_resumed_run_has_each_row_and_step_once(capsys, recipe_file, tmp_path):
    assert run(capsys, "train", recipe_file, "training.keep_optimizer=all").status == 0
    before = require_complete(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for path in (folder.model, folder.checkpoints / "checkpoint-8"):
        path.rename(tmp_path / path.name)  # what a run has that was killed after step 6, and while it wrote
    content = folder.row_losses.read_bytes()
    folder.row_losses.write_bytes(content[: 12 + 12 * int((before["step"] <= 6).sum()) + 5])
    assert run(capsys, "train", recipe_file, "training.keep_optimizer=all", "--resume").status == 0
    assert folder.row_losses.read_bytes() == content


def test_two_processes_write_the_rows_of_both(capsys, recipe_file, tmp_path):
    words = ["training.processes=2", "training.batch_size=4"]
    assert run(capsys, "train", recipe_file, *words).status == 0
    require_complete(tmp_path / "run")


def test_a_loss_that_is_not_finite_leaves_the_losses_of_its_rows(capsys, recipe_file, tmp_path):
    status, _, err = run(capsys, "train", recipe_file, "training.learning_rate=1e30", "training.warmup_ratio=0")
    assert status == 2, err
    records = minisft.load(tmp_path / "run").row_losses
    assert not np.isfinite(records[records["step"] == records["step"].max()]["loss"]).all()


def test_the_benchmark_keeps_the_losses_of_every_second_step(monkeypatch, tmp_path, tiny_model):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    found = importlib.import_module("row_losses").measure(str(tiny_model), 4, 10, tmp_path)
    assert (found["steps"], found["bytes_per_row_and_epoch"]) == (6, 12)
    assert 0 < found["share_of_processor_time"] < 1
