"""The bank over REST: accounts, liens and charges, tokens. Each handler says who may, and asks the desk.

What changes money needs ``Idempotency-Key``: the ledger's own key, under which the same request is done once, however
often it is sent, and answered alike.
"""

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar import Router, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from carrel.bank.queries import PAGE
from carrel.daemons import bank_views as views
from carrel.daemons.bank_bodies import (
    Adjustment,
    Correction,
    Gift,
    GiveBack,
    Move,
    NewAccount,
    NewAllocation,
    NewCap,
    NewLien,
    NewTerms,
    NewToken,
    Release,
    Terms,
)
from carrel.daemons.bank_http import (
    ERRORS,
    REFUSALS,
    Key,
    Limit,
    Position,
    StrictRequest,
    When,
    Word,
    admin,
    denied,
    met,
)
from carrel.daemons.callers import AnyRequest
from carrel.daemons.desk import DeniedError, Desk
from carrel.daemons.settling import Reconciled
from carrel.errors import UsageError
from carrel.model.access import Person
from carrel.model.ledger import (
    Adjust,
    Answer,
    AnyCommand,
    CarryOver,
    Correct,
    Deposit,
    MoneyState,
    OpenAllocation,
    OpenProject,
    Place,
    Receipt,
    Refund,
    SetCap,
    SetTerms,
    Transfer,
    Void,
)

COMMANDS_MAX = 10_000


@get("/accounts", summary="Accounts that the caller may see", responses=ERRORS)
async def list_accounts(request: AnyRequest) -> list[views.AccountView]:
    desk, person = await met(request)
    return await desk.accounts(person)


@get("/accounts/{account:str}", summary="One account, its allocations and users", responses=ERRORS)
async def show_account(request: AnyRequest, account: FromPath[str]) -> views.AccountView:
    desk, person = await met(request)
    return await desk.account(person, account)


@post("/accounts", summary="Open an account", responses=REFUSALS)
async def open_account(request: AnyRequest, data: JSONBody[NewAccount], key: Key) -> Receipt:
    desk, person = await admin(request, "open an account")
    return await desk.do(
        OpenProject(
            key=key, actor=person.actor, project=data.account, parent=data.parent, cap_micro_su=data.cap_micro_su
        )
    )


@post(
    "/accounts/{account:str}/cap",
    status_code=200,
    summary="Cap an account or a user in it",
    responses=REFUSALS,
)
async def set_cap(request: AnyRequest, account: FromPath[str], data: JSONBody[NewCap], key: Key) -> Receipt:
    desk, person = await admin(request, "set a cap")
    return await desk.do(
        SetCap(
            key=key,
            actor=person.actor,
            project=account,
            user=data.user,
            cap_micro_su=data.cap_micro_su,
            reason=data.reason,
        )
    )


@post("/accounts/{account:str}/allocations", summary="Open an allocation", responses=REFUSALS)
async def open_allocation(
    request: AnyRequest, account: FromPath[str], data: JSONBody[NewAllocation], key: Key
) -> Receipt:
    desk, person = await admin(request, "open an allocation")
    return await desk.do(
        OpenAllocation(key=key, actor=person.actor, project=account, allocation=data.allocation, **_terms(data))
    )


@post(
    "/allocations/{allocation:str}/terms",
    status_code=200,
    summary="Change an allocation's dates, priority and credit limit",
    responses=REFUSALS,
)
async def set_terms(request: AnyRequest, allocation: FromPath[str], data: JSONBody[NewTerms], key: Key) -> Receipt:
    desk, person = await admin(request, "change an allocation")
    return await desk.do(
        SetTerms(key=key, actor=person.actor, allocation=allocation, reason=data.reason, **_terms(data))
    )


@post("/accounts/{account:str}/deposits", summary="Deposit", responses=REFUSALS)
async def deposit(request: AnyRequest, account: FromPath[str], data: JSONBody[Gift], key: Key) -> Receipt:
    return await _credit(Deposit, *await admin(request, "deposit"), data, account=account, key=key)


@post("/accounts/{account:str}/adjustments", summary="Add or take, by decision", responses=REFUSALS)
async def adjust(request: AnyRequest, account: FromPath[str], data: JSONBody[Adjustment], key: Key) -> Receipt:
    return await _credit(Adjust, *await admin(request, "adjust an account"), data, account=account, key=key)


