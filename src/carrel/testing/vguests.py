"""What runs in the virtual machines of a vcsim: nothing does, so this plays their operating systems.

It looks at vcsim as its administrator, and at nothing of Carrel's. A machine that is switched on *boots*: what its
tools would read is read (``guestinfo.carrel.*``), the address that it asks of its network is told to vCenter, and a
real slurmd is started with exactly the ``slurm.conf`` that it was handed. It has a PID namespace of its own, so that to
switch the machine off ends it with all of its steps and tasks, as power does.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess  # slurmd outlives the call, as it would in a guest
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from carrel.process import children
from carrel.testing import vcsim as at
from carrel.testing.vcsim import Certificates, Vcsim

LOOK_PERIOD_S = 0.1
_TOLD = "guestinfo.carrel."
_SBIN = "/usr/sbin:/sbin"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's machine, as vCenter has it."""

    name: str
    host: str
    on: bool
    cpus: int
    address: str
    told: dict[str, str]


def own_address() -> str:
    """Return an address of this machine that is no loopback one, which Carrel takes for no guest's; empty: none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; to connect a datagram socket sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


class GuestSystems:
    """All guests of one owner."""

    def __init__(self, server: Vcsim, certificates: Certificates, *, owner: str, where: Path) -> None:
        """Watch nothing yet.

        Args:
            server: Where the machines are.
            certificates: Of the server.
            owner: Whose guests these are.
            where: A directory for each node goes here, as its slurm.conf says.
        """
        self.mute: set[str] = set()
        """Domains whose guests boot, and run no slurmd."""
        self.lease = ""
        """What the network gives to those that ask it: all have it, and ports of their own."""
        self.most: Counter[str] = Counter()
        """The most CPUs that machines had at once, by host."""
        self.most_of_run: Counter[str] = Counter()
        """The most machines that a run had at once."""
        self.failures: list[str] = []
        self._server, self._certificates = server, certificates
        self._mark = f"carrel-{owner}-"
        self._where = where
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator["GuestSystems"]:
        """Play them while the context is open; whatever runs then is switched off."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
            for name in list(self._running):
                self._lose_power(name)

    def machines(self) -> list[Machine]:
        return at.with_admin(self._server.port, self._certificates, self._look)

    def switch_off(self, name: str) -> None:
        """Do what a person might at vCenter."""
        at.with_admin(
            self._server.port,
            self._certificates,
            lambda instance: at.done(self._ref(instance, name).PowerOffVM_Task()),
        )

    def _watch(self) -> None:
        from pyVim.connect import Disconnect  # noqa: PLC0415  # an extra
        from pyVmomi import vmodl  # noqa: PLC0415  # likewise

        instance = at.connect(self._server.port, self._certificates)
        try:
            while not self._over.wait(LOOK_PERIOD_S):
                try:
                    self._follow(instance)
                except vmodl.fault.ManagedObjectNotFound:
                    continue  # a machine vanished while it was looked at
                except Exception as error:  # noqa: BLE001  # nobody else would hear of it
                    self.failures.append(repr(error))
        finally:
            Disconnect(instance)
            instance._stub.DropConnections()  # noqa: SLF001  # nothing else closes them

    def _follow(self, instance: Any) -> None:
        machines = self._look(instance)
        on = {machine.name: machine for machine in machines if machine.on}
        for name in self._running.keys() - on.keys():
            self._lose_power(name)
        for name in on.keys() - self._running.keys():
            self._boot(instance, on[name])
        cpus: Counter[str] = Counter()
        for machine in machines:
            cpus[machine.host] += machine.cpus
        self.most |= cpus
        self.most_of_run |= Counter(machine.name.removeprefix(self._mark).rpartition(".")[0] for machine in machines)

    def _look(self, instance: Any) -> list[Machine]:
        from pyVmomi import vmodl  # noqa: PLC0415  # an extra

        folder = instance.content.searchIndex.FindByInventoryPath(f"DC0/vm/{at.FOLDER}")
        found = []
        for ref in folder.childEntity:
            with contextlib.suppress(vmodl.fault.ManagedObjectNotFound):  # it may vanish while it is looked at
                if ref.name.startswith(self._mark):
                    found.append(_machine(ref))
        return found

    def _ref(self, instance: Any, name: str) -> Any:
        return instance.content.searchIndex.FindByInventoryPath(f"DC0/vm/{at.FOLDER}/{name}")

    def _boot(self, instance: Any, machine: Machine) -> None:
        node = machine.told["node_name"]
        if machine.told["dhcp"] == "yes":
            at.set_address(instance, f"DC0/vm/{at.FOLDER}/{machine.name}", self.lease)
        home = self._where / node
        shutil.rmtree(home, ignore_errors=True)  # the disk of another machine
        (home / "spool").mkdir(parents=True)
        conf = home / "slurm.conf"
        conf.write_text(machine.told["slurm_conf"])
        program = ["slurmd", "-D", "-N", node, "-f", str(conf)]
        if machine.told.get("domain") in self.mute:
            program = ["sleep", "infinity"]
        own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        env = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"}
        env.pop("SLURM_CONF", None)
        with (home / "slurmd.stderr").open("wb") as log:
            self._running[machine.name] = subprocess.Popen(
                [*own, *program], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/"
            )

    def _lose_power(self, name: str) -> None:
        child = self._running.pop(name)
        # All of a PID namespace ends with its first process, which is gone only after them: then its port is free.
        for pid in children(child.pid) or [child.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
        child.wait()


def _machine(ref: Any) -> Machine:
    options = {option.key: option.value for option in ref.config.extraConfig}
    return Machine(
        name=ref.name,
        host=ref.runtime.host.name,
        on=ref.runtime.powerState == "poweredOn",
        cpus=ref.config.hardware.numCPU,
        address=ref.guest.ipAddress or "",
        told={key.removeprefix(_TOLD): text for key, text in options.items() if key.startswith(_TOLD)},
    )
