"""Several machines: what their options must be, and the interface that leads to the first."""

import os
import socket

import pytest

from minisft.errors import UserError
from minisft.training.distributed import local_gpu
from minisft.training.nodes import Nodes, local_processes, parse_nodes, use_network_interface


def test_one_machine_needs_no_options():
    assert parse_nodes(1, None, None) is None
    assert local_processes(6, None) == 6


def test_machines_share_the_processes():
    machines = parse_nodes(2, 1, "gpu01:29500")
    assert machines == Nodes(2, 1, "gpu01", 29500)
    assert machines.endpoint == "gpu01:29500"
    assert Nodes(2, 0, "fe80::1", 80).endpoint == "[fe80::1]:80"
    assert parse_nodes(2, 0, "[fe80::1]:80") == Nodes(2, 0, "fe80::1", 80)
    assert local_processes(16, machines) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((2, None, "a:1"), "--node-rank: is missing"),
        ((2, 0, None), "--rendezvous: is missing"),
        ((1, 0, "a:1"), "--nodes: 1 is fewer than two machines"),
        ((0, 0, "a:1"), "--nodes: 0 is fewer than two machines"),
        ((2, 2, "a:1"), "--node-rank: 2 is none of 2 machines"),
        ((2, -1, "a:1"), "--node-rank: -1 is none"),
        ((2, 0, "gpu01"), "--rendezvous: 'gpu01' is not HOST:PORT"),
        ((2, 0, ":29500"), "is not HOST:PORT"),
        ((2, 0, "gpu01:99999"), "is not HOST:PORT"),
    ],
)
def test_options_that_make_no_sense_are_named(options, said):
    with pytest.raises(UserError, match=said):
        parse_nodes(*options)


def test_processes_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(UserError, match="3 processes cannot be shared by 2 machines"):
        local_processes(3, Nodes(2, 0, "a", 1))


def test_the_interface_that_leads_to_the_first_machine_is_used(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "kept")  # so that it is restored
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_network_interface(Nodes(2, 0, "127.0.0.1", 29500))
    assert os.environ["GLOO_SOCKET_IFNAME"] in [name for _, name in socket.if_nameindex()]
    assert os.environ["NCCL_SOCKET_IFNAME"] == "kept"


def test_a_host_without_an_address_is_named():
    with pytest.raises(UserError, match=r"nowhere.invalid cannot be reached"):
        use_network_interface(Nodes(2, 1, "nowhere.invalid", 29500))


@pytest.mark.parametrize(("local_rank", "visible", "gpu"), [("3", 8, "3"), ("3", 1, "0"), ("0", 1, "0")])
def test_a_process_that_sees_one_gpu_takes_it(local_rank, visible, gpu):
    """As with `srun --gpus-per-task=1`, where each process finds its own GPU as number 0."""
    assert local_gpu(local_rank, visible) == gpu