@post("/transfers", summary="Move what is available from one account to another", responses=REFUSALS)
async def transfer(request: AnyRequest, data: JSONBody[Move], key: Key) -> Receipt:
    return await _move(Transfer, *await admin(request, "transfer"), data, key=key)


@post("/carry-overs", summary="Give what expired in one allocation to another", responses=REFUSALS)
async def carry_over(request: AnyRequest, data: JSONBody[Move], key: Key) -> Receipt:
    desk, person = await admin(request, "carry over")
    if not data.source_allocation:
        raise UsageError("name the allocation that ended: source_allocation")
    return await _move(CarryOver, desk, person, data, key=key)


@get("/accounts/{account:str}/statement", summary="What was done to an account, the oldest first", responses=ERRORS)
async def statement(
    request: AnyRequest,
    *,
    account: FromPath[str],
    allocation: Word = "",
    since: When = None,
    until: When = None,
    after: Position = 0,
    limit: Limit = PAGE,
) -> views.Statement:
    desk, person = await met(request)
    return await desk.statement(
        person,
        account,
        allocation=allocation,
        since_s=_seconds(since) or 0,
        until_s=2**62 if until is None else _seconds(until) or 0,
        after=after,
        limit=limit,
    )


@get("/charges", summary="Liens and charges that the caller may see, the newest first", responses=ERRORS)
async def list_charges(
    request: AnyRequest,
    *,
    account: Word = "",
    user: Word = "",
    job: Annotated[int, QueryParameter(ge=0, le=2**32)] = 0,
    run: Word = "",
    cluster: Word = "",
    states: Annotated[list[MoneyState] | None, QueryParameter(name="state")] = None,
    before: Position = 0,
    limit: Limit = PAGE,
) -> list[views.ChargeView]:
    desk, person = await met(request)
    return await desk.charges(
        person,
        account=account,
        user=user,
        job_id=job,
        run=run,
        cluster=cluster,
        states=states or (),
        before=before,
        limit=limit,
    )


@get("/charges/{cluster:str}/{run:str}", summary="One charge, and how it came about", responses=ERRORS)
async def show_charge(request: AnyRequest, cluster: FromPath[str], run: FromPath[str]) -> views.ChargeDetail:
    desk, person = await met(request)
    return await desk.charge(person, cluster, run)


@post("/charges/{cluster:str}/{run:str}/refunds", summary="Give back part of a charge", responses=REFUSALS)
async def refund(
    request: AnyRequest, cluster: FromPath[str], run: FromPath[str], data: JSONBody[GiveBack], key: Key
) -> Receipt:
    desk, person = await admin(request, "refund")
    return await desk.do(
        Refund(
            key=key,
            actor=person.actor,
            cluster=cluster,
            run=run,
            amount_micro_su=data.amount_micro_su,
            reason=data.reason,
            successor=data.successor,
        )
    )


@post("/charges/{cluster:str}/{run:str}/corrections", summary="Charge a run anew", responses=REFUSALS)
async def correct(
    request: AnyRequest, cluster: FromPath[str], run: FromPath[str], data: JSONBody[Correction], key: Key
) -> Receipt:
    desk, person = await admin(request, "correct a charge")
    return await desk.do(
        Correct(
            key=key,
            actor=person.actor,
            cluster=cluster,
            run=run,
            amount_micro_su=data.amount_micro_su,
            reason=data.reason,
        )
    )


@post("/liens", summary="Set money aside for a job to come", responses=REFUSALS)
async def place_lien(request: AnyRequest, data: JSONBody[NewLien], key: Key) -> Receipt:
    desk, person = await admin(request, "place a lien")
    return await desk.do(
        Place(
            key=key,
            actor=person.actor,
            cluster=data.cluster,
            token=data.token,
            het_offset=data.het_offset,
            project=data.account,
            user=data.user,
            amount_micro_su=data.amount_micro_su,
            units=data.units,
            ttl_s=data.ttl_s,
            inputs=data.inputs,
        )
    )


@post(
    "/liens/{cluster:str}/{run:str}/release",
    status_code=200,
    summary="Release the lien of a run that never started",
    responses=REFUSALS,
)
async def release_lien(
    request: AnyRequest, cluster: FromPath[str], run: FromPath[str], data: JSONBody[Release], key: Key
) -> Receipt:
    desk, person = await admin(request, "release a lien")
    return await desk.do(Void(key=key, actor=person.actor, cluster=cluster, run=run, reason=data.reason))


