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
print("listens", flush=True)
time.sleep(1e6)
"""


class Nodes:
    """Nodes that commands are run on; made by :func:`nodes`.

    Args:
        holders: A process for each node that holds its namespace.
    """

    def __init__(self, holders: list[subprocess.Popen[bytes]]) -> None:
        self._holders = holders

    def start(self, node: int, *command: object, output: Path, **environment: str) -> subprocess.Popen[bytes]:
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
                if str((place / "ns/net").readlink()) == namespace(holder) and int(place.name) != holder.pid:
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue
        return found

    def signal(self, node: int, number: int, but: str = "\0") -> list[int]:
        """Sends a signal to all processes on a node but those whose command lines have a text in them."""
        told = [process for process, line in self.running(node).items() if but not in line]
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
        wait_for(head)
        ip(head, "link set lo up", "link add net0 type bridge", f"addr add {HEAD}/24 dev net0", "link set net0 up")
        for number in range(1, count + 1):
            holder = subprocess.Popen(entering(head, "unshare", "--net", "sleep", "infinity"))
            started.append(holder)
            wait_for(holder)
            ip(head, f"link add port{number} type veth peer name peer{number}")
            ip(head, f"link set peer{number} netns {holder.pid}")
            ip(head, f"link set port{number} master net0", f"link set port{number} up")
            ip(holder, "link set lo up", f"link set peer{number} name net0")
            ip(holder, f"addr add 10.78.0.{number}/24 dev net0", "link set net0 up")
        made = Nodes(started[1:])
        store = subprocess.Popen(entering(head, sys.executable, "-c", _STORE), stdout=subprocess.PIPE)
        started.append(store)
        assert store.stdout is not None
        assert store.stdout.readline() == b"listens\n"
        yield made
        for node in range(count):
            made.signal(node, signal.SIGKILL)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def ip(holder: subprocess.Popen[bytes], *commands: str) -> None:
    """Runs commands of the program ``ip`` where a process is."""
    for words in commands:
        subprocess.run(entering(holder, "ip", *words.split()), check=True)


def entering(holder: subprocess.Popen[bytes], *command: object) -> list[str]:
    """The command line that runs a command where another process is."""
    place = ["nsenter", "--target", str(holder.pid), "--user", "--net", "--preserve-credentials", "--"]
    return [*place, *map(str, command)]


def namespace(process: subprocess.Popen[bytes]) -> str:
    """What identifies the network that a process is in."""
    return str(Path(f"/proc/{process.pid}/ns/net").readlink())


def wait_for(holder: subprocess.Popen[bytes]) -> None:
    """Waits until a process has made its place and does nothing but hold it."""
    while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
        assert holder.poll() is None
        time.sleep(0.02)
