"""SLURM: the batch scripts that train a recipe, survive preemption and score the run, and their submission.

Plain sbatch scripts and not submitit: a script of SLURM's own words can be read, changed and sent by hand, and needs
no Python on the machine that sends it. Source of the behaviour: sbatch(1), srun(1), scontrol(1), slurm.conf(5).
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.recipe import Recipe, dump_recipe

# sbatch(1): "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes" and
# "days-hours:minutes:seconds".
_TIMES = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_SHORTEST = 300  # seconds: the signal to stop comes up to 150 s before the end, and the libraries take time to load
# sbatch(1): the signal is sent up to 60 s earlier than asked.
_NOTICE = 90  # seconds before the time limit
# What sbatch says where it has no slurm.conf, and where slurmctld does not answer.
_UNREACHABLE = ("Could not establish a configuration source", "Unable to contact slurm controller")
# Options of sbatch that the script depends on, with the option of `submit` that sets each.
_OWN_OPTIONS = {
    "nodes": "--nodes", "time": "--time", "partition": "--partition", "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task", **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "chdir", "output", "open-mode", "requeue", "no-requeue", "signal", "dependency",
         "kill-on-invalid-dep", "array", "wrap"), ""),
}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks SLURM for.

    Args:
        nodes: Number of machines.
        time: Time limit in one of SLURM's formats, such as 8:00:00 or 2-12 (days-hours).
        partition: Name of the partition; None: the cluster's default.
        gpus_per_node: "N" or "TYPE:N"; None: one for each process of a machine; "0": none, to train on CPUs.
        cpus_per_task: Cores of each machine; None: 4 for each process with a GPU, 1 for each without.
        extra: Other options of sbatch, such as "account=NAME", each without its leading dashes.
        resume: Resume an unfinished run.
        evaluate: Also write a job that scores the run after it is trained, and writes its report.
    """

    nodes: int
    time: str
    partition: str | None = None
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    extra: tuple[str, ...] = ()
    resume: bool = False
    evaluate: bool = True

    def __post_init__(self) -> None:
        for option, number in (("--nodes", self.nodes), ("--cpus-per-task", self.cpus_per_task)):
            if number is not None and number < 1:
                raise UserError(option, f"must be at least 1, and is {number}", "give a whole number from 1 on")
        if time_limit(self.time) < _SHORTEST:
            problem = f"{self.time!r} is {time_limit(self.time)} s, too short to load a model, save it and be requeued"
            raise UserError("--time", problem, f"give at least {_SHORTEST // 60} minutes; 8:00:00 is 8 hours")
        if self.gpus_per_node is not None and not re.fullmatch(r"([\w.-]+:)?\d+", self.gpus_per_node, re.ASCII):
            problem = f"{self.gpus_per_node!r} is neither N nor TYPE:N"
            raise UserError("--gpus-per-node", problem, "such as 8, a100:4, or 0 to train on CPUs")
        if self.partition is not None and not re.fullmatch(r"[^\s#'\"\\]+", self.partition):
            raise UserError("--partition", f"{self.partition!r} is not a name", "`sinfo` lists the partitions")
        for option in self.extra:
            name = re.fullmatch(r"([a-z][a-z-]+)(=[^\n\r\0]+)?", option)
            if name is None:
                problem = f"{option!r} is not a long option of sbatch without its dashes"
                raise UserError("--sbatch", problem, "such as --sbatch account=NAME or --sbatch exclusive")
            if name[1] in _OWN_OPTIONS:
                own = _OWN_OPTIONS[name[1]]
                fix = f"use {own} of `minisft submit`" if own else "leave it out, or change the script that is written"
                raise UserError("--sbatch", f"{name[1]} is set by the script", fix)

    @property
    def gpus(self) -> int | None:
        """Number of GPUs of a machine, if it is given."""
        return None if self.gpus_per_node is None else int(self.gpus_per_node.rpartition(":")[2])


@dataclass(frozen=True)
class Submission:
    """The files that `submit` wrote, and the jobs that it submitted.

    Args:
        script: The batch script that trains.
        recipe: The resolved recipe, which the jobs read.
        evaluation_script: The batch script that scores the run; None if it was not wanted.
        job: Id of the training job; None if it was not submitted.
        evaluation_job: Id of the job that scores the run.
    """

    script: Path
    recipe: Path
    evaluation_script: Path | None = None
    job: int | None = None
    evaluation_job: int | None = None


