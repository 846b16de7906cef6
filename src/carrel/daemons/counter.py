"""The bank's counter: where ``job_submit.lua`` asks whether an account covers a job. slurmctld waits for each answer.

A line of words parted by 0x1f comes in, a line goes out (``docs/reference/submit.md``). What is no answer in time is
``away``, which is silence: the site's policy decides, and it decides in one place, the Lua.
"""

import asyncio
import logging
import os
import pwd
import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from carrel.bank import queries, runs
from carrel.core.billing import OPEN
from carrel.daemons.banking import Bank
from carrel.errors import CarrelError, RefusedError, UnreachableError, UsageError
from carrel.model.ledger import LienView, Place, Refusal, Reprice
from carrel.model.money import format_su
from carrel.model.price import NoBound, NoPrice, Priced, Quote
from carrel.model.request import Request
from carrel.model.run import GUEST_PER_NODE, GUEST_PER_TASK
from carrel.slurm import submission
from carrel.wire import peer

_LOG = logging.getLogger("carrelctld.bank")
LINE_BYTES_MAX = 64 * 1024
SEPARATOR = "\x1f"
_NAMES_MAX = 100_000
_TOKEN = re.compile(r"[0-9a-f]{32}(\.\w{1,12})?")
_SLURM_USER = re.compile(r".*\((\d+)\)")


class Reply(NamedTuple):
    """A line to the Lua: ``ok``, ``hold``, ``refuse`` or ``away``, and the token or the sentence."""

    word: str
    text: str = ""

    def line(self) -> bytes:
        return f"{self.word}\t{' '.join(self.text.split())}\n".encode()


