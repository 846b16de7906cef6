"""The bank's desk: what REST asks of it, once it is known who asks. No route and no status code is here.

Whatever a caller may not see is answered like what does not exist, in the same words.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.verify import verify
from carrel.core import billing
from carrel.daemons import bank_views as views
from carrel.daemons.banking import Bank
from carrel.daemons.branch import Branch
from carrel.daemons.callers import Callers
from carrel.daemons.settling import Reconciled
from carrel.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from carrel.model.access import Person, Scope
from carrel.model.ledger import AnyCommand, LienView, MoneyState, OpenProject, Receipt, Refusal

_T = TypeVar("_T")
_DATABASES = {"SqliteStore": "sqlite", "PostgresStore": "postgresql"}


class DeniedError(RefusedError):
    """The ledger understood and refused; the figures travel with the sentence."""

    def __init__(self, refusal: Refusal) -> None:
        """Carry the refusal."""
        super().__init__(refusal.sentence)
        self.refusal = refusal


class Desk:
    """Answers for one bank."""

    def __init__(self, bank: Bank, branch: Branch | None = None, *, trusted: frozenset[int], munge_socket: str) -> None:
        """Know whom to ask.

        Args:
            bank: The ledger, the prices, and Slurm.
            branch: What compares the ledger with Slurm's accounting; None: nothing does.
            trusted: Uids that may do everything.
            munge_socket: Munge's socket; empty: its own default.
        """
        self.bank = bank
        self._branch = branch
        self.callers = Callers(bank, trusted=trusted, munge_socket=munge_socket)

    @property
    def ledger(self) -> Ledger:
        return self.bank.ledger

    async def do(self, command: AnyCommand) -> Receipt:
        """Have a command done.

        Raises:
            DeniedError: the ledger refused it.
        """
        answer = await self.ledger.do(command)
        if isinstance(answer, Refusal):
            raise DeniedError(answer)
        return answer

    async def read(self, query: Callable[..., _T], **words: object) -> _T:
        """Run a query of ``bank.queries`` beside the loop."""
        return await asyncio.to_thread(query, self.ledger.store, **words)

    async def accounts(self, person: Person, *, name: str = "") -> list[views.AccountView]:
        """Return the accounts that the person may see, of each user as much as they may see."""
        budgets = await self.read(queries.budgets, project=name)
        balances = await self.read(queries.balances, project=name)
        found = views.account_views(budgets, balances, int(time.time()))
        mine = await self._mine(person)
        return [_of(person, account) for account in found if person.reads(account.name) or account.name in mine]

    async def account(self, person: Person, name: str) -> views.AccountView:
        """Return one account.

        Raises:
            NotFoundError: there is none, or it is not theirs to see.
        """
        # A name of no account must not become "all accounts".
        found = [one for one in await self.accounts(person, name=name or "?") if one.name == name]
        if not found:
            raise NotFoundError(f"there is no account '{name}'; see: carrel account list")
        return found[0]

    async def allocation(self, person: Person, account: str, name: str) -> views.AllocationView:
        """Return the allocation of an account that is meant: the one named, else its only valid one.

        Raises:
            NotFoundError: it has none of this name, or no valid one.
            UsageError: it has several, and none is named.
        """
        found = (await self.account(person, account)).allocations
        if name:
            found = [one for one in found if one.name == name]
            if not found:
                raise NotFoundError(
                    f"account '{account}' has no allocation '{name}'; see: carrel account show {account}"
                )
            return found[0]
        valid = [one for one in found if one.state == "valid"]
        if not valid:
            raise NotFoundError(
                f"account '{account}' has no allocation that is valid now; name one with --allocation, or open one: "
                f"carrel account add {account} --allocation NAME"
            )
        if len(valid) > 1:
            names = ", ".join(one.name for one in valid)
            raise UsageError(f"account '{account}' has several allocations ({names}); name one with --allocation")
        return valid[0]

    async def statement(
        self, person: Person, account: str, *, allocation: str, since_s: int, until_s: int, after: int, limit: int
    ) -> views.Statement:
        """Return a page of what was done to an account.

        Raises:
            NotFoundError: there is no such account for this person.
            RefusedError: they may use it, and not read of everybody in it.
        """
        await self.account(person, account)
        if not person.reads(account):
            raise RefusedError(
                f"only its coordinators may read the statement of account '{account}'; your own: carrel charge list"
            )
        lines = await self.read(
            queries.statement,
            project=account,
            allocation=allocation,
            start_s=since_s,
            end_s=until_s,
            after=after,
            limit=limit,
        )
        rows = views.statement_rows(lines)
        return views.Statement(rows=rows, next_after=lines[-1].seq if len(lines) >= limit else None)

    async def charges(
        self,
        person: Person,
        *,
        account: str,
        user: str,
        job_id: int,
        run: str,
        cluster: str,
        states: Sequence[MoneyState],
        before: int,
        limit: int,
    ) -> list[views.ChargeView]:
        """Return a page of charges, the newest first: the person's own, but where they may read of others.

        A run is of this cluster where none is named.
        """
        if not (person.sees_all or (account and person.reads(account))):
            if user not in ("", person.user):
                return []
            user = person.user
        found = await self.read(
            queries.latest,
            project=account,
            user=user,
            job_id=job_id,
            run=run,
            cluster=cluster or self.bank.slurm_settings.get("ClusterName", ""),
            states=states,
            before=before,
            limit=limit,
        )
        return [views.charge_view(lien) for lien in found]

    async def charge(self, person: Person, cluster: str, run: str) -> views.ChargeDetail:
        """Return a charge with its history.

        Raises:
            NotFoundError: there is none, or it is not theirs to see.
        """
        lien = await self._lien(person, cluster, run)
        events = await self.read(queries.history, lien_id=lien.id)
        return views.ChargeDetail(charge=views.charge_view(lien), events=[views.charge_event(line) for line in events])

    async def _lien(self, person: Person, cluster: str, run: str) -> LienView:
        found = await self.read(queries.latest, cluster=cluster, run=run, limit=1) if run else []
        if not found or not (found[0].user == person.user or person.reads(found[0].project)):
            raise NotFoundError(f"run '{run}' of cluster '{cluster}' has no charge; see: carrel charge list")
        return found[0]

    async def status(self, person: Person) -> views.BankView:
        """Return the bank as a whole.

        Raises:
            RefusedError: it is for administrators.
        """
        admins_only(person.sees_all, "read the state of the bank")
        totals = await self.read(queries.totals)
        balances = await self.read(queries.balances)
        version = self.bank.book.at(datetime.now(UTC))
        store = type(self.ledger.store).__name__
        return views.BankView(
            cluster=self.bank.slurm_settings.get("ClusterName", ""),
            database=_DATABASES.get(store, store),
            offline=self.bank.settings.offline,
            prices=version.name if version else "",
            accounts=totals.projects,
            allocations=totals.allocations,
            transactions=totals.transactions,
            open_liens=totals.open_liens,
            unknown_ends=totals.unknown_ends,
            parked=self._branch.rounds.waiting() if self._branch else [],
            last_hash=totals.last_hash,
            totals=views.sums(views.allocation_view(one, int(time.time())) for one in balances),
        )

    async def verified(self, person: Person) -> views.Verified:
        """Read the whole ledger and name every break."""
        admins_only(person.sees_all, "verify the ledger")
        price = billing.recompute(self.bank.book)
        breaks = await asyncio.to_thread(verify, self.ledger.store, price=price)
        return views.Verified(transactions=(await self.read(queries.totals)).transactions, breaks=breaks)

    async def reconcile(self) -> Reconciled:
        """Compare all that ended lately with Slurm's accounting, and make good what is missing.

        Raises:
            UnreachableError: Slurm keeps no accounting, or does not answer.
        """
        if self._branch is None:
            raise UnreachableError("nothing compares this ledger with a Slurm; is this a bank of its own?")
        return await self._branch.reconcile()

    async def sync(self, person: Person) -> views.Synced:
        """Open every account that Slurm's accounting has and the ledger has not, below the account it is below there.

        Raises:
            UnreachableError: Slurm keeps no accounting, or does not answer.
        """
        slurm = await self.bank.slurm.associations()
        if slurm is None:
            raise UnreachableError("slurm keeps no accounting, so it has no accounts to open; see: carrel account add")
        there = {one.project for one in await self.read(queries.budgets) if not one.user}
        opened = []
        for account in _parents_first(slurm.accounts):
            if account not in there:
                parent = slurm.accounts[account]
                command = OpenProject(key=f"sync/{account}", actor=person.actor, project=account, parent=parent)
                await self.do(command)
                opened.append(account)
        return views.Synced(opened=opened, known=len(there))

    async def add_token(self, person: Person, *, user: str, scope: Scope, ttl_s: int, note: str) -> views.TokenMade:
        """Make a token: anybody one that reads for themselves, an administrator any.

        Raises:
            RefusedError: it would be more than the caller is.
        """
        if not person.writes and (scope != "read" or user not in ("", person.user) or person.token):
            raise RefusedError("you may only make a token that reads, for yourself, and not with another token")
        token, secret = await asyncio.to_thread(
            self.callers.tokens.add, user=user or person.user, scope=scope, ttl_s=ttl_s, note=note
        )
        return views.TokenMade(token=views.token_view(token, int(time.time())), secret=secret)

    async def tokens(self, person: Person) -> list[views.TokenView]:
        """Return the caller's tokens; all for an administrator."""
        user = "" if person.sees_all else person.user
        found = await asyncio.to_thread(self.callers.tokens.every, user=user)
        return [views.token_view(token, int(time.time())) for token in found]

    async def revoke(self, person: Person, name: str) -> views.TokenView:
        """End a token; a token that reads ends only itself."""
        if person.token and not person.writes and name != person.token:
            raise NotFoundError(f"there is no token '{name}'; see: carrel bank token list")
        user = "" if person.writes else person.user
        token = await asyncio.to_thread(self.callers.tokens.revoke, name, user=user)
        return views.token_view(token, int(time.time()))

    async def _mine(self, person: Person) -> frozenset[str]:
        """Return the accounts that the person may use: by Slurm's accounting, else those they have used."""
        if person.sees_all:
            return frozenset()
        if person.associations is None:
            return frozenset(await self.read(queries.members, user=person.user))
        return frozenset(account for account, users in person.associations.users.items() if person.user in users)


def admins_only(may: bool, what: str) -> None:
    """Let pass who may.

    Raises:
        RefusedError: they may not.
    """
    if not may:
        raise RefusedError(f"only root, SlurmUser and Slurm's administrators may {what}; see: sacctmgr show user")


def _of(person: Person, account: views.AccountView) -> views.AccountView:
    """Return the account with those users of it that the person may see: all, or themselves."""
    if person.reads(account.name):
        return account
    return msgspec.structs.replace(account, users=[one for one in account.users if one.user == person.user])


def _parents_first(parents: Mapping[str, str]) -> list[str]:
    """Return the accounts, each after the one above it. Slurm's tree has no rings."""
    found: dict[str, None] = {}

    def add(account: str) -> None:
        if account in parents and account not in found:
            add(parents[account])
            found[account] = None

    for account in sorted(parents):
        add(account)
    return list(found)
