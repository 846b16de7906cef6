"""A guest that is a Slurm node, on the host that carries it: the guest, the slurmd beside it, and the door into it.

To Slurm, to ``carrel-enter`` and to the hooks it is a node like any other: its directory is ``node.dir`` under its own
name, and carreld of the host answers there. What is to be found again after a kill lies on disk: the order in the
host's directory, the guest with its driver, the slurmd with its note.
"""

import asyncio
import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from carrel import wire
from carrel.core import guests as decide
from carrel.daemons import people, requests
from carrel.daemons.carried_metrics import CarriedMetrics
from carrel.daemons.door import Door
from carrel.daemons.facts import JobFacts
from carrel.daemons.guestlogs import GuestLog, GuestLogs, LogOf
from carrel.daemons.journal import Journal
from carrel.daemons.node import Node
from carrel.daemons.peers import Peers, share
from carrel.daemons.records import Inside, JobRequests
from carrel.errors import CarrelError, NodeFaultError, RefusedError, UnreachableError
from carrel.model.guest import Guest, GuestSpec
from carrel.model.guestnode import GuestNode, GuestNodeState, NodeOrder
from carrel.model.job import Job
from carrel.model.report import NodeReport
from carrel.model.sample import OnGuestNode
from carrel.model.task import Task
from carrel.ports import Driver
from carrel.slurm import cgroups
from carrel.slurm.beside import Beside, steps_of
from carrel.slurm.client import SlurmClient

if TYPE_CHECKING:
    from carrel.process import Pid

END = "end"
"""What the guard said of the guest's end, once tasks may know: not while Slurm is yet to hear that the node is down."""
END_WAIT_S = 60.0
"""So long a task waits for that. Without a controller nobody tells Slurm, and the task fails after all."""
MARK = "is-guest"
"""``spank_carrel.so`` looks for it: where it lies beside the socket, no task runs on the host."""
OWN_ENDS = ("oom", "stopped")
"""Ends of a guest that are its job's doing, not its host's: the job is told, and the node is not said to be down."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the host keeps of a guest-node on disk."""

    order: NodeOrder
    ended: str = ""
    """Why no new guest is made for it."""


