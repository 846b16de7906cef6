"""The qemu driver: guests as QEMU processes that belong to their jobs.

The driver remembers nothing that is not in a guest's directory, so a new one adopts every guest. QEMU runs as the
job's user under carrel-guard, which outlives carreld; running tasks talk to QEMU directly and notice nothing.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec

from carrel import config
from carrel.core.guests import refuse_other_mounts
from carrel.drivers.qemu import accelerator, cgroups, launch
from carrel.drivers.qemu.clones import Broken, Clones
from carrel.drivers.qemu.command import Accelerator
from carrel.drivers.qemu.control import Control
from carrel.drivers.qemu.files import GuestDirectory, Record
from carrel.drivers.qemu.monitor import Monitor
from carrel.drivers.qemu.settings import Settings
from carrel.drivers.qemu.templates import Parts, TemplateError
from carrel.drivers.qemu.wake import WATCH_PERIOD_S, ended_by, wake
from carrel.errors import CarrelError, NodeFaultError, NotFoundError, RefusedError, UnreachableError
from carrel.model.guest import Agent, Counters, Entry, Guest, GuestSpec
from carrel.model.image import ImageFiles, KernelFiles
from carrel.ports import DriverContext
from carrel.process import Pid, process_state

NAME = "qemu"
DESTROY_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0


class QemuDriver:
    """Implements ``carrel.ports.Driver``."""

    def __init__(self, context: DriverContext) -> None:
        """Work in ``context.directory``, which is made if it is absent."""
        self._context = context
        self._settings = config.driver_settings(context.config, NAME, Settings)
        self.clones = Clones(context, self._settings)
        self._starting: dict[str, asyncio.Task[Guest]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._launching: dict[str, asyncio.Future[launch.Guard]] = {}
        self._monitors: dict[str, Monitor] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._guards: list[launch.Guard] = []
        self._choosing = asyncio.Lock()
        context.directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_context(cls, context: DriverContext) -> Self:
        return cls(context)

    # -- the verbs ---------------------------------------------------------------------------------------------

    async def check(self) -> tuple[str, str]:
        if not os.access(self._settings.binary, os.X_OK):
            raise NodeFaultError(
                f"node {self._context.node}: no {self._settings.binary}; is qemu-system-x86 installed?"
            )
        kernel = await asyncio.to_thread(self._context.images.kernel)
        await asyncio.to_thread(self.clones.tidy, kernel)
        return await self._accelerator()

    async def _accelerator(self) -> tuple[Accelerator, str]:
        async with self._choosing:  # what the first probe finds, the others read
            return await accelerator.choose(self._context, self._settings)

    async def guests(self) -> Sequence[Guest]:
        self._guards = [guard for guard in self._guards if guard.poll() is None]  # reaps the dead
        return [self._look(GuestDirectory(path)) for path in sorted(self._context.directory.iterdir())]

    async def ensure(self, spec: GuestSpec) -> Guest:
        while ending := self._ending.get(spec.name):  # or it would remove what is made here
            await asyncio.wait([ending])
        task = self._starting.get(spec.name)
        if task is None:
            task = asyncio.ensure_future(self._ensure(spec))
            self._starting[spec.name] = task
            task.add_done_callback(lambda _: self._starting.pop(spec.name, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        guest = await asyncio.shield(task)
        if record := self._directory(spec.name).read():
            refuse_other_mounts(spec, record.spec.mounts)
        return guest

    async def destroy(self, name: str) -> None:
        task = self._ending.get(name)
        if task is None:
            task = asyncio.ensure_future(self._destroy(name))
            self._ending[name] = task
            task.add_done_callback(lambda _: self._ending.pop(name, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)  # a hook that waited long enough does not stop half-way what it began

    async def _destroy(self, name: str) -> None:
        if task := self._starting.pop(name, None):
            task.cancel()
            await asyncio.wait([task])
        if thread := self._launching.pop(name, None):
            await asyncio.wait([thread])
        if monitor := self._monitors.pop(name, None):
            await monitor.close()
        directory = self._directory(name)
        if not directory.path.exists():
            return
        await self._end_processes(directory)
        if record := directory.read():
            await asyncio.to_thread(cgroups.remove, record.spec.job_cgroups, launch.cgroup_name(record.spec))
        await asyncio.to_thread(directory.remove)
        self._locks.pop(name, None)

    async def enter(self, name: str, port: str) -> Entry:
        directory = self._existing(name)
        if ended := directory.end():
            raise RefusedError(_gone_sentence(*ended))
        try:
            monitor = await self._monitor(directory)
            return Agent(fd=await monitor.add_port(port))
        except (UnreachableError, RefusedError) as error:
            if ended := await ended_by(directory):
                raise RefusedError(_gone_sentence(*ended)) from error
            raise

    async def suspend(self, name: str, *, suspended: bool) -> None:
        """Stop the guest's CPUs, or let them run on with the clock set right: it stood still meanwhile."""
        directory = self._existing(name)
        monitor = await self._monitor(directory)
        stopped = await monitor.stopped()
        if suspended and not stopped:
            await monitor.stop()
        if stopped and not suspended:
            await monitor.cont()
        if not suspended and (stopped or directory.suspended):
            await self._set_clock(directory)  # also where an earlier call came only so far
        directory.mark_suspended(suspended)

    async def read(self, name: str) -> Counters:
        directory = self._existing(name)
        qemu = directory.pids().get("qemu")
        if qemu is None or not qemu.alive:
            return Counters()
        counters = await asyncio.to_thread(_counters, qemu.number)  # the kernel walks all of its pages
        try:
            disks = await (await self._monitor(directory)).disks()
        except UnreachableError:
            return counters
        return msgspec.structs.replace(counters, **disks)

    async def _set_clock(self, directory: GuestDirectory) -> None:
        control = await self._control(directory)
        try:
            await control.tell({"verb": "clock", "clock_ns": str(time.time_ns())})
            await control.ask({"verb": "ping"}, answer="pong", timeout_s=ANSWER_TIMEOUT_S)
        finally:
            control.close()

    # -- looking -----------------------------------------------------------------------------------------------

    def _directory(self, name: str) -> GuestDirectory:
        return GuestDirectory(self._context.directory / name)

    def _existing(self, name: str) -> GuestDirectory:
        directory = self._directory(name)
        if not directory.path.exists():
            raise NotFoundError(f"no guest {name} on this node; see: carrel guest list")
        return directory

    def _look(self, directory: GuestDirectory) -> Guest:
        directory.bound_log()
        record = directory.read()
        if record is None:
            return Guest(name=directory.name, node=self._context.node, driver=NAME, state="down")
        spec, pids = record.spec, directory.pids()
        qemu = pids.get("qemu")
        # The guard writes why, a moment after QEMU went: looked at in this order, its word is never missed.
        all_gone = qemu is not None and not any(pid.alive for pid in pids.values())
        ended = directory.end()
        state, reason = "starting", ""
        if ended or all_gone:
            state = "down"
            reason = record.failure or (ended[1] if ended else "qemu is gone, and its guard with it")
        elif record.ready_s is not None:
            state = "suspended" if directory.suspended else "ready"
        return Guest(
            name=spec.name,
            node=spec.node,
            driver=NAME,
            state=state,  # type: ignore[arg-type]
            run=spec.run,
            image_name=spec.image_name,
            image=spec.image,
            per=spec.per,
            clone=record.clone,
            clone_why=record.clone_why,
            step=spec.step,
            task=spec.task,
            slot=spec.slot,
            cpus=spec.cpus,
            memory_bytes=spec.memory_bytes,
            uid=spec.uid,
            user=spec.user,
            host_name=spec.host_name,
            kernel=record.kernel,
            accelerator=record.accelerator,
            accelerator_why=record.accelerator_why,
            pid=qemu.number if qemu else 0,
            started_s=record.started_s,
            ready_s=record.ready_s,
            phases=record.phases,
            reason=reason,
            console=str(directory.console),
            end_file=str(directory.end_file),
        )

    # -- starting ----------------------------------------------------------------------------------------------

    async def _ensure(self, spec: GuestSpec) -> Guest:
        directory = self._directory(spec.name)
        record = directory.read()
        if record and not directory.pids() and not directory.end():
            record = None  # noted by a carreld that died before it had started it
        try:
            async with asyncio.timeout(spec.boot_timeout_s):
                if record is None:
                    record = await self._start(directory, spec)
                elif ended := directory.end():
                    raise RefusedError(record.failure or _gone_sentence(*ended))
                if record.ready_s is None:
                    record = await self._finish(directory, record)
        except TimeoutError as error:
            sentence = _why_not_ready(directory, spec)
            await self._end_processes(directory)
            raise _failed(directory, sentence) from error
        except UnreachableError as error:
            raise _failed(directory, await self._why_gone(directory, spec, error)) from error
        return self._look(directory)

    async def _start(self, directory: GuestDirectory, spec: GuestSpec) -> Record:
        began_s = time.time()
        try:
            return await self._try(directory, spec)
        except TemplateError as error:  # nothing runs yet
            broken = Broken(why=str(error), used_s=began_s, is_spoilt=error.is_spoilt)
            return await self._try(directory, spec, broken=broken)

    async def _finish(self, directory: GuestDirectory, record: Record) -> Record:
        try:
            return await self._wake(directory, record)
        except TemplateError as error:
            return await self._wake(directory, await self._start_anew(directory, record, error))

    async def _wake(self, directory: GuestDirectory, record: Record) -> Record:
        return await wake(
            directory,
            record,
            control=self._control,
            monitor=self._monitor,
            resume_timeout_s=self._settings.resume_timeout_s,
        )

    async def _try(self, directory: GuestDirectory, spec: GuestSpec, *, broken: Broken | None = None) -> Record:
        image = msgspec.structs.replace(self._context.images.files(spec.image), name=spec.image_name)
        if not image.has_shell:
            raise RefusedError(
                f"image {spec.image_name} has no /bin/sh, so no command can run in it; see: carrel image show"
            )
        kernel = await asyncio.to_thread(self._context.images.kernel)
        kind, why = await self._accelerator()
        plan = await self.clones.plan(spec, kernel=kernel, accelerator=kind, broken=broken)
        if broken:
            await self.clones.remove(plan.conditions, broken)
        if directory.path.exists():  # left by a carreld that was killed before it had started this guest
            await self._end_processes(directory)
            await asyncio.to_thread(directory.remove)
        directory.make()
        record = Record(
            spec=spec,
            accelerator=kind,
            accelerator_why=why,
            clone=plan.choice.clone,
            clone_why=plan.choice.why,
            memory=plan.memory,
            ports=plan.conditions.ports,
            template=plan.template.conditions.digest if plan.template else "",
            started_s=time.time(),
        )
        directory.write(record)
        try:
            guard = await self._launch(directory, record, image, kernel, self.clones.opener(plan, spec))
        except (CarrelError, OSError) as error:
            # Nothing runs yet: the next task may try again.
            await asyncio.to_thread(cgroups.remove, spec.job_cgroups, launch.cgroup_name(spec))
            await asyncio.to_thread(directory.remove)
            if isinstance(error, CarrelError):
                raise
            raise RefusedError(f"guest {spec.name} cannot be started: {error}") from error
        await self._running(directory, guard)
        if plan.choice.make_template:
            self.clones.make_soon(plan, image=image, kernel=kernel)
        return directory.read() or record

    async def _start_anew(self, directory: GuestDirectory, record: Record, error: TemplateError) -> Record:
        """Boot a guest whose template was of no use, in what is left of its time."""
        await self._end_processes(directory)
        await asyncio.to_thread(cgroups.remove, record.spec.job_cgroups, launch.cgroup_name(record.spec))
        if monitor := self._monitors.pop(directory.name, None):
            await monitor.close()
        await asyncio.to_thread(directory.remove)
        broken = Broken(why=str(error), used_s=record.started_s, is_spoilt=error.is_spoilt)
        return await self._try(directory, record.spec, broken=broken)

    async def _launch(
        self,
        directory: GuestDirectory,
        record: Record,
        image: ImageFiles,
        kernel: KernelFiles,
        template: Callable[[ExitStack], Parts] | None,
    ) -> launch.Guard:
        """Start the guard in a thread. A thread goes on when its waiter is cancelled, so ``destroy`` waits for it."""

        def work() -> launch.Guard:
            guard = launch.start(
                self._context, self._settings, directory, record, image=image, kernel=kernel, template=template
            )
            self._guards.append(guard)
            return guard

        thread = asyncio.ensure_future(asyncio.to_thread(work))
        self._launching[directory.name] = thread
        thread.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(thread)
        finally:
            if thread.done():
                self._launching.pop(directory.name, None)

    async def _running(self, directory: GuestDirectory, guard: launch.Guard) -> None:
        """Wait until the guard has written down its processes, or ended with a sentence."""
        while "qemu" not in directory.pids():
            if guard.poll() is not None:
                said = directory.end()
                raise RefusedError(said[1] if said else directory.guard_log() or "carrel-guard ended at once")
            await asyncio.sleep(WATCH_PERIOD_S / 10)

    async def _control(self, directory: GuestDirectory) -> Control:
        with directory.short() as short:
            return await Control.connect(short / "control.sock")

    async def _monitor(self, directory: GuestDirectory) -> Monitor:
        lock = self._locks.setdefault(directory.name, asyncio.Lock())
        async with lock:
            monitor = self._monitors.get(directory.name)
            if monitor is None or not monitor.connected:
                if monitor is not None:
                    await monitor.close()
                with directory.short() as short:
                    monitor = await Monitor.connect(short / "qmp.sock")
                self._monitors[directory.name] = monitor
            return monitor

    # -- ending ------------------------------------------------------------------------------------------------

    async def _end_processes(self, directory: GuestDirectory) -> None:
        """End the guard, which ends QEMU; where it does not, end both."""
        pids = directory.pids() or await asyncio.to_thread(_unwritten, directory)
        if guard := pids.get("guard"):
            guard.kill(signal.SIGTERM)
        deadline = time.monotonic() + DESTROY_TIMEOUT_S
        while any(pid.alive for pid in pids.values()):
            self._guards = [guard for guard in self._guards if guard.poll() is None]
            if time.monotonic() > deadline or ("guard" in pids and not pids["guard"].alive):
                for pid in pids.values():
                    pid.kill(signal.SIGKILL)
            if time.monotonic() > deadline + DESTROY_TIMEOUT_S:
                raise CarrelError(f"guest {directory.name}: processes {[p.number for p in pids.values()]} do not end")
            await asyncio.sleep(WATCH_PERIOD_S / 5)

    async def _why_gone(self, directory: GuestDirectory, spec: GuestSpec, error: CarrelError) -> str:
        """Return the sentence for a guest that ended while it started."""
        ended = await ended_by(directory)
        reason = ended[1] if ended else error
        return f"guest of image {spec.image_name}: {directory.panic() or reason}; {_see(spec)}"


