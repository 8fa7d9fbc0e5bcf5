"""Several machines that train together: the rank of this one, the rendezvous, and the network interface."""

import os
import socket
import time
from dataclasses import dataclass

from minisft.console import say
from minisft.errors import UserError
from minisft.run_folder import RunFolder

_LOOK = 1.0  # seconds between two attempts to reach machine 0
_SEEN_WITHIN = 30.0  # seconds in which a shared folder shows what another machine wrote


@dataclass(frozen=True)
class Nodes:
    """`count` machines meet at `host:port` of machine 0; this one is number `rank`."""

    count: int
    rank: int
    host: str
    port: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError("--nodes", f"{self.count} is fewer than two machines", "give 2 or more, or leave it out")
        if not 0 <= self.rank < self.count:
            raise UserError(
                "--node-rank",
                f"{self.rank} is none of {self.count} machines",
                f"number them from 0 to {self.count - 1}",
            )

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_nodes(nodes: int, rank: int | None, rendezvous: str | None) -> Nodes | None:
    """Read `--nodes`, `--node-rank` and `--rendezvous`; None for a single machine.

    Raises:
        UserError: One is missing or invalid.
    """
    if nodes == 1 and rank is None and rendezvous is None:
        return None
    for option, value, fix in (
        ("--node-rank", rank, "number the machines from 0; the first prepares the data and writes the results"),
        ("--rendezvous", rendezvous, "give HOST:PORT of machine 0, the same on all of them"),
    ):
        if value is None:
            raise UserError(option, f"is missing, with --nodes {nodes}", fix)
    host, _, port = str(rendezvous).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError("--rendezvous", f"{rendezvous!r} is not HOST:PORT", "such as gpu01:29500")
    return Nodes(nodes, int(rank or 0), host.strip("[]"), int(port))


def local_processes(processes: int, nodes: Nodes | None) -> int:
    """Return this machine's share of all processes.

    Raises:
        UserError: The machines cannot have equal shares.
    """
    if nodes is None:
        return processes
    if processes % nodes.count:
        raise UserError(
            "training.processes",
            f"{processes} processes cannot be shared by {nodes.count} machines",
            f"it counts those of all machines: give a multiple of {nodes.count}",
        )
    return processes // nodes.count


def use_network_interface(nodes: Nodes) -> None:
    """Make gloo and NCCL use the network interface that reaches machine 0, unless the environment names another.

    By default gloo takes the address that the name of this machine resolves to, which is often the loopback.

    Raises:
        UserError: The host has no address, or cannot be reached.
    """
    interface = _interface_to(nodes.host, nodes.port)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(variable, interface)


def wait_for_first_node(nodes: Nodes, run: RunFolder) -> None:
    """Wait until machine 0 has prepared the data and listens.

    Raises:
        UserError: The run folder is not the one that machine 0 writes to.
    """
    say(f"machine {nodes.rank} of {nodes.count}: waiting for machine 0 at {nodes.endpoint}")
    while not _listens(nodes.host, nodes.port):
        time.sleep(_LOOK)
    end = time.monotonic() + _SEEN_WITHIN
    while not run.recipe.exists():
        if time.monotonic() > end:
            problem = "machine 0 has started, and its run folder is not visible here"
            raise UserError(run.recipe, problem, "name an `output` folder that all machines share")
        time.sleep(_LOOK)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _interface_to(host: str, port: int) -> str | None:
    """Return the interface from which packets to `host` would be sent; None if no interface has that address."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it only looks up the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            "--rendezvous",
            f"{host} cannot be reached: {error}",
            "give a name or address of machine 0 that all can reach",
        ) from None
    names = [name for name, found in psutil.net_if_addrs().items() if own in (entry.address for entry in found)]
    return names[0] if names else None
