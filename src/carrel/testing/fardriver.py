"""A hypervisor that is reached from the controller, in memory and in virtual time: what a vCenter is to its driver.

The machines outlive the controller; each of its drivers finds them again. It fails, dawdles and goes away as its
``Trouble`` says. A machine whose node is open registers with the simulated Slurm, as a slurmd inside would.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from carrel.errors import NodeFaultError, UnreachableError
from carrel.model.guest import Guest, GuestRequest, GuestSpec
from carrel.model.job import JobKey
from carrel.model.template import Recipe

if TYPE_CHECKING:
    from carrel.testing.guestnodes import Site

SILENT_S = 12.0
"""For so long it is away, when it is."""


class Hypervisor:
    """The machines, on all hosts."""

    def __init__(self, site: "Site") -> None:
        """Have none yet."""
        self.guests: dict[str, Guest] = {}
        self.away = False
        self.lost: dict[str, JobKey | None] = {}
        """Runs by the names of their guests, which vanished or went off by nobody's order; Slurm may not know yet."""
        self._site = site
        self._numbers = 0

    def carry(self, spec: GuestSpec) -> None:
        """Have a machine that is being cloned, unless there is one of this name."""
        if spec.name in self.guests:
            return
        self.guests[spec.name] = Guest(
            name=spec.name,
            node=spec.node,
            driver="far",
            state="starting",
            run=spec.run,
            image_name=spec.image_name,
            per="node",
            cpus=spec.cpus,
            memory_bytes=spec.memory_bytes,
            uid=spec.uid,
            user=spec.user,
            host_name=spec.host_name,
            started_s=self._site.now_s(),
        )
        host = self._site.hosts[spec.node]
        taken = sum(guest.cpus for guest in self.guests.values() if guest.node == spec.node)
        if taken > host.cpus:
            self._site.wrong.append(f"{spec.node} has {host.cpus} CPUs and carries guests of {taken}")
        same = [guest.name for guest in self.guests.values() if guest.run == spec.run]
        if len(same) > self._site.slurm.jobs[spec.run.job_id].job.nodes:
            self._site.wrong.append(f"{spec.run} has guests {same}")

    def ready(self, name: str) -> Guest:
        """Have a machine booted: its slurmd registers, from an address that only this machine has."""
        guest = self.guests[name]
        if guest.state == "starting":
            self._numbers += 1
            address = f"10.{self._numbers // 250}.0.{self._numbers % 250}"
            guest = msgspec.structs.replace(guest, state="ready", ready_s=self._site.now_s(), address=address)
            self.guests[name] = guest
            self._site.slurm.register(guest.host_name, guest.node)
        return guest

    def lose(self, host: str) -> None:
        """Have the machines of a host switched off, or gone for good."""
        for name, guest in list(self.guests.items()):
            if guest.node != host:
                continue
            self.lost[guest.host_name] = guest.run
            if self._site.random.random() < 1 / 2:
                del self.guests[name]
            elif guest.state == "ready":
                self.guests[name] = msgspec.structs.replace(guest, state="down", reason="somebody switched it off")


class FarDriver:
    """What one controller has of it; see ``carrel.ports.RemoteDriver``."""

    def __init__(self, site: "Site", hypervisor: Hypervisor) -> None:
        """Hold no state: it is the hypervisor's."""
        self._site = site
        self._there = hypervisor

    def recipe(self, request: GuestRequest) -> Recipe:
        del request
        return Recipe(clone="full")

    async def guests(self) -> Sequence[Guest]:
        await self._reach()
        found = tuple(self._there.guests.values())
        await self._reach()
        return found

    async def ensure(self, spec: GuestSpec) -> Guest:
        random, trouble = self._site.random, self._site.trouble
        await self._reach()
        self._there.carry(spec)
        slow = random.random() < trouble.clone_slow
        await asyncio.sleep(random.uniform(30, 60) if slow else random.uniform(0.1, 1.0))
        if random.random() < trouble.clone_fails or spec.name not in self._there.guests:
            raise NodeFaultError("the clone failed")
        await self._reach()
        return self._there.ready(spec.name)

    async def destroy(self, name: str) -> None:
        await self._reach()
        await self._site.pause(2.0)
        self._there.guests.pop(name, None)

    async def _reach(self) -> None:
        await self._site.pause(self._site.trouble.message_max_s)
        if self._there.away:
            raise UnreachableError("the hypervisor did not answer")


class SlurmWords:
    """What ``scontrol show config`` says here."""

    async def settings(self) -> dict[str, Any]:
        keys = ("AuthType", "CredType", "SlurmUser", "ProctrackType", "TaskPlugin", "JobAcctGatherType", "SelectType")
        ports = {"SlurmctldPort": "6817", "SlurmdPort": "6818"}
        return {"ClusterName": "k", "SlurmctldHost[0]": "c", **ports, **dict.fromkeys(keys, "x")}
