"""Bytes sent: what is counted, held against the collectives' definitions and the bytes of the sockets themselves."""

import contextlib
import json
import os
import socket
import stat
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from minisft.training.step_metrics import bytes_sent, size_in_bytes, start_counting

NUMBERS = 1_000_000  # fp32: 4 MB
MB = 4 * NUMBERS
BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's tcp_info


def socket_bytes():
    """What all TCP sockets of this process have sent."""
    total = 0
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if not stat.S_ISSOCK(os.fstat(int(path.name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as one:
                if one.type == socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, BYTES_SENT)[0]
    return total


def collectives():
    whole, part = torch.zeros(2 * NUMBERS), torch.ones(NUMBERS)
    yield "all_reduce", lambda: distributed.all_reduce(part)
    yield "all_gather", lambda: distributed.all_gather([torch.empty(NUMBERS), torch.empty(NUMBERS)], part)
    yield "all_gather_single", lambda: distributed.all_gather_into_tensor(whole, part)
    yield "reduce_scatter", lambda: distributed.reduce_scatter_tensor(part, whole)
    yield "broadcast", lambda: distributed.broadcast(part, 0)
    yield "barrier", lambda: distributed.barrier()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(NUMBERS, 1, bias=False))
    yield "ddp", lambda: model(torch.ones(1, NUMBERS)).sum().backward()


def work(rank, folder):
    start_counting()
    start_counting()  # a second time changes nothing
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, collective in collectives():
        distributed.barrier()
        counted, seen = bytes_sent(), socket_bytes() if sys.platform == "linux" else 0
        collective()
        distributed.barrier()  # a sender is done when the kernel has its bytes; a receiver, when they have arrived
        found[name] = (bytes_sent() - counted, (socket_bytes() if sys.platform == "linux" else 0) - seen)
    distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("communication")
    spawn(work, (str(folder),), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all_reduce", MB), ("all_gather", MB), ("all_gather_single", MB), ("reduce_scatter", MB),
        ("broadcast", MB / 2), ("barrier", 0), ("ddp", MB),
    ],
)  # fmt: skip
def test_what_is_counted(found, name, expected):
    assert [process[name][0] for process in found] == [expected, expected]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tcp_info")
@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "all_gather_single", "broadcast", "ddp"])
def test_bytes_on_the_sockets_equal_the_count(found, name):
    """Gloo sends over sockets here; its reduce-scatter sends more than it must, and is left out."""
    seen = sum(process[name][1] for process in found)
    if not any(process["all_reduce"][1] for process in found):
        pytest.skip("this kernel's sockets do not say what they sent")
    assert seen == pytest.approx(sum(process[name][0] for process in found), rel=0.02)


def test_sizes():
    assert size_in_bytes([torch.zeros(3), [torch.zeros(2, dtype=torch.bfloat16)]]) == 16