class Carried(Node):
    """One guest-node. It has what a node has; the guests, images, journal and reports are its host's."""

    def __init__(  # super() would take a directory for a host of its own
        self, host: Node, order: NodeOrder, *, changed: Callable[[], None]
    ) -> None:
        """Describe it; ``begin`` makes it, and ``changed`` is called when there is news of that."""
        self.config = host.config
        self.name = order.node
        self.order = order
        self.host = host
        self._changed = changed
        self.directory = host.config.node.path(order.node)
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        (self.directory / MARK).touch()
        self.scheduler = SlurmClient(host.config.slurm, order.node, cluster=order.run.cluster)
        self.facts = JobFacts(self.scheduler)
        self.requests = JobRequests(self.directory / "jobs")
        self.inside = Inside(self.directory / "inside")
        self.reporter = host.reporter
        self.journal = Journal(order.node, host.reporter.tell)
        self.images = host.images
        self.drivers = host.drivers
        self.metrics = CarriedMetrics(self)
        self._spec: GuestSpec | None = None
        self._settled = asyncio.Event()
        """It is known what the guest shall be, or that there will be none."""
        self._beside = Beside(host.config.slurm, order.node, self.directory)
        of = LogOf(user=order.user, uid=order.uid, run=str(order.run), guest=order.node)
        self._log = GuestLog(GuestLogs(host.config.guests.logs), of)
        self._record = record_path(host, order.node)
        self._failure: tuple[GuestNodeState, str] | None = None
        self._works: list[asyncio.Task[None]] = []
        self._making: asyncio.Task[None] | None = None
        self.seen: Guest | None = None
        if self._ended is None:
            self._note(Record(order=order))

    @property
    def series(self) -> OnGuestNode:
        return OnGuestNode(self.order.run, self.name)

    @property
    def guest_name(self) -> str:
        return f"{self.order.run}.{self.name}"

    @property
    def driver_name(self) -> str:
        return self.order.request.driver or self.config.guests.driver

    def driver(self, name: str = "") -> Driver:
        return self.host.driver(name)

    async def report(self, *, counters_max_age_s: float | None = None) -> NodeReport:
        whole = await self.host.report(counters_max_age_s=counters_max_age_s)
        return msgspec.structs.replace(whole, guests=tuple(g for g in whole.guests if g.node == self.name))

    async def end(self, guest: Guest) -> None:
        await self.host.metrics.carried.last(self.series)
        if guest.console:
            await asyncio.to_thread(self._log.keep, "console", Path(guest.console))
        await self.host.end(guest)
        self._log.mark("destroyed")
        self._end_sampling()
        self.inside.forget(guest.name)

    # -- life ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Answer at the door, and make the guest unless it is there or has ended."""
        self._works.append(asyncio.ensure_future(self.serve()))
        if self._ended is None:
            self._making = asyncio.ensure_future(self._make())
            self._works.append(self._making)
        else:
            self._settled.set()

    async def spec(self) -> GuestSpec:
        """Return the guest that tasks enter. A carreld that has just started knows it in a moment.

        Raises:
            RefusedError: there is none, or none any more.
        """
        await self._settled.wait()
        why = self._ended or (self._failure[1] if self._failure else "")
        if why or self._spec is None:
            raise RefusedError(f"node {self.name}: its guest is gone: {why}")
        return self._spec

    def door(self) -> Door:
        return GuestDoor(self, Peers(share()))

    async def _make(self) -> None:
        try:
            self._spec = await self._resolve()
        except (NodeFaultError, UnreachableError, OSError) as error:
            self._fail("failed", error)
        except CarrelError as error:  # no other host would say anything else
            self._fail("refused", error)
        else:
            self._settled.set()
            await self._ensure(self._spec)

    async def _ensure(self, spec: GuestSpec) -> None:
        try:
            driver = self.driver(self.driver_name)
            known = {guest.name: guest.state for guest in await driver.guests()}.get(spec.name)
            if known is None:
                self._say("guest-starting", f"{spec.clone} clone of {spec.image_name} as node {self.name}")
            guest = await driver.ensure(spec)
        except (CarrelError, OSError) as error:
            self._fail("failed", error)
            return
        self.seen = guest
        if guest.ready_s:
            identity_s = dict(guest.phases).get("identity", 0.0)
            self._log.mark("clone_start", now_s=guest.started_s)
            self._log.mark("clone_end", now_s=guest.ready_s - identity_s)
            self._log.mark("customised", now_s=guest.ready_s)
        if known != "ready":
            took_s = (guest.ready_s or 0) - guest.started_s
            self._say("guest-ready", f"{guest.clone} clone, ready {took_s:.2f} s after its start; {guest.clone_why}")

    def _fail(self, state: GuestNodeState, error: Exception) -> None:
        if self._failure is None:
            self._failure = (state, str(error))
            self._say("guest-failed", str(error))
        self._settled.set()

    async def _resolve(self) -> GuestSpec:
        """Return the guest that the order describes."""
        order = self.order
        image = await asyncio.to_thread(self.images.files, order.request.image)
        person = msgspec.structs.replace(await people.person(order.uid), gid=order.gid)
        spec = decide.resolve(
            order.request,
            job=Job(key=order.run, state="running", cpus=order.cpus, memory_bytes=order.memory_bytes),
            task=Task(step="batch", cwd=order.cwd),
            person=person,
            settings=self.config.guests,
            node=self.name,
            image_hash=image.hash,
            node_cpus=order.cpus,
            node_memory_bytes=order.memory_bytes,
            slot=0,
        )
        sources = [decide.parse_mount(text).source for text in order.request.mounts]
        mounts, settings = await asyncio.gather(
            people.reachable(spec.mounts, person, asked=sources), self.scheduler.settings()
        )
        counted: tuple[str, ...] = ()
        if settings.get("ProctrackType") == "proctrack/cgroup":
            counted = await asyncio.to_thread(
                cgroups.of_guest_node, self.name, cpus=order.cpus, memory_bytes=order.memory_bytes
            )
        return msgspec.structs.replace(spec, name=self.guest_name, per="node", mounts=mounts, job_cgroups=counted)

    async def look(self) -> None:
        """See how the guest does, and keep slurmd running where it is wanted."""
        guests = await self.driver(self.driver_name).guests()
        self.seen = next((guest for guest in guests if guest.name == self.guest_name), None)
        making = self._making is not None and not self._making.done()  # which knows better why it failed
        if self.seen and self.seen.state == "down" and not making and not self._ended and not self._failure:
            await self._went_down(self.seen)
        if self.order.join and self._failure is None:
            self._beside.start()
            self._log.mark("registered")
        if self.host.metrics.carried.began(self.series):
            self.metrics.begin(self.order.run.job_id)

    def first_task(self) -> None:
        """Note when the first task came; a look could miss a short one."""
        self._log.mark("first_task")

    async def _went_down(self, guest: Guest) -> None:
        why = _first_word(guest.end_file)
        if why in OWN_ENDS:
            self._note(Record(order=self.order, ended=guest.reason))
            shutil.copyfile(guest.end_file, self.directory / f"{END}.new")
            (self.directory / f"{END}.new").replace(self.directory / END)
        else:
            self._failure = ("failed", f"its guest is gone: {guest.reason}")
        self._say("guest-down", guest.reason)

    def update(self, order: NodeOrder) -> None:
        """Take a newer order for the same run."""
        if order != self.order:
            self.order = order
            self._note(Record(order=order, ended=self._ended or ""))
            self._changed()  # a slurmd may be wanted

    def facts_for_controller(self) -> GuestNode:
        guest = self.seen
        state: GuestNodeState = "starting"
        reason = ""
        if self._ended is not None:
            state, reason = "ended", self._ended
        elif self._failure:
            state, reason = self._failure
        elif guest and guest.state in {"ready", "suspended"}:
            state = "ready"
        return GuestNode(
            node=self.name,
            run=self.order.run,
            state=state,
            joined=self._beside.pid() is not None,
            reason=reason,
            started_s=guest.started_s if guest else 0.0,
            ready_s=(guest.ready_s or 0.0) if guest else 0.0,
        )

    async def finish(self, why: str) -> None:
        """Destroy the guest, since its run has ended; slurmd stays until the controller says so."""
        self._note(Record(order=self.order, ended=why))
        for guest in (await self.report()).guests:
            await self.end(guest)
            self._say_gone(why)

    async def unmake(self) -> None:
        """Leave nothing: steps, slurmd, guest, directory; the note of it last. What is absent already is fine."""
        await self._stop_working()
        self._end_steps()
        await self._beside.stop()
        await asyncio.to_thread(self._log.keep, "slurmd", self._beside.log)
        self._remove_sockets()
        for guest in (await self.report()).guests:
            await self.end(guest)
            self._say_gone("its node is not wanted any more")
        if ending := self._end_sampling():
            await asyncio.wait([ending])  # it reads the last totals there
        await asyncio.to_thread(cgroups.remove_guest_node, self.name)
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def _end_sampling(self) -> "asyncio.Task[None] | None":
        report = (self.directory / "hints" / f"report.{self.order.run.job_id}").exists()
        return self.host.metrics.carried.end(self.series, guest=self.guest_name, report=report)

    def _end_steps(self) -> None:
        """End what is left of steps: Slurm was told that this node is down, and nobody else will."""
        tasks: list[Pid] = [task for guest in self.inside.guests() for task in self.inside.living(guest)]
        for pid in [*steps_of(tasks), *tasks]:
            pid.kill(signal.SIGKILL)

    def _remove_sockets(self) -> None:
        """Remove what slurmstepds that we ended would have removed; no slurmd of this name lives to do it."""
        spool = self.config.slurm.spool_dir.replace("{node}", self.name)
        if spool:
            for path in Path(spool).glob(f"{self.name}_{self.order.run.job_id}.*"):
                path.unlink(missing_ok=True)

    async def _stop_working(self) -> None:
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)

    @property
    def _ended(self) -> str | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            record = msgspec.json.decode(self._record.read_bytes(), type=Record)
            if record.order.run == self.order.run and record.ended:
                return record.ended
        return None

    def _note(self, record: Record) -> None:
        self._record.parent.mkdir(mode=0o755, exist_ok=True)
        draft = self._record.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(self._record)

    def _say_gone(self, why: str) -> None:
        self._say("guest-gone", f"destroyed: {why}{self._log.kept_on(self.host.name)}")

    def _say(self, what: str, text: str) -> None:
        self._log.say(f"{what}: {text}")
        self.journal.add(what, text, job_id=self.order.run.job_id, guest=self.guest_name, uid=self.order.uid)
        self.reporter.poke()
        self._changed()


