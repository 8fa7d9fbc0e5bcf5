"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a temporary folder, ended with the block.

The nodes are named 0x7f000001 and 0x7f000002: inet_aton(3) reads such a name as the address 127.0.0.1 or 127.0.0.2, so
that both are reachable by their names without a line in /etc/hosts.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

NODES = ("0x7f000001", "0x7f000002")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES State=UP MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP MaxTime=60 PriorityTier=2
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def slurm_cluster(folder: Path):
    """Start SLURM in a folder; yield the environment in which its commands, and sbatch, find it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs for root only")
    folder.mkdir()
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    conf = CONF.format(host=socket.gethostname(), port=free_port(), user="root", folder=folder)
    for node in NODES:
        conf += f"NodeName={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN\n"
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # nothing uses it; 22.05 knows no "disabled"
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    munge = ["munged", "--foreground", "--force", *(f"--{name}-file={folder / name}" for name in ("key", "pid", "log"))]
    daemons = [
        [*munge, f"--seed-file={folder / 'seed'}", f"--socket={folder / 'munge.sock'}"],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(daemons):
            log = stack.enter_context((folder / f"{number}-{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(end, daemon)
            if number == 0:
                wait_until((folder / "munge.sock").exists, 20, "munged does not start")
        stack.callback(subprocess.run, ["scancel", "--user=root"], env=environment, capture_output=True, timeout=60)
        wait_until(
            lambda: slurm(environment, "sinfo", "-hN", "-ptest", "-o%T").split() == ["idle"] * 2,
            60,
            "the nodes are not idle",
        )
        yield environment


def end(daemon):
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def slurm(environment, *words):
    """Run a command of SLURM; return what it prints."""
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_until(is_so, seconds, problem):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, problem() if callable(problem) else problem
        time.sleep(0.2)
