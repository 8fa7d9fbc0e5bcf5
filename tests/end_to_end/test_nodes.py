"""Several machines: two network namespaces as two hosts, joined by a cable of their own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import minisft, write_recipe

NAMES = ("minisft-a", "minisft-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
SETTINGS = "{epochs: 2, batch_size: 4, strategy: zero2, processes: 2, learning_rate: 1.0e-2, precision: fp32}"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def connect(names):
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "left", "netns", names[0], "type", "veth", "peer", "name", "right", "netns", names[1])
    for name, cable, address in zip(names, ("left", "right"), ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")


@contextlib.contextmanager
def two_hosts():
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here to make network namespaces with")
    names = [f"{name}-{os.getpid()}" for name in NAMES]
    try:
        try:
            connect(names)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(host, *words):
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "minisft", *map(str, words)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train_on(hosts, recipe, *words):
    meet = ("--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:29517")
    second = start_on(hosts[1], "train", recipe, *words, *meet, "--node-rank", "1")
    first = start_on(hosts[0], "train", recipe, *words, *meet, "--node-rank", "0")
    try:
        return [(process.communicate(timeout=240)[0], process.returncode) for process in (first, second)]
    finally:
        for process in (first, second):
            process.kill()


@pytest.mark.long
def test_two_hosts_take_the_steps_of_one(tmp_path, tiny_model, conversations):
    (tmp_path / "one").mkdir()
    alone = minisft("train", write_recipe(tmp_path / "one", tiny_model, conversations, SETTINGS))
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "two").mkdir()
    recipe = write_recipe(tmp_path / "two", tiny_model, conversations, SETTINGS)
    with two_hosts() as hosts:
        ended = train_on(hosts, recipe)
        for said, status in ended:
            assert status == 0, said
    assert "machine 1 of 2: waiting for machine 0 at 10.213.7.1:29517" in ended[1][0]
    assert "machine 1 of 2: done; machine 0 has the results" in ended[1][0]
    steps = [
        [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(steps[0]) == len(steps[1]) == 8
    for ours, expected in zip(steps[1], steps[0], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-4)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)
    one, two = (load_file(tmp_path / name / "run/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


@pytest.mark.long
def test_an_error_on_one_host_is_printed_there_and_ends_both(tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    with two_hosts() as hosts:
        away = start_on(
            hosts[1], "train", recipe, f"output={tmp_path / 'elsewhere'}", "--nodes", "2", "--node-rank", "1",
            "--rendezvous", f"{ADDRESSES[0]}:29518",
        )  # fmt: skip
        here = start_on(
            hosts[0], "train", recipe, "--nodes", "2", "--node-rank", "0", "--rendezvous", f"{ADDRESSES[0]}:29518"
        )
        try:
            said = away.communicate(timeout=120)[0]
        finally:
            for process in (away, here):
                process.kill()
            here.communicate()
    assert away.returncode == 2
    assert "name an `output` folder that all machines share" in said
    assert "Traceback" not in said


@pytest.mark.long
def test_one_host_that_is_asked_to_stop_saves_and_ends_both(tmp_path, tiny_model, conversations):
    """As a scheduler that takes one machine away: both go on together from the checkpoint, to the same weights."""
    recipes = {}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        recipes[name] = write_recipe(tmp_path / name, tiny_model, conversations, SETTINGS)
    more = ("training.epochs=20", "training.save_every=1000")
    alone = minisft("train", recipes["whole"], *more)
    assert alone.returncode == 0, alone.stderr
    meet = ("--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:29520")
    with two_hosts() as hosts:
        second = start_on(hosts[1], "train", recipes["stopped"], *more, *meet, "--node-rank", "1")
        first = start_on(hosts[0], "train", recipes["stopped"], *more, *meet, "--node-rank", "0")
        try:
            wait_for_steps(tmp_path / "stopped/run/metrics.jsonl", 3, first)
            second.send_signal(signal.SIGTERM)
            ended = [process.communicate(timeout=60)[0] for process in (first, second)]
        finally:
            for process in (first, second):
                process.kill()
        assert [first.returncode, second.returncode] == [1, 1], ended
        assert all("--resume continues from it" in said for said in ended)
        for said, status in train_on(hosts, recipes["stopped"], *more, "--resume"):
            assert status == 0, said
    whole, stopped = (load_file(tmp_path / name / "run/model/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.allclose(whole[key], stopped[key], atol=1e-5) for key in whole)


def wait_for_steps(metrics, count, process):
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.long
def test_a_host_that_is_lost_ends_the_other_with_an_error(tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    more = ("training.epochs=500", "--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:29519")
    with two_hosts() as hosts:
        lost = start_on(hosts[1], "train", recipe, *more, "--node-rank", "1")
        here = start_on(hosts[0], "train", recipe, *more, "--node-rank", "0")
        try:
            wait_for_steps(tmp_path / "run/metrics.jsonl", 6, here)
            lost.kill()  # the launcher; its workers die with it
            killed_at = time.monotonic()
            said = here.communicate(timeout=120)[0]
        finally:
            for process in (lost, here):
                process.kill()
    assert here.returncode == 1
    assert time.monotonic() - killed_at < 30
    assert "a training process failed" in said
