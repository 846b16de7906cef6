"""A network, a host name and a mount table of its own for each node of a sandbox.

The bridge lies in the *controller's* namespace, so the machine's own network stays untouched; clients run there too.
Entering is by ``nsenter --net``, not ``ip netns exec``: the latter mounts a fresh /sys that hides the cgroups.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from carrel.errors import CarrelError
from carrel.process import CommandError, run

CONTROLLER_ADDRESS = "10.77.0.1"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


def address(index: int) -> str:
    """Return the address of the node with this index, from 0."""
    return f"10.77.0.{11 + index}"


class Network:
    """Namespaces of one sandbox; ``tag`` is unique on the machine and short: interface names have 15 characters."""

    def __init__(self, tag: str, nodes: Sequence[str]) -> None:
        """Name the namespaces; nothing is made yet."""
        self._tag = tag
        self._nodes = tuple(nodes)

    @property
    def controller(self) -> str:
        return f"{self._tag}-ctl"

    def make(self) -> None:
        ctl = self.controller
        for command in (
            f"ip netns add {ctl}",
            f"ip -n {ctl} link set lo up",
            f"ip -n {ctl} link add br0 type bridge",
            f"ip -n {ctl} addr add {CONTROLLER_ADDRESS}/24 dev br0",
            f"ip -n {ctl} link set br0 up",
        ):
            run(command.split())
        for index, node in enumerate(self._nodes):
            space, veth = self._space(node), f"v{index}"
            for command in (
                f"ip netns add {space}",
                f"ip -n {space} link set lo up",
                f"ip -n {ctl} link add {veth} type veth peer name eth0 netns {space}",
                f"ip -n {ctl} link set {veth} master br0 up",
                f"ip -n {space} addr add {address(index)}/24 dev eth0",
                f"ip -n {space} link set eth0 up",
            ):
                run(command.split())

    def remove(self) -> None:
        """Delete the namespaces; those that are absent are fine."""
        for space in [*(self._space(node) for node in self._nodes), self.controller]:
            if (_NAMESPACES / space).exists():
                try:
                    run(["ip", "netns", "delete", space])
                except CommandError:
                    continue

    def in_node(self, node: str, command: Sequence[str], *, hosts: Path) -> tuple[str, ...]:
        """Return a command that becomes ``command`` on the node: its network, host name and /etc/hosts."""
        prepare = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        own = ("unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", prepare, node, str(hosts))
        return enter(self._space(node), (*own, *command))

    def hosts(self, controller_host: str) -> str:
        """Return the nodes' /etc/hosts."""
        lines = ["127.0.0.1 localhost", f"{CONTROLLER_ADDRESS} {controller_host}"]
        lines += [f"{address(index)} {node}" for index, node in enumerate(self._nodes)]
        return "\n".join(lines) + "\n"

    def _space(self, node: str) -> str:
        return f"{self._tag}-{node}"


def enter(space: str, command: Sequence[str]) -> tuple[str, ...]:
    """Return a command that runs ``command`` in a network namespace."""
    return ("nsenter", f"--net={_NAMESPACES / space}", "--", *command)


def join(space: str) -> None:
    """Move this process, and all that it will start, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / space).open("rb") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise CarrelError(f"setns to {space}: {os.strerror(ctypes.get_errno())}")
