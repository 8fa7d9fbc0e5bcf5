"""`minisft submit`: the text of its scripts, and every mistake that it refuses before a job waits in a queue."""

import os
import shutil
import subprocess

import pytest

import minisft
from minisft.cli import main
from minisft.recipe import load_recipe
from minisft.slurm import time_limit


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """Let only the folder `bin` and the shell's own commands be found, so that no SLURM of the machine is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def sbatch(no_slurm, tmp_path):
    """Return a function that writes a fake sbatch, which keeps what it is given in a file that is returned."""

    def write(body):
        said = tmp_path / "said.txt"
        fake = no_slurm / "sbatch"
        fake.write_text(f'#!/bin/sh\necho "$@" >> "{said}"\n{body}\n')
        fake.chmod(0o755)
        return said

    return write


def submit(recipe, *words):
    return main(["submit", str(recipe), *words])


def scripts_of(tmp_path):
    return sorted(path.name for path in tmp_path.glob("run.*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], []),
        (["training.processes=8", "training.strategy=zero3"], ["--gpus-per-node", "a100:8"]),
        (["training.processes=16", "training.strategy=zero2"], ["--nodes", "2", "--partition", "gpu"]),
        (
            ["training.processes=2"],
            ["--nodes", "2", "--gpus-per-node", "0", "--resume", "--sbatch", "comment=it's 5 #"],
        ),
        ([], ["--no-evaluate", "--sbatch", "exclusive", "--sbatch", "account=me"]),
    ],
)
def test_the_scripts_are_valid_shell(recipe_file, tmp_path, overrides, words, monkeypatch):
    if "--resume" in words:
        assert main(["prepare", str(recipe_file)]) == 0
    assert submit(recipe_file, *overrides, "--time", "8:00:00", *words) == 0
    scripts = list(tmp_path.glob("*.sbatch"))
    assert len(scripts) == (1 if "--no-evaluate" in words else 2)
    monkeypatch.setenv("PATH", os.defpath)
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--severity=warning", script], check=True)


def test_the_script_says_what_the_options_ask(recipe_file, tmp_path):
    words = [
        "--nodes",
        "2",
        "--time",
        "2-12",
        "--partition",
        "gpu",
        "--gpus-per-node",
        "a100:4",
        "--sbatch",
        "account=me",
    ]
    assert submit(recipe_file, "training.processes=8", "training.strategy=zero2", *words) == 0
    text = (tmp_path / "run.sbatch").read_text()
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=a100:4", "--cpus-per-task=16", "--time=2-12",
        "--partition=gpu", "--requeue", "--signal=B:USR1@90", "--open-mode=append", "--account=me",
        f"--output={tmp_path}/run.train-%j.log",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert '--nodes 2 --rendezvous "$MASTER_ADDR:$MASTER_PORT"' in text
    scoring = (tmp_path / "run.evaluate.sbatch").read_text()
    assert "#SBATCH --nodes=1\n" in scoring
    assert "-m minisft evaluate" in scoring
    assert "-m minisft report" in scoring


def test_one_machine_needs_no_rendezvous_and_cpus_no_gpu(recipe_file, tmp_path):
    assert submit(recipe_file, "--time", "90", "--gpus-per-node", "0") == 0
    text = (tmp_path / "run.sbatch").read_text()
    assert "MASTER_ADDR" not in text
    assert "gpus" not in text


def test_the_job_reads_the_recipe_as_it_was_submitted(recipe_file, tmp_path):
    assert submit(recipe_file, "training.epochs=3", "--time", "90") == 0
    assert load_recipe(tmp_path / "run.recipe.yaml") == load_recipe(recipe_file, ["training.epochs=3"])


def run_script(folder, script, commands, **environment):
    """Run a batch script with programs of our own in place of SLURM's; `commands` holds their shell text by name."""
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    path = {"PATH": f"{folder}:{os.defpath}"}
    return subprocess.run(
        ["bash", script], env={**os.environ, **slurm, **path, **environment}, capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def two_machines(recipe_file, tmp_path):
    assert submit(recipe_file, "training.processes=2", "--nodes", "2", "--time", "90") == 0
    return tmp_path / "run.sbatch"


HOSTS = '[[ $1 == requeue ]] && echo "REQUEUE $2"; [[ $2 == hostnames ]] && printf "gpu07\\ngpu08\\n"; true'


def test_the_first_host_and_the_job_id_make_the_rendezvous(two_machines, no_slurm):
    done = run_script(no_slurm, two_machines, {"scontrol": HOSTS, "srun": 'echo "$@"'})
    assert done.returncode == 0, done.stderr
    assert "--nodes 2 --rendezvous gpu07:20345" in done.stdout
    assert "--resume" not in done.stdout


def test_a_requeued_job_resumes_a_run_that_has_begun(two_machines, no_slurm, tmp_path):
    commands = {"scontrol": HOSTS, "srun": 'echo "$@"'}
    assert "--resume" not in run_script(no_slurm, two_machines, commands, SLURM_RESTART_COUNT="1").stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    assert "--resume" in run_script(no_slurm, two_machines, commands, SLURM_RESTART_COUNT="1").stdout
    assert "--resume" not in run_script(no_slurm, two_machines, commands).stdout
    (tmp_path / "run" / "model").mkdir()
    done = run_script(no_slurm, two_machines, commands, SLURM_RESTART_COUNT="2")
    assert (done.returncode, done.stdout) == (0, "")  # it had ended: nothing is trained again


STOPPED_RUN = 'trap "exit 1" USR1; kill -{} "$PPID"; for _ in {{1..100}}; do sleep 0.1; done'


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_job_that_is_asked_to_stop_is_requeued(two_machines, no_slurm, number):
    commands = {"scontrol": HOSTS, "squeue": "echo RUNNING", "srun": STOPPED_RUN.format(number)}
    done = run_script(no_slurm, two_machines, commands)
    assert done.returncode == 0, done.stderr
    assert "REQUEUE 12345" in done.stdout


def test_a_preemption_that_reaches_only_the_training_requeues_the_job(two_machines, no_slurm):
    record = f'{HOSTS}; [[ $2 == job ]] && echo "PreemptEligibleTime=None PreemptTime=2026-01-01T00:00:00"; true'
    done = run_script(no_slurm, two_machines, {"scontrol": record, "squeue": "echo RUNNING", "srun": "exit 1"})
    assert "REQUEUE 12345" in done.stdout


@pytest.mark.parametrize(
    ("state", "srun", "status"),
    [
        ("COMPLETING", STOPPED_RUN.format("TERM"), 1),  # cancelled by the user
        ("RUNNING", "exit 2", 2),  # a mistake in the recipe
        ("RUNNING", "exit 0", 0),
    ],
)
def test_a_job_that_is_cancelled_fails_or_ends_is_not_requeued(two_machines, no_slurm, state, srun, status):
    commands = {"scontrol": f"{HOSTS}; echo PreemptTime=None", "squeue": f"echo {state}", "srun": srun}
    done = run_script(no_slurm, two_machines, commands)
    assert "REQUEUE" not in done.stdout
    assert done.returncode == status


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("8:00:00", 28800), ("2-12", 216000), ("1-0:30", 88200), ("1-00:00:05", 86405)],
)
def test_times_are_those_of_slurm(text, seconds):
    assert time_limit(text) == seconds


