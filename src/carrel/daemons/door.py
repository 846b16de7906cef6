"""carreld's socket: every verb of ``docs/reference/node-socket.md``. Each peer is who the kernel says it is."""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from carrel import wire
from carrel.core import guests as decide
from carrel.daemons import people, requests
from carrel.daemons.peers import Peers, heard, refuse, tell, tell_json
from carrel.errors import CarrelError, NodeFaultError, NotFoundError, RefusedError, UnreachableError
from carrel.model.guest import Agent, Entry, Guest, GuestRequest, GuestSpec
from carrel.model.job import Job
from carrel.model.report import Event, NodeReport
from carrel.model.task import Task
from carrel.slurm import cgroups
from carrel.slurm.tasks import require_task

if TYPE_CHECKING:
    from carrel.daemons.node import Node

PATIENCE_S = 2.0  # after this long a waiting user is told what for
SLOTS_MAX = 65536
IDENT_MAX = 32
PROMISE_S = 30.0  # the driver lists a guest long before: as soon as it has its directory


_LOG = logging.getLogger("carreld")


class Door:
    """Answers one node's peers."""

    def __init__(self, node: "Node", peers: Peers) -> None:
        """Answer for ``node`` those whom ``peers`` admits."""
        self._node = node
        self._peers = peers
        # Not one name of an earlier carreld's: two tasks would share a cgroup in the guest, and end together.
        self._ports = (f"carrel.t.{secrets.token_hex(4)}.{number}" for number in itertools.count())
        self._answers: set[asyncio.Task[None]] = set()
        self._resolving = asyncio.Lock()
        self._promised: dict[str, tuple[int, float]] = {}
        """Slots of guests that no driver lists yet, as they are about to be made; and until when."""

    def answer(self, connection: socket.socket) -> None:
        """Answer a new peer, at the same time as all others."""
        connection.setblocking(False)
        task = asyncio.ensure_future(self._answer(connection))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                with self._peers.admitted(wire.peer(connection)[1]):
                    if message := await heard(connection):
                        await self._dispatch(connection, message)
            except ConnectionError:
                return  # the peer went away
            except CarrelError as error:
                await refuse(connection, str(error))
            except Exception as error:  # noqa: BLE001  # one request must not end the daemon of all
                _LOG.exception("a request failed")
                await refuse(connection, f"carreld failed: {error!r}; see its log on node {self._node.name}")

    async def _dispatch(self, connection: socket.socket, message: wire.Message) -> None:
        _, uid, _ = wire.peer(connection)
        match message.get("verb"):
            case "enter":
                await self._enter(connection, message)
            case "runner":
                await self._runner(connection, message)
            case "prolog":
                _require_root(uid)
                await tell(connection, self._prolog(message))
            case "epilog":
                _require_root(uid)
                await tell(connection, await self._epilog(message))
            case "status":
                report = await self._node.report(counters_max_age_s=0)
                await tell_json(connection, _shown(report, self._node.journal.all(), uid))
            case "list":
                await tell_json(connection, _visible((await self._node.report()).guests, uid))
            case "show" | "map":
                await tell_json(connection, await self._named(message, uid))
            case "sample":
                every_s = requests.period_s(message)
                job_id = requests.number(message, "job")
                await tell_json(connection, await self._node.metrics.sample_every(job_id, every_s, uid=uid))
            case "destroy":
                await self._destroy(message, uid)
                await tell(connection, {"status": "ok"})
            case verb:
                await refuse(connection, f"carreld knows no verb {verb[:20]!a}")

    # -- hooks -------------------------------------------------------------------------------------------------

    def _prolog(self, message: wire.Message) -> wire.Fields:
        job_id = requests.number(message, "job")
        self._node.facts.forget(job_id)
        self._node.requests.put(job_id, requests.guest_request(message))
        self._node.metrics.begin(job_id, anew=True)
        return {"status": "ok"}

    async def _epilog(self, message: wire.Message) -> wire.Fields:
        job_id = requests.number(message, "job")
        self._node.facts.forget(job_id)
        with contextlib.suppress(TimeoutError):  # the sweep goes on where this wait ends
            async with asyncio.timeout(self._node.config.guests.stop_timeout_s):
                await self.end_job(job_id, "its job has ended")
        self._node.metrics.end(job_id)
        return {"status": "ok"}

    async def end_job(self, job_id: int, why: str) -> None:
        """Destroy all guests of a job on this node and forget what it asked for."""
        for driver in list(self._node.drivers.values()):
            mine = [g for g in await driver.guests() if g.run is not None and g.run.job_id == job_id]
            await asyncio.gather(*(self.end_guest(guest, why) for guest in mine))
        self._node.requests.remove(job_id)

    async def end_guest(self, guest: Guest, why: str) -> None:
        """Destroy one guest and say so."""
        await self._node.end(guest)
        self._say("guest-gone", f"destroyed: {why}", guest)

    # -- tasks -------------------------------------------------------------------------------------------------

    async def _enter(self, connection: socket.socket, message: wire.Message) -> None:
        pid, uid, _ = wire.peer(connection)
        task = requests.task(message)
        job_id = requests.number(message, "job")
        require_task(pid, job_id)
        began_s = time.monotonic()
        try:
            spec, driver_name = await self._resolve(message, job_id, task, pid=pid, uid=uid)
            guest = await self._ready(connection, spec, driver_name)
            if guest is None:
                return  # the task is gone; its guest goes with its job, or below
            entry = await self._entry(guest, pid)
        except NodeFaultError as error:
            await self._node_fault(job_id, task, error)
            raise
        except CarrelError as error:
            self._node.journal.add("refused", str(error), job_id=job_id, uid=uid)
            raise
        with contextlib.suppress(ConnectionError):  # it may leave at any moment; what follows is due all the same
            try:
                await tell(connection, self._entered(spec, guest), fd=entry.fd)
            finally:
                os.close(entry.fd)
            self._node.metrics.guest_ready(guest)  # only now: ports come one at a time, and the task's was first
            took_ms = (time.monotonic() - began_s) * 1000
            self._say("task-entered", f"task {task.task} of step {task.step} after {took_ms:.0f} ms", guest)
            await self._until_gone(connection)
        self._node.inside.remove(guest.name, pid)
        self._node.reporter.poke()
        if guest.per == "task":
            await self.end_guest(guest, "its task has ended")

    async def _entry(self, guest: Guest, pid: int) -> Agent:
        """Return a task's way in. It counts as inside from here on, or its guest could be swept as an empty one."""
        self._node.inside.add(guest.name, pid)
        try:
            return _agent(await self._node.driver(guest.driver).enter(guest.name, next(self._ports)), guest)
        except BaseException:
            self._node.inside.remove(guest.name, pid)
            raise

    async def _resolve(
        self, message: wire.Message, job_id: int, task: Task, *, pid: int, uid: int
    ) -> tuple[GuestSpec, str]:
        """Return the guest that this task enters, and its driver."""
        settings = self._node.config.guests
        job = await self._node.facts.job(job_id, timeout_s=settings.boot_timeout_s)
        if uid not in (0, job.uid):
            raise RefusedError(f"job {job_id} belongs to {job.user}, not to uid {uid}")
        if not decide.living(job):
            raise RefusedError(f"job {job_id} is {job.slurm_state or job.state}, not running")
        asked = decide.merge(
            requests.guest_request(message), self._node.requests.get(job_id), job_id=job_id, settings=settings
        )
        if not asked.image:
            raise RefusedError(f"job {job_id} names no image; see: --guest, carrel image list")
        if asked.per == "node":
            where = self._node.config.guest_nodes.partition
            raise RefusedError(
                f"--guest-per=node: {self._node.name} is no guest, and job_submit.lua of this site sends no job to "
                f"partition {where}, whose nodes are; take --guest-per=job, or ask an administrator "
                "(docs/how-to/guests-as-nodes.md says what is to be set up)"
            )
        driver_name = asked.driver or settings.driver
        self._require_driver(driver_name)
        spec = await self._spec(job, task, asked, driver_name)
        counting, freezer = cgroups.of_process(pid, job_id)
        return msgspec.structs.replace(spec, job_cgroups=counting, job_freezer=freezer), driver_name

    def _require_driver(self, name: str) -> None:
        """Refuse a driver that only the user wants. Where the site's own is missing, the node is at fault."""
        try:
            self._node.driver(name)
        except NodeFaultError as error:
            if name == self._node.config.guests.driver:
                raise
            raise RefusedError(f"--guest-driver={name}: {error}") from error

    async def _spec(self, job: Job, task: Task, asked: GuestRequest, driver_name: str) -> GuestSpec:
        image = await asyncio.to_thread(self._node.images.files, asked.image)
        person = await people.person(job.uid)
        if job.gid >= 0:
            person = msgspec.structs.replace(person, gid=job.gid)
        per = asked.per or self._node.config.guests.per
        name = decide.guest_name(job.key, per=per, task=task)
        async with self._resolving:  # one at a time, or two would be promised the same slot
            existing = await self._node.driver(driver_name).guests()
            mine = next((guest for guest in existing if guest.name == name), None)
            slot = mine.slot if mine else self._promise(name, existing) if per == "task" else 0
        for guest in existing:
            if guest.run == job.key:
                decide.refuse_other_image(
                    job_id=job.key.job_id,
                    asked=asked.image,
                    asked_hash=image.hash,
                    has=guest.image_name,
                    has_hash=guest.image,
                )
        spec = decide.resolve(
            asked,
            job=job,
            task=task,
            person=person,
            settings=self._node.config.guests,
            node=self._node.name,
            image_hash=image.hash,
            node_cpus=os.cpu_count() or 1,
            node_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            slot=slot,
        )
        sources = [decide.parse_mount(text).source for text in asked.mounts]
        return msgspec.structs.replace(spec, mounts=await people.reachable(spec.mounts, person, asked=sources))

    def _promise(self, name: str, existing: Sequence[Guest]) -> int:
        """Return a slot that neither a guest has nor another task was promised; the same one for the same name."""
        now_s = time.monotonic()
        listed = {guest.name for guest in existing}
        # A task that was refused or left before its guest was made never comes to claim its promise.
        self._promised = {
            other: promise for other, promise in self._promised.items() if other not in listed and promise[1] > now_s
        }
        if name not in self._promised:
            taken = [guest.slot for guest in existing] + [slot for slot, _ in self._promised.values()]
            self._promised[name] = decide.free_slot(taken, limit=SLOTS_MAX), now_s + PROMISE_S
        return self._promised[name][0]

    async def _ready(self, connection: socket.socket, spec: GuestSpec, driver_name: str) -> Guest | None:
        """Return the guest once it is ready; None when the task went away first."""
        driver = self._node.driver(driver_name)
        known = {guest.name for guest in await driver.guests()}
        leaving = asyncio.ensure_future(self._until_gone(connection))
        await asyncio.sleep(0)  # one look at the connection: nothing is begun for a task that has left already
        if leaving.done():
            return None
        if spec.name not in known:
            self._node.journal.add(
                "guest-starting",
                f"{spec.clone} clone of {spec.image_name}, {spec.cpus} CPUs, {spec.memory_bytes // 2**20} MiB",
                job_id=spec.run.job_id,
                guest=spec.name,
                uid=spec.uid,
            )
        self._node.reporter.poke()
        making = asyncio.ensure_future(driver.ensure(spec))
        try:
            while not making.done():
                done, _ = await asyncio.wait([making, leaving], timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                if leaving in done and not making.done():
                    if spec.per == "task":
                        await driver.destroy(spec.name)
                    return None
                if not done:
                    text = f"starting a {spec.clone} clone of {spec.image_name} on {spec.node}"
                    await tell(connection, {"status": "wait", "text": text})
            guest = await making
        except CarrelError as error:
            job_id, name = spec.run.job_id, spec.name
            self._node.journal.add("guest-failed", str(error), job_id=job_id, guest=name, uid=spec.uid)
            self._node.reporter.poke()
            raise
        finally:
            leaving.cancel()
            making.cancel()
        self._promised.pop(spec.name, None)  # it is listed now
        # Two first steps may have come at once, each with an image of its own.
        decide.refuse_other_image(
            job_id=spec.run.job_id,
            asked=spec.image_name,
            asked_hash=spec.image,
            has=guest.image_name,
            has_hash=guest.image,
        )
        if spec.name not in known:
            took_s = (guest.ready_s or 0) - guest.started_s
            self._say(
                "guest-ready", f"{guest.clone} clone, ready {took_s:.2f} s after its start; {guest.clone_why}", guest
            )
        return guest

    def _entered(self, spec: GuestSpec, guest: Guest) -> wire.Fields:
        """Return what a task is told that may enter."""
        return _entered(spec, guest, self._node.config.slurm.bin_dir)

    async def _runner(self, connection: socket.socket, message: wire.Message) -> None:
        guest = await self._one(message.get("guest"))
        _, uid, _ = wire.peer(connection)
        _require_owner(guest, uid)
        ident = message.get("id")
        if not ident.isalnum() or not ident.isascii() or len(ident) > IDENT_MAX:
            raise RefusedError(f"id={ident[:IDENT_MAX]!a}: must be at most {IDENT_MAX} letters and digits")
        entry = _agent(await self._node.driver(guest.driver).enter(guest.name, f"carrel.r.{ident}"), guest)
        try:
            await tell(connection, {"status": "ok"}, fd=entry.fd)
        finally:
            os.close(entry.fd)

    async def _until_gone(self, connection: socket.socket) -> None:
        """Return when the peer has left. It has nothing more to say: whoever speaks on has broken the contract.

        Reading on would give a peer that never stops speaking all of this process: what is there already is
        received without a turn for anybody else.
        """
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(connection, 1)

    async def _node_fault(self, job_id: int, task: Task, error: NodeFaultError) -> None:
        """Take the node out of scheduling and give the job back: it may do well elsewhere."""
        self._node.journal.add("node-fault", str(error), job_id=job_id)
        self._node.reporter.poke()
        with contextlib.suppress(UnreachableError, RefusedError):
            await self._node.scheduler.drain(self._node.name, f"carrel: {error}")
            if task.step == "batch":
                await self._node.scheduler.requeue(job_id)

    # -- people ------------------------------------------------------------------------------------------------

    async def _named(self, message: wire.Message, uid: int) -> Sequence[Guest]:
        guests = _visible((await self._node.report()).guests, uid)
        if name := message.get("guest"):
            return [guest for guest in guests if guest.name == name]
        job_id = requests.number(message, "job")
        return [guest for guest in guests if guest.run is not None and guest.run.job_id == job_id]

    async def _destroy(self, message: wire.Message, uid: int) -> None:
        guest = await self._one(message.get("guest"))
        _require_owner(guest, uid)
        await self.end_guest(guest, f"asked for by uid {uid}")

    async def _one(self, name: str) -> Guest:
        for driver in list(self._node.drivers.values()):
            for guest in await driver.guests():
                if guest.name == name:
                    return guest
        raise NotFoundError(f"no guest '{name}' on node {self._node.name}; see: carrel guest list")

    def _say(self, what: str, text: str, guest: Guest) -> None:
        job_id = guest.run.job_id if guest.run else 0
        self._node.journal.add(what, text, job_id=job_id, guest=guest.name, uid=guest.uid)
        self._node.reporter.poke()


def _agent(entry: Entry, guest: Guest) -> Agent:
    if not isinstance(entry, Agent):
        raise RefusedError(f"guest {guest.name} is a node of its own and cannot be entered")
    return entry


def _entered(spec: GuestSpec, guest: Guest, slurm_bin: str) -> wire.Fields:
    return {
        "status": "ok",
        "guest": guest.name,
        "image": spec.image_name,
        "uid": "0" if spec.root else str(spec.uid),
        "gid": "0" if spec.root else str(spec.gid),
        "group": [str(gid) for gid in ((0,) if spec.root else spec.groups)],
        "end_file": guest.end_file,
        "memory_mib": str(guest.memory_bytes // 2**20),
        "slurm_bin": slurm_bin,
    }


def _shown(report: NodeReport, events: Sequence[Event], uid: int) -> NodeReport:
    """Return what ``uid`` may know: the node's facts, and of guests, events and consoles his own."""
    guests = tuple(_visible(report.guests, uid))
    names = {guest.name for guest in guests}
    return msgspec.structs.replace(
        report,
        guests=guests,
        counters={name: counters for name, counters in report.counters.items() if name in names},
        events=tuple(event for event in events if uid in (0, event.uid)),
        consoles={name: text for name, text in report.consoles.items() if name in names},
    )


def _visible(guests: Sequence[Guest], uid: int) -> list[Guest]:
    return [guest for guest in guests if uid in (0, guest.uid)]


def _require_root(uid: int) -> None:
    if uid != 0:
        raise RefusedError("only root may say that a job begins or ends")


def _require_owner(guest: Guest, uid: int) -> None:
    if uid not in (0, guest.uid):
        raise RefusedError(f"guest {guest.name} belongs to {guest.user or guest.uid}, not to uid {uid}")