class Counter:
    """Answers on the socket that only root, ``SlurmUser`` and the daemon's own user may ask."""

    def __init__(self, bank: Bank) -> None:
        """Listen to nobody yet."""
        self._bank = bank
        self._users: dict[int, str] = {}
        self._deadline_s = bank.settings.deadline_ms / 1000

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer every line of one connection."""
        try:
            _, uid, _ = peer(writer.get_extra_info("socket"))
            if uid not in self._trusted():  # before they have asked: a connection that never asks costs a descriptor
                writer.write(_stranger(uid).line())
                return
            while line := await reader.readline():
                reply = await self.answer(line.decode(errors="replace").rstrip("\n"), uid=uid)
                writer.write(reply.line())
                await writer.drain()
        except (OSError, ValueError) as error:  # it went away, or its line has no end
            _LOG.info("a question was not answered: %s", error)
        finally:
            writer.close()

    async def answer(self, line: str, *, uid: int) -> Reply:
        """Answer one question of a process of this uid."""
        verb, *words = line.split(SEPARATOR)
        fields = dict(word.partition("=")[::2] for word in words)
        try:
            if uid not in self._trusted():
                return _stranger(uid)
            async with asyncio.timeout(self._deadline_s):
                if verb == "submit":
                    return await self._submit(fields)
                if verb == "modify":
                    return await self._modify(fields)
                if verb == "ready":
                    return Reply("ok" if self._bank.ready else "away")
            raise UsageError(f"no such question: {verb[:40]!r}")
        except TimeoutError:
            _LOG.warning("%s: no answer within %g s", verb, self._deadline_s)
            return Reply("away")
        except UnreachableError as error:
            _LOG.warning("%s: %s", verb, error)
            return Reply("away")
        except (CarrelError, ValueError) as error:
            return Reply("refuse", str(error))

    def _trusted(self) -> set[int]:
        named = _SLURM_USER.fullmatch(self._bank.slurm_settings.get("SlurmUser", ""))
        return {0, os.geteuid(), *({int(named[1])} if named else ())}

    async def _submit(self, fields: Mapping[str, str]) -> Reply:
        token = fields.get("token", "")
        if not _TOKEN.fullmatch(token):
            raise UsageError(f"token {token[:40]!r}: not 32 hexadecimal digits")
        command = await self.place(fields, token)
        found = await self._bank.place(command)
        return Reply("refuse", found.sentence) if isinstance(found, Refusal) else Reply("ok", command.token)

    async def place(self, fields: Mapping[str, str], token: str) -> Place:
        """Return the lien that a submission needs.

        Raises:
            RefusedError: there is no price for it, or the user may not charge the account.
            UnreachableError: nobody can tell.
        """
        user = await self._user(int(fields.get("uid", "-1")))
        request = submission.request(fields)
        account = request.account or self._bank.settings.default_account
        if not account:
            raise RefusedError("the job names no account and you have no default one; give --account")
        found = await self._priced(request, user=user, account=account)
        component = found.components[0]
        return Place(
            key=f"l/{self._bank.cluster_name}/{token}/0",
            actor="carrelctld",
            cluster=self._bank.cluster_name,
            token=_with_guests(token, request, component.priced),
            project=account,
            user=user,
            amount_micro_su=component.task_micro_su,
            units=component.tasks,
            price_version=component.priced.version_number,
            inputs={"request": msgspec.to_builtins(request)},
        )

    async def _priced(self, request: Request, *, user: str, account: str) -> Quote:
        known = await self._bank.associations(user, account)
        if known and not known.member(user, account):
            raise RefusedError(
                f"user '{user}' may not charge account '{account}'; see: sacctmgr show assoc user={user}"
            )
        if not request.qos and known:
            partitions = request.partitions or (self._bank.cluster.default_partition,)
            request = msgspec.structs.replace(request, qos=known.default_qos(user, account, partitions))
        found = self._bank.quote([request])
        if isinstance(found, NoBound | NoPrice):
            raise RefusedError(found.reason)
        return found

    async def _modify(self, fields: Mapping[str, str]) -> Reply:
        """Raise the lien before Slurm makes the job dearer; it is lowered when the queue shows a cheaper one."""
        user = await self._user(int(fields.get("uid", "-1")))
        lien = await self._lien(fields)
        if lien is None:
            if "release" in fields:
                raise RefusedError("the bank has not priced this job yet; it is released when it has")
            return Reply("ok")
        if lien.user != user or lien.state not in OPEN:
            return Reply("ok")  # Slurm itself decides whether others may; their changes are priced at the next look
        _, inputs = await asyncio.to_thread(runs.last_command, self._bank.ledger.store, lien.id)
        if lien.state not in {"unbound", "bound"} or "request" not in inputs:
            return Reply("ok")  # what runs is not its user's to make dearer
        request = submission.changed(msgspec.convert(inputs["request"], Request), fields)
        account = fields.get("account") or lien.project
        found = await self._priced(request, user=user, account=account)
        if account != lien.project:
            return await self._movable(account, found.components[0].task_micro_su * lien.units, user=user)
        return await self._raised(lien, request, found)

    async def _lien(self, fields: Mapping[str, str]) -> LienView | None:
        """Return a job's lien: the one that its token names, or one that a later look gave it."""
        name, token = self._bank.cluster_name, fields.get("token", "")
        store = self._bank.ledger.store
        found = await asyncio.to_thread(queries.lien, store, cluster=name, token=token)
        if found is None or found.state not in OPEN:
            job_id = int(fields.get("job", "0"))
            later = await asyncio.to_thread(runs.liens_of_job, store, job_id, cluster=name)
            found = next((lien for lien in reversed(later) if lien.state in OPEN), found)
        return found

    async def _movable(self, account: str, amount_micro_su: int, *, user: str) -> Reply:
        """Say whether another account covers the job; its lien moves when the queue shows it there."""
        if self._bank.remote is not None:
            denial = await self._bank.denial(amount_micro_su, user=user, account=account)
            return Reply("refuse", denial) if denial else Reply("ok")
        balances = await asyncio.to_thread(queries.balances, self._bank.ledger.store, project=account)
        left = sum(max(0, each.available_micro_su + each.credit_micro_su) for each in balances)
        if left >= amount_micro_su:
            return Reply("ok")
        return Reply(
            "refuse",
            f"account '{account}' has {format_su(left)} SU left, this job may need {format_su(amount_micro_su)} SU; "
            f"see: carrel account show {account}",
        )

    async def _raised(self, lien: LienView, request: Request, found: Quote) -> Reply:
        component = found.components[0]
        if component.task_micro_su * lien.units <= lien.lien_micro_su:
            return Reply("ok")
        more = component.task_micro_su * lien.units - lien.lien_micro_su
        if denial := await self._bank.denial(more, user=lien.user, account=lien.project):
            return Reply("refuse", denial)
        answer = await self._bank.ledger.do(
            Reprice(
                key=f"m/{self._bank.cluster_name}/{lien.run or lien.token}/{self._bank.stamp()}",
                actor="carrelctld",
                cluster=self._bank.cluster_name,
                run=lien.run,
                token="" if lien.run else lien.token,
                amount_micro_su=component.task_micro_su,
                price_version=component.priced.version_number,
                inputs={"request": msgspec.to_builtins(request)},
            )
        )
        return Reply("refuse", answer.sentence) if isinstance(answer, Refusal) else Reply("ok")

    async def _user(self, uid: int) -> str:
        """Return a uid's name. Kept: the user database may be far away, and uids are not given anew every day."""
        if uid not in self._users:
            try:
                found = await asyncio.to_thread(pwd.getpwuid, uid)
            except KeyError as error:
                raise RefusedError(f"this host knows no user with uid {uid}; see: getent passwd {uid}") from error
            if len(self._users) >= _NAMES_MAX:
                self._users.clear()
            self._users[uid] = found.pw_name
        return self._users[uid]


def _stranger(uid: int) -> Reply:
    return Reply("refuse", f"uid {uid} may not ask here, only slurmctld may")


def _with_guests(token: str, request: Request, priced: Priced) -> str:
    """Return the token with the number of guests in it, which Slurm's accounting does not keep."""
    if not request.guest:
        return token
    if not request.guest_per_task:
        return f"{token}.{GUEST_PER_NODE}"
    counted = next((line.count for line in priced.lines if line.resource == "guest"), request.tasks or 1)
    return f"{token}.{GUEST_PER_TASK}{counted}"
