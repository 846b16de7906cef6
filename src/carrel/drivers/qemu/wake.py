"""From a started QEMU to a guest that is somebody's: its agent's first word, its memory, its identity."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec

from carrel.core.clones import growth
from carrel.drivers.qemu.control import Control, identity, kernel_of
from carrel.drivers.qemu.files import GuestDirectory, Record
from carrel.drivers.qemu.monitor import Monitor
from carrel.drivers.qemu.templates import TemplateError
from carrel.errors import UnreachableError

WATCH_PERIOD_S = 0.05
END_LOOKS = 40
DYING_LOOKS = 10

_T = TypeVar("_T")


class _Patience(NamedTuple):
    """How long a guest may take to go on from its template."""

    site_s: float
    boot_timeout_s: float
    """The job's own."""

    @property
    def limit_s(self) -> float:
        """What is left of the job's time is for the boot of another."""
        return min(self.site_s, self.boot_timeout_s / 2)


async def wake(
    directory: GuestDirectory,
    record: Record,
    *,
    control: Callable[[GuestDirectory], Awaitable[Control]],
    monitor: Callable[[GuestDirectory], Awaitable[Monitor]],
    resume_timeout_s: float,
) -> Record:
    """Wait for the agent, tell it who it is, and return the record of a guest that tasks can enter.

    The caller bounds the wait. May be called again for a guest that an earlier carreld did not come to the end with.

    Raises:
        TemplateError: it does not go on from its template.
        UnreachableError: QEMU ended.
        RefusedError: the agent cannot make the guest what it should be; it says why.
    """
    patience = _Patience(resume_timeout_s, record.spec.boot_timeout_s) if record.template else None
    talk = await _blame_template(directory, record, control(directory), patience)
    phases = [("qemu", time.time() - record.started_s)]

    def mark(phase: str) -> None:
        phases.append((phase, time.time() - record.started_s - sum(seconds for _, seconds in phases)))

    try:
        kernel = await _hello(directory, record, talk, monitor, patience)
        mark("resume" if record.template else "boot")
        if grown := growth(record.spec.memory_bytes, record.memory.size_bytes) if record.memory else 0:
            await while_it_lives(directory, (await monitor(directory)).grow(grown))
            mark("memory")
        await while_it_lives(
            directory,
            talk.ask(identity(record.spec), answer="ready", timeout_s=record.spec.boot_timeout_s),
        )
        mark("identity")
    finally:
        talk.close()
    ready = msgspec.structs.replace(
        record,
        kernel=kernel,
        ready_s=record.started_s + sum(seconds for _, seconds in phases),  # phases are all that a start consists of
        phases=tuple((phase, round(seconds, 4)) for phase, seconds in phases),
    )
    directory.write(ready)
    return ready


async def _hello(
    directory: GuestDirectory,
    record: Record,
    talk: Control,
    monitor: Callable[[GuestDirectory], Awaitable[Monitor]],
    patience: _Patience | None,
) -> str:
    """Return the guest's kernel once its agent has said hello, after a boot or from a template."""
    if not record.template:
        return kernel_of(await while_it_lives(directory, talk.hello()))

    async def resume() -> str:
        await while_it_lives(directory, (await monitor(directory)).restore(record.state))
        # The template was stopped in conversation, so its agent does not greet by itself.
        await talk.tell({"verb": "hello"})
        return kernel_of(await while_it_lives(directory, talk.hello()))

    return await _blame_template(directory, record, resume(), patience)


async def _blame_template(
    directory: GuestDirectory, record: Record, work: Awaitable[_T], patience: _Patience | None
) -> _T:
    """Return what ``work`` returns, which the template has a part in where there is one.

    Raises:
        TemplateError: it did not come about, and nobody else is to blame.
    """
    try:
        async with asyncio.timeout(patience and patience.limit_s):
            return await work
    except TimeoutError as error:
        if patience is None:  # not ours: the caller's
            raise
        # A job that allows its guest a second says nothing about a template that others wait for.
        is_spoilt = patience.limit_s >= patience.site_s
        raise TemplateError(f"no word from it after {patience.limit_s:g} s", is_spoilt=is_spoilt) from error
    except UnreachableError as error:
        ended = await ended_by(directory) if record.template else None
        # Whoever ends the guest with its job, or takes its memory, says nothing against the template.
        if not record.template or (ended and ended[0] not in {"exited", "stopped"}):
            raise
        raise TemplateError(ended[1] if ended else str(error)) from error


async def while_it_lives(directory: GuestDirectory, work: Coroutine[Any, Any, _T]) -> _T:
    """Return what ``work`` returns.

    Raises:
        UnreachableError: QEMU ended first.
    """
    gone = asyncio.ensure_future(_gone(directory))
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait([gone, doing], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise UnreachableError("qemu ended")
        return await doing
    finally:
        gone.cancel()
        doing.cancel()


async def _gone(directory: GuestDirectory) -> None:
    while directory.end() is None and all(pid.alive for pid in directory.pids().values()):  # noqa: ASYNC110  # a file
        await asyncio.sleep(WATCH_PERIOD_S)


async def ended_by(directory: GuestDirectory) -> tuple[str, str] | None:
    """Return why a guest is gone (word, sentence), or None where it lives.

    QEMU closes its sockets before it is gone, and its guard writes a moment after it went.
    """
    qemu = directory.pids().get("qemu")
    for look in range(END_LOOKS):
        if ended := directory.end():
            return ended
        if look >= DYING_LOOKS and qemu is not None and qemu.alive:
            return None
        await asyncio.sleep(WATCH_PERIOD_S)
    return ("killed", "qemu is gone, and its guard with it") if qemu is not None and not qemu.alive else None