@pytest.mark.parametrize(
    ("words", "where", "problem"),
    [
        (["--time", "8h"], "--time", "'8h' is not a time in SLURM's formats"),
        (["--time", "8:"], "--time", "not a time"),
        (["--time", "1:00"], "--time", "too short"),
        (["--time", "UNLIMITED"], "--time", "not a time"),
        ([], "submit", "required: --time"),
        (["--time", "90", "--nodes", "0"], "submit", "must be at least 1, and is 0"),
        (["--time", "90", "--nodes", "2"], "training.processes", "cannot be shared by 2 machines"),
        (["--time", "90", "--gpus-per-node", "many"], "--gpus-per-node", "neither N nor TYPE:N"),
        (["--time", "90", "training.processes=4", "--gpus-per-node", "2"], "--gpus-per-node", "4 processes"),
        (
            ["--time", "90", "--nodes", "2", "training.processes=2", "training.strategy=auto"],
            "training.strategy",
            "auto",
        ),
        (["--time", "90", "--sbatch", "account me\n#SBATCH"], "--sbatch", "is not a long option"),
        (["--time", "90", "--sbatch", "nodes=4"], "--sbatch", "nodes is set by the script"),
        (["--time", "90", "--partition", "a b"], "--partition", "is not a name"),
        (["--time", "90", "training.epoch=3"], "training.epoch", "did you mean"),
        (["--time", "90", "data.source=gone.jsonl"], "gone.jsonl", "gone.jsonl"),
        (["--time", "90", "--resume"], "run", "there is no run to resume"),
        (["--time", "90", "--now"], "--now", "is not installed here"),
        (["--time", "90", "--script", "/proc/job.sbatch"], "/proc/job.sbatch", "cannot be written there"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(recipe_file, tmp_path, capsys, words, where, problem):
    assert submit(recipe_file, *words) == 2
    said = capsys.readouterr().err
    assert where in said.partition("\n")[0]
    assert problem in said
    assert "Fix:" in said
    assert scripts_of(tmp_path) == []


def test_a_script_is_replaced_only_by_force(recipe_file, tmp_path, capsys):
    assert submit(recipe_file, "--time", "90") == 0
    assert submit(recipe_file, "--time", "90") == 0  # the same content
    before = (tmp_path / "run.sbatch").read_text()
    assert submit(recipe_file, "--time", "91") == 2
    assert "run.sbatch: exists already" in capsys.readouterr().err
    assert (tmp_path / "run.sbatch").read_text() == before
    assert submit(recipe_file, "--time", "91", "--force") == 0
    assert "#SBATCH --time=91\n" in (tmp_path / "run.sbatch").read_text()


def test_a_refusal_of_slurm_is_passed_on(recipe_file, tmp_path, sbatch, capsys):
    sbatch('echo "sbatch: error: invalid partition specified: \033[31mgpu" >&2; exit 1')
    assert submit(recipe_file, "--time", "90", "--partition", "gpu") == 2
    said = capsys.readouterr().err
    assert r"sbatch: SLURM refuses the job: invalid partition specified: \x1b[31mgpu" in said
    assert scripts_of(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    ["fatal: Could not establish a configuration source", "error: Batch job submission failed: Unable to contact slurm "
     "controller (connect failure)"],
)  # fmt: skip
def test_where_slurm_cannot_be_reached_the_script_is_written_and_not_submitted(
    recipe_file, tmp_path, sbatch, capsys, words
):
    sbatch(f'echo "sbatch: {words}" >&2; exit 1')
    assert submit(recipe_file, "--time", "90", "--now") == 2
    assert "sbatch: SLURM cannot be reached from here" in capsys.readouterr().err
    assert scripts_of(tmp_path) == []
    assert submit(recipe_file, "--time", "90") == 0
    assert "SLURM has not tested the script: SLURM cannot be reached from here" in capsys.readouterr().out
    assert len(scripts_of(tmp_path)) == 3


def test_jobs_are_tested_submitted_and_returned(recipe_file, tmp_path, sbatch, capsys):
    said = sbatch(
        'case "$*" in *test-only*) cat > /dev/null;; *evaluate*) echo "12;main";; *) echo 11;; esac'.replace(
            "cat", "/bin/cat"
        )
    )
    done = minisft.submit(recipe_file, {"training.epochs": 3}, time="90", gpus_per_node=0, now=True)
    assert (done.job, done.evaluation_job) == (11, 12)
    assert done.script == tmp_path / "run.sbatch"
    script, scoring = tmp_path / "run.sbatch", tmp_path / "run.evaluate.sbatch"
    assert said.read_text().splitlines() == [
        "--test-only",
        "--test-only",
        f"--parsable {script}",
        f"--parsable --dependency=afterok:11 --kill-on-invalid-dep=yes {scoring}",
    ]
    printed = capsys.readouterr().out
    assert "submitted: job 11 trains" in printed
    assert "submitted: job 12 scores the run once job 11 has ended" in printed


def test_paths_with_spaces_quotes_and_percent_signs_survive(recipe_file, tmp_path, no_slurm):
    output = tmp_path / "it's 100% mine"
    assert submit(recipe_file, f"output={output}", "--time", "90", "--no-evaluate") == 0
    text = (tmp_path / "it's 100% mine.sbatch").read_text()
    assert """/it'"'"'s 100%% mine.train-%j.log'""" in text
    done = run_script(no_slurm, f"{output}.sbatch", {"srun": 'printf "%s\\n" "$@"'})
    assert f"{output}.recipe.yaml" in done.stdout.splitlines()
