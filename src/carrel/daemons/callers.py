"""Who is calling, and what the bank lets them: the kernel's word, munge's, or a token's.

A token stands for its user and is never more than that: one that reads sees what the user sees, also where the kernel
would have said more. What a caller may not see does not exist for them: the answer is the same sentence.
"""

import asyncio
import pwd
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from litestar import Request
from litestar.exceptions import HTTPException

from carrel.bank.tokens import Tokens
from carrel.daemons import munge
from carrel.daemons.banking import Bank
from carrel.errors import RefusedError, UnreachableError, UsageError
from carrel.model.access import Associations, Person, Token

AnyRequest = Request[Any, Any, Any]

UNIX = "unix"
"""The host part of ``scope["client"]`` of a peer on the unix socket; its port is the peer's uid, from the kernel."""
BEARER = "Bearer "
ASSOCIATIONS_KEPT_S = 60.0
ASSOCIATIONS_RETRY_S = 5.0


async def uid_of(request: AnyRequest, *, munge_socket: str) -> int:
    """Return the caller's uid, by the socket's peer or by munge.

    Raises:
        HTTPException: 401, no credential or a bad one.
    """
    client = request.scope["client"]
    if client is not None and client[0] == UNIX:
        return int(client[1])
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    authorization = request.headers.get("authorization", "")
    try:
        return await munge.verify(authorization, request.method, path, await request.body(), socket=munge_socket)
    except RefusedError as error:
        raise HTTPException(status_code=401, detail=str(error)) from error


def without_nul(request: AnyRequest) -> None:
    """Refuse what no name can hold, and what PostgreSQL would break at.

    Raises:
        UsageError: a part of the address has a NUL in it.
    """
    if any("\0" in str(word) for word in (*request.path_params.values(), *request.query_params.values())):
        raise UsageError("the address has a NUL in it; no name has")


class Callers:
    """Knows who may do what with the money of one bank."""

    def __init__(
        self, bank: Bank, *, trusted: frozenset[int], munge_socket: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask nobody yet.

        Args:
            bank: Whose tokens, and whose Slurm.
            trusted: Uids that may do everything, beside ``SlurmUser`` and Slurm's administrators.
            munge_socket: Munge's socket; empty: its own default.
            clock: For how long an answer of Slurm is kept.
        """
        self.tokens = Tokens(bank.ledger.store)
        self._bank = bank
        self._trusted = trusted
        self._munge_socket = munge_socket
        self._clock = clock
        self._associations: Associations | None = None
        self._asked_at_s = float("-inf")
        self._kept_s = 0.0
        self._asking = asyncio.Lock()

    async def person(self, request: AnyRequest) -> Person:
        """Return who calls.

        Raises:
            HTTPException: 401, nobody whom we know: no credential, a bad one, a token that is unknown or good no more.
        """
        authorization = request.headers.get("authorization", "")
        if authorization.startswith(BEARER):
            return await self.bearer(authorization.removeprefix(BEARER).strip())
        uid = await uid_of(request, munge_socket=self._munge_socket)
        user = name_of(uid)
        associations = await self.associations("" if uid in self._trusted else user)
        admin = self._administers(uid, user, associations)
        return Person(user=user, writes=admin, sees_all=admin, associations=associations)

    async def bearer(self, secret: str) -> Person:
        """Return whom a token stands for; see ``person``."""
        token = await asyncio.to_thread(self.tokens.find, secret)
        if token is None:
            raise HTTPException(
                status_code=401,
                detail="the token is unknown, expired or revoked; see: carrel bank token list",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await self._behind(token)

    async def _behind(self, token: Token) -> Person:
        associations = await self.associations(token.user)
        admin = token.scope == "admin"
        sees_all = admin or self._administers(uid_named(token.user), token.user, associations)
        return Person(user=token.user, writes=admin, sees_all=sees_all, associations=associations, token=token.name)

    async def associations(self, user: str) -> Associations | None:
        """Return what Slurm said of people within the last minute; what it said last where it does not answer.

        A user of whom it said nothing may have got an account since: for them it is asked anew after some seconds.
        No user: what it says of none changes what the caller may.
        """
        if self._clock() < self._until_s(user):
            return self._associations
        async with self._asking:
            if self._clock() >= self._until_s(user):
                try:
                    self._associations = await self._bank.slurm.associations()
                    self._kept_s = ASSOCIATIONS_KEPT_S
                except UnreachableError:
                    # Without it nobody is more than root and SlurmUser made them, so this is the safe side.
                    self._kept_s = ASSOCIATIONS_RETRY_S
                self._asked_at_s = self._clock()
        return self._associations

    def _until_s(self, user: str) -> float:
        known = not user or self._associations is None or self._associations.knows(user)
        return self._asked_at_s + (self._kept_s if known else min(self._kept_s, ASSOCIATIONS_RETRY_S))

    def _administers(self, uid: int | None, user: str, associations: Associations | None) -> bool:
        slurm_user = re.search(r"\((\d+)\)", self._bank.slurm_settings.get("SlurmUser", ""))
        return (
            uid in self._trusted
            or (slurm_user is not None and uid == int(slurm_user[1]))
            or (associations is not None and user in associations.administrators)
        )


@lru_cache(maxsize=10_000)
def name_of(uid: int) -> str:
    """Return the user's name; one that this host does not know has none but a number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"


def uid_named(user: str) -> int | None:
    """Return the uid of a name; None: this host knows no such user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None
