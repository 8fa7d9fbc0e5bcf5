"""`minisft submit` with a real SLURM: a ZeRO-2 run on two nodes that is preempted and ends as if it had not been."""

import json
import re

import pytest

from tests.slurm import slurm, slurm_cluster, wait_until
from tests.tiny import minisft, write_recipe

SETTINGS = (
    "{epochs: 100, batch_size: 4, strategy: zero2, processes: 2, learning_rate: 1.0e-3, precision: fp32, "
    "save_every: 1000}"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, conversations):
    """Return the folder of the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = minisft("train", write_recipe(folder, tiny_model, conversations, SETTINGS), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_preempted_run_resumes_ends_in_the_same_bits_and_is_scored(
    cluster, tmp_path, tiny_model, conversations, whole
):
    recipe, run = write_recipe(tmp_path, tiny_model, conversations, SETTINGS), tmp_path / "run"
    submitted = minisft("submit", recipe, "--nodes", "2", "--time", "30", "--gpus-per-node", "0", "--now", **cluster)
    assert submitted.returncode == 0, submitted.stderr
    job, scoring = [line.split()[2] for line in submitted.stdout.splitlines() if line.startswith("submitted: job")]
    log = tmp_path / f"run.train-{job}.log"

    def steps():
        return (run / "metrics.jsonl").exists() and len(losses(run)) >= 10

    def log_text():
        return log.read_text() if log.exists() else f"no log: {slurm(cluster, 'squeue')}"

    wait_until(steps, 180, log_text)
    slurm(cluster, "scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: f"job {job} goes back to the queue" in log_text(), 60, log_text)
    assert not (run / "model").exists()
    wait_until(lambda: not slurm(cluster, "squeue", "--noheader", f"--jobs={job},{scoring}"), 300, log_text)

    said = log_text()
    assert "machine 1 of 2: waiting for machine 0" in said
    assert "SIGUSR1: stopping after this step, with a checkpoint\n" in said
    assert f"resuming from {run / 'checkpoints'}" in said
    assert losses(run) == losses(whole)
    assert len(losses(run)) == 400
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["checkpoints"][-1]["step"] == 400
    assert (run / "report.html").exists()


SIGTERMS = {
    "to the script": ("scancel", "--signal=TERM", "--batch"),
    "by a preemption": ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"),
    "by scontrol requeue": ("scontrol", "requeue"),
}


@pytest.mark.long
@pytest.mark.parametrize("sent", SIGTERMS)
def test_at_sigterm_too_a_run_saves_a_checkpoint_and_resumes_to_the_same_bits(
    cluster, tmp_path, tiny_model, conversations, whole, sent
):
    recipe, run = write_recipe(tmp_path, tiny_model, conversations, SETTINGS), tmp_path / "run"
    words = ("--nodes", "2", "--time", "30", "--gpus-per-node", "0", "--no-evaluate", "--now")
    submitted = minisft("submit", recipe, *words, **cluster)
    assert submitted.returncode == 0, submitted.stderr
    [job] = [line.split()[2] for line in submitted.stdout.splitlines() if line.startswith("submitted: job")]
    log = tmp_path / f"run.train-{job}.log"
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 10, 180, "there is no step")
    command = SIGTERMS[sent]
    if "--partition=urgent" in command:
        slurm(cluster, *command, f"--output={tmp_path / 'urgent.log'}", f"--chdir={tmp_path}")
    else:
        slurm(cluster, *command, job)
    wait_until(lambda: not slurm(cluster, "squeue", "--noheader", f"--jobs={job}"), 300, log.read_text)

    saved = re.findall(r"resuming from \S+/checkpoint-(\d+),", log.read_text())
    assert saved, log.read_text()
    assert all(int(step) >= 10 for step in saved), "the checkpoint of the stop, and not the start"
    assert losses(run) == losses(whole)
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.long
def test_a_job_that_fails_is_not_requeued_and_is_not_scored(cluster, tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    submitted = minisft("submit", recipe, "--nodes", "2", "--time", "30", "--gpus-per-node", "0", "--now",
                        "--sbatch", "hold", **cluster)  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job, scoring = [line.split()[2] for line in submitted.stdout.splitlines() if line.startswith("submitted: job")]
    conversations_gone = tmp_path / "run.recipe.yaml"
    conversations_gone.write_text(conversations_gone.read_text().replace(str(conversations), "gone.jsonl"))
    slurm(cluster, "scontrol", "release", job)
    wait_until(lambda: not slurm(cluster, "squeue", "--noheader", f"--jobs={job},{scoring}"), 120, "it does not end")
    said = (tmp_path / f"run.train-{job}.log").read_text()
    assert "gone.jsonl" in said
    assert "goes back to the queue" not in said
    assert not list(tmp_path.glob("run.evaluate-*.log"))


@pytest.mark.long
def test_slurm_refuses_a_job_before_anything_is_written(cluster, tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    for words, problem in [
        (("--nodes", "2", "--time", "30", "--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("--nodes", "1", "--time", "30", "--cpus-per-task", "64"), "Requested node configuration is not available"),
    ]:
        refused = minisft("submit", recipe, "--gpus-per-node", "0", *words, **cluster)
        assert refused.returncode == 2
        assert "SLURM refuses the job" in refused.stderr
        assert problem in refused.stderr
        assert not list(tmp_path.glob("run*"))
