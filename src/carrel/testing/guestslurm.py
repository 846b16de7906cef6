"""slurmctld as a controller of guests meets it, in memory: it does what 22.05 was seen to do (``guestnodes``)."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from carrel.errors import UnreachableError
from carrel.model.guest import GuestRequest
from carrel.model.job import Job, JobKey
from carrel.model.pool import Look, PoolJob, PoolNode, Reservation, Wish
from carrel.slurm.pool import SlurmPool

if TYPE_CHECKING:
    from carrel.testing.guestnodes import Site

CLUSTER = "sim"
MIB = 2**20
_FORGET_S = 300.0
_SCHEDULE_S = 0.5
_SLURMD_TIMEOUT_S = 20.0
_POWER_DOWN_S = 4.0


class SimulatedJob(msgspec.Struct, kw_only=True):
    """A job, as slurmctld has it."""

    job: PoolJob
    runs_s: float
    comment: str = ""
    ends_s: float = 0.0
    past: list[str] = msgspec.field(default_factory=list)
    """How each earlier run ended."""


class Slurm(SlurmPool):
    """slurmctld, as far as a controller of guests meets it."""

    def __init__(self, site: "Site", names: int) -> None:  # its base would ask a real one
        """Have no job, and all names at rest."""
        self._site = site
        self.jobs: dict[int, SimulatedJob] = {}
        self.nodes = {f"v{number}": _resting(f"v{number}") for number in range(1, names + 1)}
        self.reservations: dict[str, Reservation] = {}
        self.answers = True
        """Whether a look succeeds."""

    def submit(self, *, cpus: int, nodes: int, runs_s: float) -> int:
        """Submit a job as ``guest_node.lua`` leaves it; return its id."""
        job_id = len(self.jobs) + 1
        key = JobKey(cluster=CLUSTER, job_id=job_id, submit_s=int(self._site.now_s()))
        job = PoolJob(
            job=Job(key=key, state="held", slurm_state="PENDING", user="ada", uid=7, gid=8),
            nodes=nodes,
            cpus=cpus,
            memory_bytes=320 * MIB,
            reason="JobHeldUser",
            wish=Wish(request=GuestRequest(image="debian12", per="node")),
        )
        self.jobs[job_id] = SimulatedJob(job=job, runs_s=runs_s)
        return job_id

    def ended(self, job_id: int) -> bool:
        return self.jobs[job_id].job.job.state == "ended"

    # -- what the controller asks and does -----------------------------------------------------------------------

    async def look(self) -> Look:
        if not self.answers:
            raise UnreachableError("slurmctld does not answer")
        await self._site.pause(self._site.trouble.command_max_s)
        now_s = self._site.now_s()
        jobs = [each for each in self.jobs.values() if each.job.alive or now_s - each.ends_s < _FORGET_S]
        found = Look(
            cluster=CLUSTER,
            jobs=tuple(each.job for each in jobs),
            nodes=dict(self.nodes),
            reservations=dict(self.reservations),
        )
        await self._site.pause(self._site.trouble.command_max_s)
        return found

    async def living(self) -> frozenset[int]:
        return frozenset(job_id for job_id, each in self.jobs.items() if each.job.alive)

    async def hold(self, job: PoolJob) -> str:
        return await self._change(lambda: self._waits(job.key.job_id, "held", "JobHeldAdmin"))

    async def release(self, job: PoolJob) -> str:
        return await self._change(lambda: self._waits(job.key.job_id, "pending", "None"))

    async def start_now(self, job: PoolJob) -> str:
        return await self._change(lambda: self._set(job.key.job_id, started_s=self._site.now_s()))

    async def cancel(self, job: PoolJob) -> str:
        return await self._change(lambda: self._ends(job.key.job_id, "CANCELLED"))

    async def tell(self, job: PoolJob, text: str) -> str:
        def say() -> None:
            self.jobs[job.key.job_id].comment = text

        return await self._change(say)

    async def pin(self, job: PoolJob, reservation: str) -> str:
        def set_it() -> None:
            if not reservation or reservation in self.reservations:
                self._set(job.key.job_id, reservation=reservation)

        return await self._change(set_it)

    async def assign(self, node: str, *, address: str = "", host_name: str = "") -> str:
        words = {"address": address, "host_name": host_name}
        return await self._change(lambda: self._node(node, **{key: text for key, text in words.items() if text}))

    async def reserve(self, name: str, user: str, nodes: Any) -> str:
        def make() -> None:
            taken = {node for each in self.reservations.values() for node in each.nodes}
            if name not in self.reservations and taken.isdisjoint(nodes):
                self.reservations[name] = Reservation(name=name, nodes=tuple(nodes), users=user)

        return await self._change(make)

    async def unreserve(self, name: str) -> str:
        def remove() -> None:
            users = [each.job for each in self.jobs.values() if each.job.reservation == name and each.job.alive]
            if all(job.job.state in {"held", "pending"} for job in users):
                self.reservations.pop(name, None)

        return await self._change(remove)

    async def node(self, node: str, state: str, reason: str) -> str:
        del reason

        def set_it() -> None:
            words = set(self.nodes[node].state)
            match state:
                case "drain":
                    self._words(node, words | {"DRAIN"})
                case "resume":
                    self._words(node, words - {"DRAIN", "DOWN"})
                case "down":
                    self._words(node, (words - {"IDLE", "MIXED"}) | {"DOWN"})
                    self._fails(node)
                case "power_down_force":
                    self._words(node, {"IDLE", "CLOUD", "POWERING_DOWN"} | (words & {"DRAIN"}))
                    self._fails(node)
                    asyncio.get_running_loop().call_later(_POWER_DOWN_S, self._rests, node)

        return await self._change(set_it)

    async def _change(self, effect: Callable[[], None]) -> str:
        """Do it, some time after it was asked for and before that is known."""
        await self._site.pause(self._site.trouble.command_max_s)
        effect()
        await self._site.pause(self._site.trouble.command_max_s)
        return ""

    # -- what slurmctld does of itself ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Schedule, end, and notice what does not answer."""
        while True:
            for job_id in list(self.jobs):
                self._see(job_id)
            await asyncio.sleep(_SCHEDULE_S)

    def register(self, name: str, host: str) -> None:
        """Hear of a slurmd under this name."""
        node = self.nodes[name]
        if node.host_name == host and "POWERING_DOWN" not in node.state:
            away = {"POWERED_DOWN", "POWERING_UP", "NOT_RESPONDING"}
            self._words(name, set(node.state) - away)

    def _see(self, job_id: int) -> None:
        each, now_s = self.jobs[job_id], self._site.now_s()
        job = each.job
        match job.job.slurm_state:
            case "PENDING" if job.job.state == "pending" and (job.started_s or 0) <= now_s:
                self._start(each)
            case "CONFIGURING" if not self._site.trouble.nothing_starts and all(
                self.nodes[name].joined for name in job.job.nodes
            ):
                self._state(job_id, "running", "RUNNING")
                each.ends_s = now_s + each.runs_s
            case "RUNNING":
                silent = [name for name in job.job.nodes if self._silent(name)]
                if silent:
                    self._words(silent[0], set(self.nodes[silent[0]].state) | {"NOT_RESPONDING"})
                    self._fails(silent[0])
                elif each.ends_s <= now_s:
                    self._ends(job_id, "COMPLETED")
            case "COMPLETING":
                self._state(job_id, "ended", each.past[-1])

    def _start(self, each: SimulatedJob) -> None:
        reserved = self.reservations.get(each.job.reservation)
        names = reserved.nodes[: each.job.nodes] if reserved else ()
        if len(names) < each.job.nodes:
            return
        if any(self.nodes[name].closed or self.nodes[name].busy or "DOWN" in self.nodes[name].state for name in names):
            return
        job = each.job.job
        for name in names:
            hosts, far = self._site.hosts.values(), self._site.hypervisor
            at: list[tuple[JobKey | None, str]] = [
                (guest.run, guest.state) for host in hosts for on, guest in host.guests.items() if on == name
            ]
            at += [(guest.run, guest.state) for guest in far.guests.values() if guest.host_name == name]
            lost = [far.lost.get(name), *(host.lost.get(name) for host in hosts)]
            if at != [(job.key, "ready")] and job.key not in lost:
                self._site.wrong.append(f"{job.key} began on {name}, where {at} is")
            self._words(name, (set(self.nodes[name].state) - {"IDLE"}) | {"MIXED"})
        each.job = msgspec.structs.replace(
            each.job,
            job=msgspec.structs.replace(job, state="running", slurm_state="CONFIGURING", nodes=names),
            started_s=self._site.now_s(),
        )

    def _silent(self, name: str) -> bool:
        host = self._site.hosts.get(self.nodes[name].host_name)
        return host is None or host.away_for_s() > _SLURMD_TIMEOUT_S

    def _fails(self, name: str) -> None:
        """End what runs on a node that is gone, and queue it again, as another run."""
        for job_id, each in self.jobs.items():
            if name in each.job.job.nodes and each.job.job.state == "running":
                self._free(each)
                each.past.append("NODE_FAIL")
                key = each.job.key
                again = JobKey(
                    cluster=CLUSTER, job_id=job_id, submit_s=int(self._site.now_s()), restart=key.restart + 1
                )
                job = msgspec.structs.replace(each.job.job, key=again, state="pending", slurm_state="PENDING", nodes=())
                begins_s = self._site.now_s() + 120
                each.job = msgspec.structs.replace(each.job, job=job, reason="BeginTime", started_s=begins_s)

    def _ends(self, job_id: int, how: str) -> None:
        each = self.jobs[job_id]
        if each.job.job.state == "ended":
            return
        self._free(each)
        each.past.append(how)
        each.ends_s = self._site.now_s()
        self._state(job_id, "ended", "COMPLETING" if each.job.job.nodes else how)

    def _free(self, each: SimulatedJob) -> None:
        for name in each.job.job.nodes:
            self._words(name, {"IDLE" if word == "MIXED" else word for word in self.nodes[name].state})

    def _rests(self, name: str) -> None:
        if "POWERING_DOWN" in self.nodes[name].state:
            closed = self.nodes[name].state & {"DRAIN"}
            self.nodes[name] = PoolNode(
                name=name, state=frozenset({"IDLE", "CLOUD", "POWERED_DOWN"} | closed), address=name, host_name=name
            )

    def _waits(self, job_id: int, state: Any, reason: str) -> None:
        if self.jobs[job_id].job.job.state in {"held", "pending"}:
            self._state(job_id, state, "PENDING")
            self._set(job_id, reason=reason)

    def _state(self, job_id: int, state: Any, word: str) -> None:
        job = self.jobs[job_id].job.job
        self._set(job_id, job=msgspec.structs.replace(job, state=state, slurm_state=word))

    def _set(self, job_id: int, **words: Any) -> None:
        self.jobs[job_id].job = msgspec.structs.replace(self.jobs[job_id].job, **words)

    def _node(self, name: str, **words: Any) -> None:
        self.nodes[name] = msgspec.structs.replace(self.nodes[name], **words)

    def _words(self, name: str, words: set[str]) -> None:
        self._node(name, state=frozenset(words))


def _resting(name: str) -> PoolNode:
    state = frozenset({"IDLE", "CLOUD", "DRAIN", "POWERED_DOWN"})
    return PoolNode(name=name, state=state, address=name, host_name=name)