def _failed(directory: GuestDirectory, sentence: str) -> RefusedError:
    """Note why a guest did not start, and return it."""
    if record := directory.read():
        directory.write(msgspec.structs.replace(record, failure=sentence))
    return RefusedError(sentence)


def _gone_sentence(word: str, sentence: str) -> str:
    """Return what a task is told that comes after the guest's end: in the words of ``carrel-enter``."""
    return f"out of memory: {sentence}" if word == "oom" else f"the guest is gone: {sentence}"


def _why_not_ready(directory: GuestDirectory, spec: GuestSpec) -> str:
    what = directory.panic() or f"guest not ready after {spec.boot_timeout_s:g} s (--guest-boot-timeout)"
    return f"{what}; {_see(spec)}"


def _see(spec: GuestSpec) -> str:
    return f"see: carrel guest console {spec.run.job_id}"


def _unwritten(directory: GuestDirectory) -> dict[str, Pid]:
    """Find a guard that had not yet written down its processes, by its own exact ``--dir``."""
    wanted = [b"--dir", os.fsencode(directory.path)]
    found: dict[str, Pid] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if len(words) > 3 and words[1:3] == wanted and words[0].endswith(b"/carrel-guard"):
                state = process_state(int(entry.name))
                if state:
                    found[f"guard{entry.name}" if found else "guard"] = Pid(int(entry.name), state[1])
    return found


def _counters(pid: int) -> Counters:
    cpu = rss = pss = shared = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        rss = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, LookupError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        pss, shared = kib["Pss"] * 1024, (kib["Shared_Clean"] + kib["Shared_Dirty"]) * 1024
    return Counters(cpu_seconds_total=cpu, memory_bytes=rss, memory_pss_bytes=pss, memory_shared_bytes=shared)
