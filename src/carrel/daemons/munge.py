"""Who is calling over TCP: a munge credential, good for one request. And who answers, where root acts upon the answer.

Its payload names the request, so that a credential read off the wire cannot carry another one; that of an answer names
the credential of its question, so that no earlier answer passes for it. Lifetime and replay are munge's own to refuse.
"""

import asyncio
import hashlib
import re

from carrel import process
from carrel.errors import RefusedError, UnreachableError
from carrel.process import CommandError

SCHEME = "Munge "
_ANSWER_TIMEOUT_S = 5.0
_REFUSALS = range(8, 20)
"""munge's exit statuses for a credential that is bad, expired, rewound, replayed, or for somebody else."""


async def sign(method: str, path: str, body: bytes, *, socket: str = "") -> str:
    """Return the value of ``Authorization`` for this request, as the user that this process runs as.

    Raises:
        UnreachableError: munge does not answer.
    """
    command = ["munge", *_at(socket), "--string", _payload(method, path, body)]
    try:
        return SCHEME + (await process.run_async(command, timeout_s=_ANSWER_TIMEOUT_S)).strip()
    except CommandError as error:
        raise UnreachableError(f"munge did not sign the request: {error}") from error


async def verify(authorization: str, method: str, path: str, body: bytes, *, socket: str = "") -> int:
    """Return the uid that signed this very request.

    Raises:
        RefusedError: no credential, a bad or a used one, or one for another request.
        UnreachableError: munge does not answer: nothing is known about the caller.
    """
    if not authorization.startswith(SCHEME):
        raise RefusedError("no munge credential; send Authorization: Munge <credential>")
    credential = authorization.removeprefix(SCHEME).strip()
    try:
        text = await asyncio.to_thread(
            process.run,
            ["unmunge", *_at(socket), "--numeric", "--keys=UID"],
            stdin=credential,
            timeout_s=_ANSWER_TIMEOUT_S,
        )
    except CommandError as error:
        if error.status in _REFUSALS:
            raise RefusedError(f"munge refused the credential: {_last_line(error.stderr)}") from error
        raise UnreachableError(f"munge did not check the credential: {error}") from error
    head, _, payload = text.partition("\n\n")
    uid = re.search(r"^UID:\s+(\d+)$", head, re.MULTILINE)
    if uid is None or payload.strip() != _payload(method, path, body):
        raise RefusedError(f"the munge credential was made for another request than {method} {path}")
    return int(uid[1])


async def sign_answer(question: str, body: bytes, *, socket: str = "") -> str:
    """Return a credential for an answer; ``question`` is the ``Authorization`` of its request.

    Raises:
        UnreachableError: munge does not answer.
    """
    return await sign("ANSWER", _digest(question.encode()), body, socket=socket)


async def verify_answer(credential: str, question: str, body: bytes, *, socket: str = "") -> int:
    """Return the uid that gave this very answer; see ``verify``."""
    return await verify(credential, "ANSWER", _digest(question.encode()), body, socket=socket)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _payload(method: str, path: str, body: bytes) -> str:
    return f"{method} {path} {_digest(body)}"


def _at(socket: str) -> list[str]:
    return [f"--socket={socket}"] if socket else []


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
