"""A driver whose guests are files: for the model test, for the docs, and for authors to read.

It keeps every promise of ``carrel.ports.Driver``, also across processes: what one ``FakeDriver`` made, another
over the same directory sees. Nothing runs in its guests.
"""

import asyncio
import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from carrel.errors import NotFoundError, RefusedError
from carrel.model.guest import Agent, Counters, Entry, Guest, GuestSpec


class FakeDriver:
    """Guests as ``<where>/<name>.json``. See ``carrel.ports.Driver`` for what each verb promises."""

    def __init__(self, where: Path) -> None:
        """Keep guests in ``where``, which is made."""
        where.mkdir(parents=True, exist_ok=True)
        self._where = where
        self._entered: dict[str, dict[str, int]] = {}

    async def check(self) -> tuple[str, str]:
        return "fake", "nothing is started"

    async def guests(self) -> Sequence[Guest]:
        found = (self._load(path.stem) for path in sorted(self._where.glob("*.json")))
        return tuple(msgspec.structs.replace(guest, tasks=self._tasks(guest.name)) for guest in found if guest)

    async def ensure(self, spec: GuestSpec) -> Guest:
        guest = self._load(spec.name)
        if guest is None or guest.state == "down":
            self._store(_starting(spec))
        # A real guest boots here: another task may ask for it, and the caller may be cancelled.
        await asyncio.sleep(0)
        guest = self._load(spec.name)
        if guest is None:
            raise RefusedError(f"guest {spec.name} was destroyed while it started")
        if guest.state == "starting":
            guest = msgspec.structs.replace(guest, state="ready", ready_s=time.time())
            self._store(guest)
        return guest

    async def destroy(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        for fd in self._entered.pop(name, {}).values():
            os.close(fd)

    async def enter(self, name: str, port: str) -> Entry:
        guest = self._known(name)
        if guest.state != "ready":
            raise RefusedError(f"guest {name} is {guest.state}: {guest.reason or 'no task can enter it now'}")
        self._tasks(name)
        if port in self._entered.get(name, {}):
            raise RefusedError(f"guest {name} has a living task on port {port}; take another name")
        ours, theirs = socket.socketpair()
        self._entered.setdefault(name, {})[port] = ours.detach()
        return Agent(fd=theirs.detach())

    async def suspend(self, name: str, *, suspended: bool) -> None:
        guest = self._known(name)
        if guest.state in {"ready", "suspended"}:
            self._store(msgspec.structs.replace(guest, state="suspended" if suspended else "ready"))

    async def read(self, name: str) -> Counters:
        return Counters(memory_bytes=self._known(name).memory_bytes)

    def fail(self, name: str, reason: str) -> None:
        """Let a guest go down, as a crash of its kernel would; for tests."""
        self._store(msgspec.structs.replace(self._known(name), state="down", reason=reason))

    def _tasks(self, name: str) -> int:
        """Count the tasks inside, after letting go of those whose end was closed."""
        inside = self._entered.get(name, {})
        for port, fd in list(inside.items()):
            poll = select.poll()
            poll.register(fd, 0)
            if any(event & select.POLLHUP for _, event in poll.poll(0)):
                os.close(inside.pop(port))
        return len(inside)

    def _path(self, name: str) -> Path:
        return self._where / f"{name}.json"

    def _known(self, name: str) -> Guest:
        guest = self._load(name)
        if guest is None:
            raise NotFoundError(f"no guest {name} on this node; see: carrel guest list")
        return guest

    def _load(self, name: str) -> Guest | None:
        try:
            return msgspec.json.decode(self._path(name).read_bytes(), type=Guest)
        except FileNotFoundError:
            return None

    def _store(self, guest: Guest) -> None:
        # Renamed into place, so that another process never reads half a guest.
        draft = self._where / f".{guest.name}.{os.getpid()}"
        draft.write_bytes(msgspec.json.encode(guest))
        draft.replace(self._path(guest.name))


def _starting(spec: GuestSpec) -> Guest:
    return Guest(
        name=spec.name,
        node=spec.node,
        driver="fake",
        state="starting",
        run=spec.run,
        image_name=spec.image_name,
        image=spec.image,
        per=spec.per,
        clone="full" if spec.clone == "full" else "linked",
        step=spec.step,
        task=spec.task,
        slot=spec.slot,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        uid=spec.uid,
        user=spec.user,
        host_name=spec.host_name,
        started_s=time.time(),
    )