def time_limit(text: str) -> int:
    """Return a time limit in one of SLURM's formats, in seconds.

    Raises:
        UserError: It has none of these formats. A job without a limit is refused: it would get no signal to stop.
    """
    for pattern in _TIMES:
        if found := re.fullmatch(pattern, text, re.ASCII):
            parts = {name: int(value or 0) for name, value in found.groupdict().items()}
            return sum(_UNITS[name] * value for name, value in parts.items())
    fix = "write hours:minutes:seconds such as 8:00:00, minutes such as 90, or days-hours such as 2-12"
    raise UserError("--time", f"{text!r} is not a time in SLURM's formats", fix)


def processes_of_node(recipe: Recipe, options: SlurmOptions) -> int:
    """Return how many processes each machine of the job runs.

    Raises:
        UserError: They cannot be shared by the machines, have too few GPUs, or the strategy does not allow it.
    """
    training, nodes, gpus = recipe.training, options.nodes, options.gpus
    if training.strategy == "auto" and nodes > 1:
        fix = f"name a strategy; `minisft plan` with --nodes {nodes} says which one"
        raise UserError("training.strategy", "auto tries strategies on a single machine only", fix)
    local = training.processes // nodes
    if local * nodes != training.processes:
        counted = "the number counts the processes of all machines: give a multiple of"
        fix = f"{counted} {nodes}, such as training.processes={nodes * (gpus or 8)}"
        problem = f"{training.processes} process(es) cannot be shared by {nodes} machines"
        raise UserError("training.processes", problem, fix)
    if gpus and local > gpus:
        fix = f"give training.processes={nodes * gpus}, or more machines"
        raise UserError("--gpus-per-node", f"{local} processes on each machine, and {gpus} GPU(s)", fix)
    return local


def submit(recipe: Recipe, options: SlurmOptions, script: Path | None, *, now: bool, force: bool) -> Submission:
    """Check a job, write its scripts and the resolved recipe, and submit it if that is wanted.

    Args:
        recipe: Recipe to train.
        options: What the job asks SLURM for.
        script: Path of the script to write; None: the run folder's with the ending .sbatch.
        now: Submit the jobs.
        force: Replace scripts that exist.

    Raises:
        UserError: The recipe or the options are impossible, a script exists or cannot be written, or SLURM is not there
            or refuses the job.
    """
    from minisft.data.sources import require_sources
    from minisft.run_start import refuse_start

    # 1. Everything that would make the job fail after its time in the queue.
    local = processes_of_node(recipe, options)
    if now and shutil.which("sbatch") is None:
        fix = "run this on a login node of the cluster, or leave --now out to write the script only"
        raise UserError("--now", "sbatch, the command of SLURM that submits jobs, is not installed here", fix)
    require_sources(recipe.data)
    refuse_start(recipe, resume=options.resume)
    output = Path(recipe.output)
    path = Path(f"{output}.sbatch") if script is None else script
    for name in (str(path), str(output), str(Path.cwd()), sys.executable):
        if re.search(r"[\n\r]", name):
            raise UserError(repr(name), "a path in a script cannot hold a line break", "rename the folder")
    scored = path.with_name(f"{path.stem}.evaluate{path.suffix}")
    resolved = path.with_name(f"{path.stem}.recipe.yaml")

    # 2. The texts, and what SLURM says to them.
    texts = {resolved: _recipe_text(recipe), path: training_script(recipe, options, resolved, local)}
    if options.evaluate:
        texts[scored] = evaluation_script(recipe, options, resolved, local)
    for file, text in texts.items():
        if not force and file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(
                file, "exists already, with another content", "pass --force to replace it, or name another --script"
            )
    untested = _test_only([text for file, text in texts.items() if file != resolved], now=now)

    # 3. Write, and submit.
    output.absolute().parent.mkdir(parents=True, exist_ok=True)  # SLURM does not create the folder of the log
    try:
        for file, text in texts.items():
            write_atomically(file, text)
    except OSError as error:
        problem = f"the script cannot be written there ({error.strerror})"
        raise UserError(path, problem, "give --script a file in a folder of your own, or free some space") from None
    written = Submission(path, resolved, scored if options.evaluate else None)
    _say_written(written, recipe, options, local, untested=untested, now=now)
    return _submit_now(written) if now else written


