"""The monitor's bookkeeping of ports, against a QEMU that says what a test wants it to say, when it wants it."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, Message
from qemu.qmp.models import ErrorResponse

from carrel.drivers.qemu import monitor
from carrel.drivers.qemu.monitor import Monitor
from carrel.errors import RefusedError


class Qemu:
    """The client of a QEMU that answers each command as ``answer`` does, and tells events through ``tell``."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []
        self.answer: Callable[[str], Any] = lambda _: None
        self._listeners: list[EventListener] = []

    def register_listener(self, listener: EventListener) -> None:
        self._listeners.append(listener)

    def send_fd_scm(self, fd: int) -> None: ...

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        self.commands.append((command, str(arguments.get("id", ""))))
        answer = self.answer(command)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def disconnect(self) -> None: ...

    async def tell(self, ident: str, *, is_open: bool) -> None:
        for listener in self._listeners:
            await listener.put(Message({"event": "VSERPORT_CHANGE", "data": {"id": ident, "open": is_open}}))
        await asyncio.sleep(0)

    def plugged(self) -> list[str]:
        return [ident for command, ident in self.commands if command == "device_add"]


async def listening(qemu: Qemu) -> Monitor:
    """Return a monitor that listens already."""
    client: Any = qemu
    made = Monitor(client)
    await asyncio.sleep(0)
    return made


def test_a_port_that_was_opened_and_closed_before_anybody_looked_is_given_all_the_same() -> None:
    async def story() -> None:
        qemu = Qemu()
        port = await listening(qemu)

        async def open_and_close() -> None:
            ident = qemu.plugged()[-1]
            await qemu.tell(ident, is_open=True)
            await qemu.tell(ident, is_open=False)
            await asyncio.sleep(0.01)

        qemu.answer = lambda command: open_and_close() if command == "device_add" else None
        os.close(await port.add_port("carrel.t.1"))
        await port.close()

    asyncio.run(story())


def test_no_two_connections_give_ports_of_one_name_since_a_task_may_be_on_the_other() -> None:
    async def story() -> None:
        qemu = Qemu()
        qemu.answer = lambda command: qemu.tell(qemu.plugged()[-1], is_open=True) if command == "device_add" else None
        for _ in range(2):
            port = await listening(qemu)
            for _ in range(2):
                os.close(await port.add_port("carrel.t.1"))
            await port.close()
        assert len(set(qemu.plugged())) == 4

    asyncio.run(story())


def test_a_qemu_that_does_not_answer_holds_up_a_task_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "PORT_OPEN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(monitor, "PORT_TRIES", 2)

    async def story() -> None:
        qemu = Qemu()
        port = await listening(qemu)
        qemu.answer = lambda command: asyncio.sleep(60) if command == "chardev-add" else None
        with pytest.raises(RefusedError, match="the guest does not answer"):
            await port.add_port("carrel.t.1")
        await port.close()

    asyncio.run(story())


class Crowded(Qemu):
    """A QEMU whose device has so many ports for tasks, each of which opens at once."""

    def __init__(self, room: int, words: str = "Maximum port limit for this device reached") -> None:
        super().__init__()
        self.refused = asyncio.Event()
        self._room = room
        self._words = words
        self._there: set[str] = set()

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        ident = str(arguments.get("id", ""))
        await super().execute(command, arguments)
        match command:
            case "qom-get":
                return self._room + 2
            case "device_add" if len(self._there) == self._room:
                self.refused.set()
                _fail(self._words)
            case "device_add":
                self._there.add(ident)
                await self.tell(ident, is_open=True)
            case "device_del" if ident not in self._there:
                _fail(f"Device '{ident}' not found")
            case "device_del":
                self._there.remove(ident)
        return None


def _fail(words: str) -> None:
    said = ErrorResponse({"error": {"class": "GenericError", "desc": f"virtio-serial-bus: {words}"}})
    raise ExecuteError(said, Message(), Message())


@pytest.mark.parametrize(
    "words", ["Maximum port limit for this device reached", "Out-of-range port id specified, max. allowed: 3"]
)
def test_a_task_for_which_a_guest_has_no_port_left_is_told_how_many_there_are_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(monitor, "ROOM_TIMEOUT_S", 0.01)

    async def story() -> None:
        qemu = Crowded(2, words)
        port = await listening(qemu)
        for number in range(2):
            os.close(await port.add_port(f"carrel.t.{number}"))
        with pytest.raises(RefusedError, match=r"all 2 ways in are taken; start fewer at once, or .*--mem"):
            await port.add_port("carrel.t.2")
        await port.close()

    asyncio.run(story())


def test_who_comes_to_a_full_guest_just_before_another_leaves_gets_in() -> None:
    async def story() -> None:
        qemu = Crowded(1)
        port = await listening(qemu)
        os.close(await port.add_port("carrel.t.1"))
        first = qemu.plugged()[0]
        comer = asyncio.ensure_future(port.add_port("carrel.t.2"))
        await qemu.refused.wait()
        await qemu.tell(first, is_open=False)
        os.close(await comer)
        await port.close()

    asyncio.run(story())
