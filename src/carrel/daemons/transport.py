"""HTTP to carrelctld, for carreld and the command line: one request per connection, standard library only.

carreld imports no HTTP library: it is small, and on every node.
"""

import asyncio
import os
import pwd
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import msgspec

from carrel.config import Controller
from carrel.daemons import munge
from carrel.errors import CarrelError, NotFoundError, RefusedError, UnreachableError, UsageError

_T = TypeVar("_T")

ANSWER_MAX_BYTES = 64 * 2**20
DEFAULT_TIMEOUT_S = 5.0
CREDENTIAL = "Carrel-Credential"
"""The header of an answer with a credential of its own."""

_PROVEN = re.compile(r"/v1/hosts/[^/?]+/report(\?.*)?")
"""Over TCP an answer to these must prove who gave it: root makes guests by it, as whatever user it names. Anybody may
listen where carrelctld is not running."""


class Address(NamedTuple):
    """Where carrelctld listens: a unix socket at ``path``, else TCP."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        """Return it as it stands in the configuration."""
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    credential: str = ""


def address(listen: str) -> Address:
    """Read ``unix:PATH`` or ``tcp:HOST:PORT``.

    Raises:
        CarrelError: it is neither.
    """
    kind, _, rest = listen.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return Address(path=rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        return Address(host=host.strip("[]"), port=int(port))
    raise CarrelError(f"controller.listen = {listen!r}: give unix:/absolute/path or tcp:host:port")


async def request(
    controller: Controller,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    more: Mapping[str, str] | None = None,
) -> Answer:
    """Ask carrelctld one thing.

    Args:
        controller: Where it listens.
        method: Of HTTP.
        path: With its query.
        body: JSON, or nothing.
        timeout_s: For all of it.
        more: Headers beside our own; with ``Authorization`` among them munge is not asked.

    Raises:
        UnreachableError: nobody listens, or no whole answer came within ``timeout_s``.
        RefusedError: who answered is not ``controller.user``, where that matters.
    """
    where = address(controller.listen)
    try:
        async with asyncio.timeout(timeout_s):
            headers = {"Host": "carrel", "Connection": "close", "Content-Length": str(len(body))}
            if body:
                headers["Content-Type"] = "application/json"
            headers |= more or {}
            if not where.path and "Authorization" not in headers:
                headers["Authorization"] = await munge.sign(method, path, body, socket=controller.munge_socket)
            answer = await _exchange(where, _head(method, path, headers) + body)
            if not where.path and answer.status < 300 and _PROVEN.fullmatch(path):
                await _require_controller(controller, answer, headers["Authorization"])
            return answer
    except TimeoutError as error:
        raise UnreachableError(f"carrelctld at {where}: no answer within {timeout_s:g} s; is it busy?") from error
    except (OSError, EOFError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UnreachableError(
            f"carrelctld at {where}: {reason}; is it running, and is controller.listen right? see: carrel node check"
        ) from error


async def _require_controller(controller: Controller, answer: Answer, question: str) -> None:
    wanted = f"controller.user = {controller.user}"
    try:
        uid = await munge.verify_answer(answer.credential, question, answer.body, socket=controller.munge_socket)
        if uid == pwd.getpwnam(controller.user).pw_uid:
            return
    except RefusedError as error:
        raise RefusedError(f"what answered at {controller.listen} did not prove to be {wanted}: {error}") from error
    except KeyError as error:
        raise RefusedError(f"{wanted}: this host knows no such user; see: getent passwd {controller.user}") from error
    raise RefusedError(f"at {controller.listen} uid {uid} answered, not {wanted}; who listens there?")


def decoded(answer: Answer) -> object:
    """Return the JSON of an answer, or raise the error that it describes."""
    if answer.status < 300:
        try:
            return msgspec.json.decode(answer.body) if answer.body else None
        except msgspec.DecodeError as error:
            raise _not_understood("carrelctld", error) from error
    try:
        sentence = str(msgspec.json.decode(answer.body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        sentence = f"carrelctld answered with status {answer.status}; see its log"
    kinds: dict[int, type[CarrelError]] = {
        400: UsageError,
        401: RefusedError,
        402: RefusedError,
        403: RefusedError,
        404: NotFoundError,
        409: RefusedError,
        503: UnreachableError,
    }
    raise kinds.get(answer.status, CarrelError)(sentence)


def converted(value: object, kind: type[_T], *, whose: str = "carrelctld") -> _T:
    """Return what a daemon answered as a struct of ours.

    Raises:
        UnreachableError: it is none, as while one of two releases is being installed: nothing is known.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _not_understood(whose, error) from error


def _not_understood(whose: str, error: msgspec.MsgspecError) -> UnreachableError:
    said = str(error).replace("`", "")
    return UnreachableError(
        f"{whose} answered what we do not understand ({said}); is it of another release? restart it"
    )


def _head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _exchange(where: Address, data: bytes) -> Answer:
    opening = (
        asyncio.open_unix_connection(where.path) if where.path else asyncio.open_connection(where.host, where.port)
    )
    reader, writer = await opening
    try:
        writer.write(data)
        await writer.drain()
        status = int((await reader.readline()).split()[1:2][0])
        length: int | None = None
        credential = ""
        while (line := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
            if name.strip().lower() == CREDENTIAL.lower().encode():
                credential = value.decode(errors="replace").strip()
        if status == 204:
            return Answer(status, b"")  # it has no body, and so says no length
        if length is None or length > ANSWER_MAX_BYTES:
            raise ValueError(f"an answer of {length} bytes")
        return Answer(status, await reader.readexactly(length), credential)
    except IndexError as error:
        raise EOFError("it closed the connection") from error
    finally:
        writer.close()