def training_script(recipe: Recipe, options: SlurmOptions, resolved: Path, local: int) -> str:
    """Return the batch script that trains; `resolved` is the file of the recipe, `local` the processes of a machine."""
    run = shlex.quote(recipe.output)
    first = "" if options.resume else "${SLURM_RESTART_COUNT:-0} -gt 0 && "
    words = f'train {shlex.quote(str(resolved))} "${{resume[@]}}"'
    meeting, launched = "", f'srun --kill-on-bad-exit=1 "$python" -m minisft {words} &'
    if options.nodes > 1:
        meeting = _RENDEZVOUS
        launched = (
            # Each task is one machine; bash replaces itself, so that signals of SLURM reach Python.
            'srun --kill-on-bad-exit=1 bash -c \'exec "$@" --node-rank "$SLURM_NODEID"\' minisft \\\n'
            f'  "$python" -m minisft {words} \\\n'
            f'  --nodes {options.nodes} --rendezvous "$MASTER_ADDR:$MASTER_PORT" &'
        )
    return _header(recipe, options, local, options.nodes, "train") + _TRAINING.format(
        python=shlex.quote(sys.executable), meeting=meeting, first=first, run=run, launched=launched
    )


def evaluation_script(recipe: Recipe, options: SlurmOptions, resolved: Path, local: int) -> str:
    """Return the batch script that scores the run on one machine and writes its report."""
    processes = recipe.evaluation.processes or local
    return _header(recipe, options, processes, 1, "evaluate") + _EVALUATION.format(
        python=shlex.quote(sys.executable), recipe=shlex.quote(str(resolved))
    )


_RENDEZVOUS = """
# Rendezvous: the first machine of the job, and a port below the ephemeral ones that differs from job to job. gloo and
# NCCL take the network interface that reaches this machine, unless NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME is set.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
"""
_TRAINING = """
set -euo pipefail
python={python}  # the Python that wrote this script; it needs minisft on every machine
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # since SLURM 22.05, srun does not take it from the job's options
{meeting}
# A requeued job resumes from the newest checkpoint; if training had ended before, nothing is left to do.
if [[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 && -d {run}/model ]]; then exit 0; fi
resume=()
if [[ {first}-e {run}/recipe.yaml ]]; then resume=(--resume); fi

# SIGUSR1 comes 90 s before the time limit, SIGTERM at a preemption: the run saves a checkpoint and stops.
srun_pid="" signals=0
stop() {{ signals=$((signals + 1)); if [[ $srun_pid ]]; then kill -USR1 "$srun_pid" || true; fi; }}
trap stop USR1 TERM

{launched}
srun_pid=$!
while :; do  # a signal ends `wait` early
  seen=$signals status=0
  wait "$srun_pid" || status=$?
  if [[ $signals -eq $seen ]]; then break; fi
done
if [[ $status -eq 0 ]]; then exit 0; fi

# A run that was stopped goes back to the queue, unless the job was cancelled. A preemption with a grace time sends
# SIGTERM to the training only, and is seen from the job's record.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T || true)
preempted=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'PreemptTime=[0-9]' || true)
if [[ $state == RUNNING && ( $signals -gt 0 || $preempted ) ]]; then
  echo "minisft: stopped by SLURM; job $SLURM_JOB_ID goes back to the queue and resumes"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
"""
_EVALUATION = """
set -euo pipefail
python={python}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A requeued job continues: scores that are computed are not computed again.
srun "$python" -m minisft evaluate {recipe}
srun "$python" -m minisft report {recipe}
"""


def _header(recipe: Recipe, options: SlurmOptions, processes: int, nodes: int, verb: str) -> str:
    """Return the first lines of a script, with its options for sbatch.

    sbatch(1) expands % in the name of the log, and takes quotes in these lines as a shell does.
    """
    output = Path(recipe.output)
    log = f"{str(output).replace('%', '%%')}.{verb}-%j.log"
    lines = [
        f"--job-name={shlex.quote(f'{output.name}-{verb}')}",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
    ]
    gpus = options.gpus_per_node
    if gpus is None or (verb == "evaluate" and options.gpus):
        gpus = ((gpus or "").rpartition(":")[0] + ":" + str(processes)).lstrip(":")
    has_gpus = gpus != "0"
    cores = options.cpus_per_task or processes * (4 if has_gpus else 1)
    lines += [f"--cpus-per-task={cores}", *([f"--gpus-per-node={gpus}"] if has_gpus else [])]
    lines += [f"--time={options.time}", *([f"--partition={options.partition}"] if options.partition else [])]
    lines += ["--requeue", *([f"--signal=B:USR1@{_NOTICE}"] if verb == "train" else [])]
    for option in options.extra:
        name, equals, value = option.partition("=")
        lines.append(f"--{name}{equals}{shlex.quote(value) if value else ''}")
    return "".join(["#!/bin/bash\n# Written by `minisft submit`.\n", *(f"#SBATCH {line}\n" for line in lines)])


