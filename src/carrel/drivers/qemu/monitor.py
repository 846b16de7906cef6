"""QEMU's monitor: hot-adding one port per task, stopping and continuing the guest.

Ports are added one at a time and each is waited for: QEMU answers *done* also for those of a burst that the guest
then never sees (3 of 29 were lost in one). A port is used once. What a dead task left unread can thus never reach
the next task. A guest has so many and no more: who comes when all are taken is told so.
"""

import asyncio
import contextlib
import itertools
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from carrel.core.clones import ways_in
from carrel.errors import RefusedError, UnreachableError

PORT_OPEN_TIMEOUT_S = 10.0
PORT_TRIES = 3
ROOM_TIMEOUT_S = 2.0
"""How long a task waits at a guest whose ports are all taken. A task's port goes a moment after the task, and the next
step of a job may be quicker than that."""
COLLECT_TRIES = 20
COLLECT_PERIOD_S = 0.1
GROW_TIMEOUT_S = 30.0
LOOK_PERIOD_S = 0.003

_FULL = ("Maximum port limit", "Out-of-range port id")
"""What QEMU says when all ports are taken: the second where their number is no multiple of 32."""


class _FullError(RefusedError):
    """All ports are taken."""


class Monitor:
    """One connection to one QEMU. It ends with QEMU; a new one can be made at any time."""

    def __init__(self, client: QMPClient) -> None:
        """Use a connected client."""
        self._client = client
        self._lock = asyncio.Lock()
        self._open: dict[str, asyncio.Event] = {}
        self._freed = asyncio.Event()
        # Of this connection alone: the ports of an earlier one, of a carreld of the same pid too, may have tasks.
        self._idents = (f"port{number}-{secrets.token_hex(4)}" for number in itertools.count())
        self._listener = EventListener(names=("VSERPORT_CHANGE",))
        self._client.register_listener(self._listener)
        self._background: set[asyncio.Task[None]] = set()
        self._keep(self._watch())

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = 10.0) -> "Monitor":
        """Connect to the listening socket at ``path``.

        Raises:
            UnreachableError: QEMU does not answer there.
        """
        client = QMPClient("carrel")
        client.logger.disabled = True
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(str(path))
        except (QMPError, OSError, TimeoutError) as error:
            raise UnreachableError(f"qemu's monitor at {path.name}: {error or 'no answer'}") from error
        monitor = cls(client)
        monitor._keep(monitor._collect_all())  # ports of tasks that ended while nobody listened
        return monitor

    async def close(self) -> None:
        for task in list(self._background):
            task.cancel()
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(1):
                await self._client.disconnect()

    @property
    def connected(self) -> bool:
        return self._client.runstate.name == "RUNNING"

    async def add_port(self, name: str) -> int:
        """Add a port called ``name`` and return the host's end of it, once the agent has opened the other.

        Raises:
            RefusedError: the guest does not open it, or all that it can have are taken.
        """
        deadline_s = time.monotonic() + ROOM_TIMEOUT_S
        while True:
            freed = self._freed  # the one of now: what goes while we are told that all are taken counts
            try:
                return await self._add_port(name)
            except _FullError as error:
                try:
                    async with asyncio.timeout(deadline_s - time.monotonic()):
                        await freed.wait()
                except TimeoutError:
                    raise RefusedError(await self._full_sentence()) from error

    async def _add_port(self, name: str) -> int:
        async with self._lock:
            for _ in range(PORT_TRIES):
                ident = next(self._idents)
                opened = self._open[ident] = asyncio.Event()
                ours, theirs = socket.socketpair()
                try:
                    async with asyncio.timeout(PORT_OPEN_TIMEOUT_S):
                        await self._plug(ident, name, theirs)
                        await opened.wait()
                    return ours.detach()
                except TimeoutError:
                    self._keep(self._collect(ident))
                except (QMPError, OSError) as error:
                    self._keep(self._collect(ident))
                    kind = _FullError if any(words in str(error) for words in _FULL) else RefusedError
                    raise kind(f"the guest takes no further task: {error}") from error
                finally:
                    ours.close()
                    theirs.close()
        raise RefusedError("the guest does not answer; see: carrel guest console")

    async def _full_sentence(self) -> str:
        ports: int = await self._execute("qom-get", path="/machine/peripheral/vs", property="max_ports")
        return (
            f"the guest takes no further task: all {ways_in(ports)} ways in are taken; start fewer at once, or ask for "
            "more memory (--mem), see: drivers.qemu.ports_max"
        )

    async def stop(self) -> None:
        await self._execute("stop")

    async def cont(self) -> None:
        await self._execute("cont")

    async def stopped(self) -> bool:
        return not (await self._execute("query-status"))["running"]

    async def disks(self) -> dict[str, int]:
        """Return what the guest did with all its disks: the fields ``disk_*`` of ``Counters``."""
        found = [device["stats"] for device in await self._execute("query-blockstats") if device.get("qdev")]
        names = {
            "read_bytes": "rd_bytes",
            "written_bytes": "wr_bytes",
            "reads": "rd_operations",
            "writes": "wr_operations",
        }
        return {f"disk_{ours}": sum(stats[theirs] for stats in found) for ours, theirs in names.items()}

    async def freeze(self, state: int) -> None:
        """Write the devices' state to the descriptor ``state``, and leave the guest stopped for good.

        Its memory is not written: it is the file that the guest has been running in.

        Raises:
            UnreachableError: QEMU cannot.
        """
        await self._ignore_shared()
        self._client.send_fd_scm(state)
        if self._has_file_migration:
            found = await self._execute("add-fd")
            await self._execute("migrate", uri=f"file:/dev/fdset/{found['fdset-id']}")
        else:
            await self._execute("getfd", fdname="state")
            await self._execute("migrate", uri="fd:state")
        await self._until_migrated()

    async def restore(self, state: int) -> None:
        """Let a guest that waits for a template's state go on from ``state``, the number of QEMU's own descriptor.

        A second call changes nothing.

        Raises:
            UnreachableError: QEMU cannot read it.
        """
        if (await self._execute("query-status"))["status"] != "inmigrate":
            return
        # The guest was stopped in conversation: it must not hear that its host left and came back.
        while not await self._has_control():  # noqa: ASYNC110  # another process makes it so
            await asyncio.sleep(LOOK_PERIOD_S)
        await self._ignore_shared()
        uri = f"file:/proc/self/fd/{state}" if self._has_file_migration else f"fd:{state}"
        await self._execute("migrate-incoming", uri=uri)

    async def grow(self, size_bytes: int) -> None:
        """Plug this much memory in all into a guest that was made from a template; wait until the guest has it.

        Raises:
            UnreachableError: it does not take it within ``GROW_TIMEOUT_S``.
        """
        await self._execute("qom-set", path="/machine/peripheral/growth", property="requested-size", value=size_bytes)
        deadline = time.monotonic() + GROW_TIMEOUT_S
        while True:
            devices = await self._execute("query-memory-devices")
            if any(device["data"].get("id") == "growth" and device["data"]["size"] >= size_bytes for device in devices):
                return
            if time.monotonic() > deadline:
                raise UnreachableError(f"the guest took no further {size_bytes // 2**20} MiB of memory")
            await asyncio.sleep(LOOK_PERIOD_S)

    @property
    def _has_file_migration(self) -> bool:
        """QEMU 9.1 learned ``file:`` on a set of descriptors, and 11 no longer takes a file for ``fd:``."""
        greeting = self._client.greeting
        version: Any = greeting.QMP.version["qemu"] if greeting else {"major": 0}
        return bool(version["major"] >= 10)

    async def _has_control(self) -> bool:
        chardevs: Any = await self._execute("query-chardev")
        return all("disconnected" not in found["filename"] for found in chardevs if found["label"] == "control")

    async def _ignore_shared(self) -> None:
        await self._execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    async def _until_migrated(self) -> None:
        async with asyncio.timeout(PORT_OPEN_TIMEOUT_S):
            while (found := await self._execute("query-migrate")).get("status") != "completed":
                if found.get("status") in {"failed", "cancelled"}:
                    raise UnreachableError(f"qemu cannot save the guest: {found.get('error-desc', 'no reason given')}")
                await asyncio.sleep(LOOK_PERIOD_S)

    async def _execute(self, command: str, **arguments: Any) -> Any:
        try:
            async with asyncio.timeout(PORT_OPEN_TIMEOUT_S):
                return await self._client.execute(command, arguments or None)
        except (QMPError, OSError, TimeoutError) as error:
            raise UnreachableError(f"qemu's monitor: {command}: {error or 'no answer'}") from error

    async def _plug(self, ident: str, name: str, theirs: socket.socket) -> None:
        self._client.send_fd_scm(theirs.fileno())
        await self._client.execute("getfd", {"fdname": ident})
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": ident}}, "server": False}}
        await self._client.execute("chardev-add", {"id": ident, "backend": backend})
        device = {"driver": "virtserialport", "bus": "vs.0", "id": ident, "chardev": ident, "name": name}
        await self._client.execute("device_add", device)

    async def _watch(self) -> None:
        async for event in self._listener:
            data: Any = event["data"]
            ident = str(data["id"])
            if ident not in self._open:
                continue
            if data["open"]:
                self._open[ident].set()
            elif self._open[ident].is_set():
                self._keep(self._collect(ident))

    async def _collect(self, ident: str) -> None:
        """Remove a port whose task has ended. QEMU calls a back end *busy* for some 40 ms after its device went."""
        self._open.pop(ident, None)
        if await self._remove("device_del", ident):
            self._freed.set()
            self._freed = asyncio.Event()
        await self._remove("chardev-remove", ident)

    async def _remove(self, command: str, ident: str) -> bool:
        """Tell whether it was there, and is gone."""
        for _ in range(COLLECT_TRIES):
            try:
                await self._client.execute(command, {"id": ident})
            except ExecuteError as error:
                if "not found" in str(error):
                    break
                await asyncio.sleep(COLLECT_PERIOD_S)
            except (QMPError, OSError):
                break
            else:
                return True
        return False

    async def _collect_all(self) -> None:
        with contextlib.suppress(QMPError, OSError, ExecuteError):
            chardevs: Any = await self._client.execute("query-chardev")
            for chardev in chardevs:
                if chardev["label"].startswith("port") and not chardev["frontend-open"]:
                    await self._collect(chardev["label"])

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
