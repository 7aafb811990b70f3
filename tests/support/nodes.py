"""Simulated nodes: network namespaces on one bridge, each with its own loopback, interface and address.

They need no root, and end with the process that made them. A rendezvous store for torchrun runs beside them, at
:data:`HEAD`, so that any node may be killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD, PORT = "10.78.0.254", 29400

_STORE = f"""
import time
from torch.distributed import TCPStore
store = TCPStore("{HEAD}", {PORT}, None, True, wait_for_workers=False)
time.sleep(1e6)
"""


class Nodes:
    """Nodes that commands are run on; made by :func:`nodes`.

    Args:
        head: Process that holds the namespace of the bridge.
        holders: A process for each node that holds its namespace.
    """

    def __init__(self, head: subprocess.Popen, holders: list[subprocess.Popen]) -> None:
        self._head, self._holders = head, holders

    def start(self, node: int, *command: object, output: Path, **environment: str) -> subprocess.Popen:
        """Starts a command on a node, in a process group of its own; what it prints is added to a file."""
        with output.open("ab") as file:
            return subprocess.Popen(
                entering(self._holders[node], *command), stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "net0", "TP_SOCKET_IFNAME": "net0", **environment},
            )  # fmt: skip

    def running(self, node: int) -> dict[int, str]:
        """Command lines of the processes on a node, by their ids."""
        holder, found = self._holders[node], {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(place / "ns/net") == namespace(holder) and int(place.name) != holder.pid:
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue
        return found

    def signal(self, node: int, number: int, only: str = "") -> list[int]:
        """Sends a signal to all processes on a node, or to those whose command lines have a text in them."""
        told = [process for process, line in self.running(node).items() if only in line]
        for process in told:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        return told


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Makes nodes, whose addresses are 10.78.0.1 and so on, and a store for rendezvous beside them."""
    started = [subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sleep", "infinity"])]
    try:
        (head,) = started
        wait_for(head, os.readlink("/proc/self/ns/net"))
        for words in (
            "link set lo up",
            "link add net0 type bridge",
            f"addr add {HEAD}/24 dev net0",
            "link set net0 up",
        ):
            subprocess.run(entering(head, "ip", *words.split()), check=True)
        for number in range(1, count + 1):
            holder = subprocess.Popen(entering(head, "unshare", "--net", "sleep", "infinity"))
            started.append(holder)
            wait_for(holder, namespace(head), os.readlink("/proc/self/ns/net"))
            for words in (
                f"link add port{number} type veth peer name peer{number}", f"link set peer{number} netns {holder.pid}",
                f"link set port{number} master net0", f"link set port{number} up",
            ):  # fmt: skip
                subprocess.run(entering(head, "ip", *words.split()), check=True)
            for words in (
                "link set lo up", f"link set peer{number} name net0", f"addr add 10.78.0.{number}/24 dev net0",
                "link set net0 up",
            ):  # fmt: skip
                subprocess.run(entering(holder, "ip", *words.split()), check=True)
        started.append(subprocess.Popen(entering(head, sys.executable, "-c", _STORE)))
        made = Nodes(head, started[1:-1])
        yield made
    finally:
        for node in range(len(started) - 2):
            made.signal(node, signal.SIGKILL)
        for process in reversed(started):
            process.kill()
            process.wait()


def entering(holder: subprocess.Popen, *command: object) -> list[str]:
    """The command line that runs a command where another process is."""
    place = ["nsenter", "--target", str(holder.pid), "--user", "--net", "--preserve-credentials", "--"]
    return [*place, *map(str, command)]


def namespace(process: subprocess.Popen) -> str:
    """What identifies the network that a process is in."""
    return os.readlink(f"/proc/{process.pid}/ns/net")


def wait_for(process: subprocess.Popen, *left: str) -> None:
    """Waits until a process has left networks."""
    while namespace(process) in left:
        assert process.poll() is None
        time.sleep(0.02)