def _recipe_text(recipe: Recipe) -> str:
    return (
        "# The resolved recipe of a SLURM job, written by `minisft submit`; the job reads it when it starts.\n"
        + dump_recipe(recipe)
    )


def _test_only(scripts: Sequence[str], *, now: bool) -> str:
    """Let SLURM check the scripts; return why it could not, or an empty text.

    Raises:
        UserError: SLURM refuses a script, or it cannot be reached and the jobs are to be submitted.
    """
    if shutil.which("sbatch") is None:
        return "sbatch is not installed here"
    try:
        for text in scripts:
            _sbatch(["--test-only"], text)
    except _SlurmUnreachableError as error:
        if now:
            raise
        return error.problem
    return ""


class _SlurmUnreachableError(UserError):
    """sbatch is installed, and has no configuration or gets no answer from slurmctld."""


def _sbatch(words: Sequence[str], text: str | None = None) -> str:
    """Run sbatch with a script's name, or with its text on stdin; return what it prints.

    Raises:
        UserError: SLURM cannot be reached or refuses the job; the message is SLURM's.
    """
    done = subprocess.run(["sbatch", *words], input=text, capture_output=True, text=True)
    if done.returncode:
        said = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        if signs := [sign for sign in _UNREACHABLE if sign in said]:
            fix = "run this on a login node of the cluster, or leave --now out to write the script only"
            raise _SlurmUnreachableError("sbatch", f"SLURM cannot be reached from here: {signs[0]}", fix)
        fix = (
            "change the options; `sinfo` and `scontrol show partition` show what there is, and --sbatch passes on "
            "options such as account=NAME"
        )
        raise UserError("sbatch", f"SLURM refuses the job: {said or f'exit status {done.returncode}'}", fix)
    return done.stdout.strip()


def _submit_now(written: Submission) -> Submission:
    """Submit the training job, and the evaluation job to start after it."""
    from dataclasses import replace

    from minisft.console import say

    job = _job_id(_sbatch(["--parsable", str(written.script)]))
    say(f"submitted: job {job} trains; `squeue --jobs {job}` shows its state")
    if written.evaluation_script is None:
        return replace(written, job=job)
    after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    scoring = _job_id(_sbatch(["--parsable", *after, str(written.evaluation_script)]))
    say(f"submitted: job {scoring} scores the run once job {job} has ended without an error")
    return replace(written, job=job, evaluation_job=scoring)


def _job_id(printed: str) -> int:
    """Return the number in what `sbatch --parsable` prints: the job's id, and behind a semicolon the cluster's name."""
    return int(printed.splitlines()[-1].partition(";")[0])


def _say_written(
    written: Submission, recipe: Recipe, options: SlurmOptions, local: int, *, untested: str, now: bool
) -> None:
    from minisft.console import say

    limit = timedelta(seconds=time_limit(options.time))
    say(
        f"{options.nodes} machine(s) with {local} process(es) each, {recipe.training.strategy}; "
        f"at the time limit of {limit}, or when it is preempted, the job is requeued and resumes"
    )
    say(
        f"written: {written.script}, for the recipe {written.recipe}"
        + (f", and {written.evaluation_script}, which scores the run" if written.evaluation_script else "")
    )
    if not now:
        scoring = written.evaluation_script
        script = shlex.quote(str(written.script))
        say("next, to train:" if scoring is None else "next, to train only:")
        say(f"  sbatch {script}")
        if scoring is not None:
            say("or to train, and then to score the run:")
            say(f"  job=$(sbatch --parsable {script})")
            say(f"  sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes {shlex.quote(str(scoring))}")
    if untested:
        say(f"SLURM has not tested the script: {untested}")