class GuestDoor(Door):
    """The door of a guest-node: one run, one guest, made before the first task comes."""

    def __init__(self, node: Carried, peers: Peers) -> None:
        """Answer for ``node``."""
        super().__init__(node, peers)
        self._carried = node

    async def _resolve(
        self, message: wire.Message, job_id: int, task: Task, *, pid: int, uid: int
    ) -> tuple[GuestSpec, str]:
        del task, pid  # the guest is there, and is counted by its host
        carried, settings = self._carried, self._carried.config.guests
        order = carried.order
        job = await carried.facts.job(job_id, timeout_s=settings.boot_timeout_s)
        if job.key != order.run:
            raise RefusedError(f"node {carried.name} is the guest of run {order.run}, not of {job.key}")
        if uid not in (0, job.uid):
            raise RefusedError(f"job {job_id} belongs to {job.user}, not to uid {uid}")
        if not decide.living(job):
            raise RefusedError(f"job {job_id} is {job.slurm_state or job.state}, not running")
        asked = decide.merge(requests.guest_request(message), order.request, job_id=job_id, settings=settings)
        image = await asyncio.to_thread(carried.images.files, asked.image)
        async with asyncio.timeout(settings.boot_timeout_s):
            spec = await carried.spec()
        decide.refuse_other_image(
            job_id=job_id,
            asked=asked.image,
            asked_hash=image.hash,
            has=spec.image_name,
            has_hash=spec.image,
        )
        mounts = tuple(decide.parse_mount(text) for text in asked.mounts)
        return msgspec.structs.replace(spec, asked_mounts=mounts, root=asked.root), carried.driver_name

    def _entered(self, spec: GuestSpec, guest: Guest) -> wire.Fields:
        self._carried.first_task()
        wait_ms = str(int(END_WAIT_S * 1000))
        return {
            **super()._entered(spec, guest),
            "end_file": str(self._carried.directory / END),
            "end_wait_ms": wait_ms,
        }

    def _prolog(self, message: wire.Message) -> wire.Fields:
        answer = super()._prolog(message)
        timeout_s = self._carried.config.guests.boot_timeout_s
        self._carried.facts.expect(requests.number(message, "job"), timeout_s=timeout_s)
        return answer

    async def _epilog(self, message: wire.Message) -> wire.Fields:
        job_id = requests.number(message, "job")
        self._carried.facts.forget(job_id)
        if job_id == self._carried.order.run.job_id:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._carried.config.guests.stop_timeout_s):
                    await self._carried.finish("its job has ended")
        return {"status": "ok"}


def record_path(host: Node, node: str) -> Path:
    return host.directory / "guest-nodes" / f"{node}.json"


def records(host: Node) -> list[Record]:
    """Return what an earlier carreld of this host noted."""
    found = []
    for path in sorted((host.directory / "guest-nodes").glob("*.json")):
        with contextlib.suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=Record))
    return found


def _first_word(end_file: str) -> str:
    with contextlib.suppress(OSError):
        return Path(end_file).read_text(errors="replace").partition("\n")[0].strip()
    return ""