@post(
    "/commands",
    status_code=200,
    summary="Any commands of the ledger, in this order, each under its own key; answers in the same order",
    responses=ERRORS,
)
async def commands(request: AnyRequest, data: JSONBody[list[AnyCommand]]) -> list[Answer]:
    desk, person = await admin(request, "send commands")
    if len(data) > COMMANDS_MAX:
        raise UsageError(f"{len(data)} commands at once are too many; the most is {COMMANDS_MAX}")
    return await desk.ledger.do_all([msgspec.structs.replace(one, actor=person.actor) for one in data])


@get("/bank", summary="The bank as a whole", responses=ERRORS)
async def status(request: AnyRequest) -> views.BankView:
    desk, person = await met(request)
    return await desk.status(person)


@post("/bank/verify", status_code=200, summary="Check the whole ledger", responses=ERRORS)
async def verified(request: AnyRequest) -> views.Verified:
    desk, person = await met(request)
    return await desk.verified(person)


@post("/bank/reconcile", status_code=200, summary="Compare with Slurm's accounting now", responses=ERRORS)
async def reconcile(request: AnyRequest) -> Reconciled:
    desk, _ = await admin(request, "reconcile")
    return await desk.reconcile()


@post("/bank/sync", status_code=200, summary="Open the accounts of Slurm's accounting", responses=REFUSALS)
async def sync(request: AnyRequest) -> views.Synced:
    desk, person = await admin(request, "open accounts")
    return await desk.sync(person)


@get("/tokens", summary="The caller's tokens; all for an administrator", responses=ERRORS)
async def list_tokens(request: AnyRequest) -> list[views.TokenView]:
    desk, person = await met(request)
    return await desk.tokens(person)


@post("/tokens", summary="Make a token; its secret is told this once", responses=ERRORS)
async def add_token(request: AnyRequest, data: JSONBody[NewToken]) -> views.TokenMade:
    desk, person = await met(request)
    return await desk.add_token(person, user=data.user, scope=data.scope, ttl_s=data.ttl_s, note=data.note)


@delete("/tokens/{name:str}", status_code=200, summary="Revoke a token", responses=ERRORS)
async def revoke_token(request: AnyRequest, name: FromPath[str]) -> views.TokenView:
    desk, person = await met(request)
    return await desk.revoke(person, name)


def create() -> Router:
    """Return the routes; they look for the ``Desk`` in ``app.state.desk``, which is None where there is no bank."""
    return Router(
        path="/v1",
        route_handlers=[
            *(list_accounts, show_account, open_account, set_cap, open_allocation, set_terms),
            *(deposit, adjust, transfer, carry_over, statement),
            *(list_charges, show_charge, refund, correct, place_lien, release_lien, commands),
            *(status, verified, reconcile, sync, list_tokens, add_token, revoke_token),
        ],
        exception_handlers={DeniedError: denied},
        request_class=StrictRequest,
        tags=["bank"],
    )


async def _credit(
    kind: type[Deposit | Adjust], desk: Desk, person: Person, data: Gift | Adjustment, *, account: str, key: str
) -> Receipt:
    one = await desk.allocation(person, account, data.allocation)
    return await desk.do(
        kind(
            key=key,
            actor=person.actor,
            allocation=one.name,
            amount_micro_su=data.amount_micro_su,
            reason=data.reason,
        )
    )


async def _move(kind: type[Transfer | CarryOver], desk: Desk, person: Person, data: Move, *, key: str) -> Receipt:
    source = await desk.allocation(person, data.source, data.source_allocation)
    target = await desk.allocation(person, data.target, data.target_allocation)
    return await desk.do(
        kind(
            key=key,
            actor=person.actor,
            source=source.name,
            target=target.name,
            amount_micro_su=data.amount_micro_su,
            reason=data.reason,
        )
    )


def _terms(data: Terms) -> dict[str, Any]:
    return {
        "start_s": _seconds(data.starts) or 0,
        "end_s": _seconds(data.ends),
        "priority": data.priority,
        "credit_micro_su": data.credit_micro_su,
    }


def _seconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
