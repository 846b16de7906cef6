"""carrelctld's REST API in this process, over a real ledger, for tests of what it answers to whom.

Callers are peers of a unix socket: their uid is the kernel's word, and here the test's. Slurm is what the test says.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
from litestar import Litestar

from carrel import config
from carrel.bank import queries
from carrel.bank.verify import verify
from carrel.config import Placement
from carrel.daemons import api, callers
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.daemons.desk import Desk
from carrel.daemons.hosts import HostDesk
from carrel.daemons.mybrc_desk import MybrcDesk
from carrel.errors import UnreachableError
from carrel.model.access import Associations

BOOK = '[[version]]\nname = "v1"\nvalid_from = 2020-01-01\n[version.default]\nrates = { cpu = 1 }\n'
ROOT = 0


class Answer:
    """What came back."""

    def __init__(self, response: httpx.Response) -> None:
        """Keep it."""
        self.status = response.status_code
        self.text = response.text
        self.headers = response.headers

    @property
    def json(self) -> Any:
        return json.loads(self.text) if self.text else None


class _Slurm:
    """As much of Slurm as the bank asks about people."""

    def __init__(self) -> None:
        self.known: Associations | None = Associations()
        self.away = False

    async def associations(self) -> Associations | None:
        await asyncio.sleep(0)
        if self.away:
            raise UnreachableError("slurm did not answer: the test says so")
        return self.known


class RestBank:
    """A bank behind its REST API."""

    def __init__(self, directory: Path, *, database: str = "", extra: str = "") -> None:
        """Open a ledger in the directory, or in a PostgreSQL."""
        (directory / "prices.toml").write_text(BOOK)
        settings = directory / "carrel.toml"
        settings.write_text(
            f'[bank]\nenabled = true\ndatabase = "{database or directory / "ledger.db"}"\n{extra}\n'
            f'[slurm]\nbin_dir = "{directory}/no-slurm"\n'
        )
        self.bank = Bank(config.load(settings))
        self.slurm = _Slurm()
        self.bank.slurm = self.slurm  # type: ignore[assignment]  # as much of it as is asked
        self.app = _application()
        self.desk: Desk | None = Desk(self.bank, trusted=frozenset({ROOT}), munge_socket=f"{directory}/no-munge")
        """None: the site has no bank."""
        self._hosts = HostDesk(Placement(table=f"{directory}/hosts.db"), Board(), silent_after_s=1)
        self.mybrc = MybrcDesk(self.desk) if self.bank.settings.mybrc.enabled else None

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        uid: int | None = ROOT,
        key: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask as a user; ``uid`` None: over TCP, without a credential but those in ``headers``."""
        return asyncio.run(self.ask_async(method, path, body, uid=uid, key=key, headers=headers))

    async def ask_async(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        uid: int | None = ROOT,
        key: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Do as ``ask`` does, from a loop."""
        self.app.state.desk, self.app.state.mybrc = self.desk, self.mybrc
        self.app.state.service.hosts = self._hosts
        client = ("192.0.2.7", 40000) if uid is None else (callers.UNIX, uid)
        sent = dict(headers or {}) | ({"Idempotency-Key": key} if key else {})
        content = body if isinstance(body, bytes | str) else None if body is None else json.dumps(body)
        if content is not None:
            sent.setdefault("Content-Type", "application/json")
        transport = httpx.ASGITransport(app=cast("Any", self.app), client=client, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://carrel", trust_env=False) as http:
            return Answer(await http.request(method, path, content=content, headers=sent))

    def written(self) -> int:
        """Return how many transactions there are."""
        return queries.totals(self.bank.ledger.store).transactions

    def account(self, name: str, deposit_micro_su: int = 0, *, parent: str = "") -> None:
        """Open an account with one allocation of its name, and money in it."""
        self.done("POST", "/v1/accounts", {"account": name, "parent": parent}, key=f"a/{name}")
        self.done("POST", f"/v1/accounts/{name}/allocations", {"allocation": name}, key=f"b/{name}")
        if deposit_micro_su:
            gift = {"amount_micro_su": deposit_micro_su, "reason": "a test"}
            self.done("POST", f"/v1/accounts/{name}/deposits", gift, key=f"c/{name}")

    def done(self, method: str, path: str, body: Any = None, *, key: str = "") -> Any:
        """Ask as root for what must succeed, and return the JSON of the answer."""
        answer = self.ask(method, path, body, key=key)
        assert answer.status < 300, answer.text
        return answer.json


@contextmanager
def rest_bank(directory: Path, *, database: str = "", extra: str = "") -> Iterator[RestBank]:
    """A bank behind REST for a test; what is left of its ledger is sound."""
    desk = RestBank(directory, database=database, extra=extra)
    try:
        yield desk
        assert verify(desk.bank.ledger.store) == []
    finally:
        desk.bank.ledger.close()


@cache
def _application() -> Litestar:
    """One for all tests of a session, which each put their own desk into it: its routes take long to make."""
    service = api.Service(
        board=Board(),
        trusted=frozenset({ROOT}),
        addresses=_nowhere,
        changed=lambda: None,
        silent_after_s=1,
        munge_socket="",
        hosts=HostDesk(Placement(), Board(), silent_after_s=1),
    )
    return api.create(service)


async def _nowhere() -> dict[str, str]:
    return await asyncio.sleep(0, {})
