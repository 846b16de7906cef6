"""``carrel charge``: what runs have set aside and did cost, and how a charge is given back or put right."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from carrel.cli import desk, output
from carrel.cli.desk import Csv, Key, MicroSu, Reason, Su
from carrel.cli.guest import Json
from carrel.daemons.bank_views import ChargeDetail, ChargeView
from carrel.errors import NotFoundError, RefusedError, UsageError
from carrel.model.ledger import MoneyState, Receipt
from carrel.model.money import format_su

Run = Annotated[
    str, Parameter(show_default=False, help="Id of the job, or of one run of it: its SLUID, or CLUSTER/RUN.")
]
All = Annotated[bool, Parameter(name="--all", negative="", show_default=False, help="All that is left of it.")]
NUMBERS = ("SET ASIDE", "CHARGED", "REFUNDED")
SHOWN = 100

app = App(name="charge", help="Liens and charges: what runs may cost and did cost.")


@app.command(name="list")
def list_(
    *,
    account: Annotated[str, Parameter(show_default=False, help="Only this account's.")] = "",
    user: Annotated[str, Parameter(show_default=False, help="Only this user's.")] = "",
    state: Annotated[
        tuple[MoneyState, ...],
        Parameter(negative="", consume_multiple=True, show_default=False, help="Only in one of these states."),
    ] = (),
    limit: Annotated[int, Parameter(validator=Number(gte=1), help="Show at most so many, the newest.")] = SHOWN,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """List liens and charges, the newest first: your own, or all of an account that you manage."""
    found = _pages(limit, account=account, user=user, state=state)
    if json:
        output.objects(found)
    elif csv:
        output.csv(found, ChargeView)
    else:
        _table(found)


@app.command
def show(run: Run, /, *, json: Json = False) -> None:
    """Show the charges of a job or a run, how each came about, and what it was priced by."""
    found = [
        desk.ask(f"charges/{desk.part(one.cluster)}/{desk.part(one.run)}", ChargeDetail)
        for one in _find(run)
        if one.run
    ]
    if not found:
        raise NotFoundError(f"job {run} has not begun: nothing is charged yet; what is set aside: carrel charge list")
    if json:
        output.objects(found)
        return
    for detail in found:
        _describe(detail)


@app.command
def refund(
    run: Run,
    /,
    *,
    su: Su = "",
    micro_su: MicroSu = "",
    reason: Reason,
    all_: Annotated[
        bool, Parameter(name="--all", negative="", show_default=False, help="All that is left of it.")
    ] = False,
    successor: Annotated[
        str, Parameter(show_default=False, help="Allocation that gets it where the one that paid has ended.")
    ] = "",
    key: Key = "",
) -> None:
    """Give back part of a charge, or all that is left of it."""
    one = _only(run)
    left = one.charged_micro_su - one.refunded_micro_su
    if all_ and (su or micro_su):
        raise UsageError("give an amount, or --all: all that is left of the charge")
    if all_ and not left:
        raise RefusedError(f"nothing is left of the charge of run '{one.run}'; see: carrel charge show {one.run}")
    body = {
        "amount_micro_su": left if all_ else desk.amount(su, micro_su, least=1),
        "reason": reason,
        "successor": successor,
    }
    receipt = desk.change(f"{_path(one)}/refunds", Receipt, body, key=key)
    print(f"refunded {format_su(receipt.amount_micro_su)} SU; next: carrel charge show {one.run}")


@app.command(name=["adjust", "correct"])
def adjust(
    run: Run,
    /,
    *,
    su: Annotated[str, Parameter(name="--su", show_default=False, help="What the run shall have cost, in SU.")] = "",
    micro_su: MicroSu = "",
    reason: Reason,
    key: Key = "",
) -> None:
    """Charge a run anew: the charge is reversed, and this is charged instead."""
    one = _only(run)
    body = {"amount_micro_su": desk.amount(su, micro_su), "reason": reason}
    receipt = desk.change(f"{_path(one)}/corrections", Receipt, body, key=key)
    before = format_su(one.charged_micro_su)
    print(f"charged {format_su(receipt.amount_micro_su)} SU instead of {before}; next: carrel charge show {one.run}")


def _pages(limit: int, **query: object) -> list[ChargeView]:
    found: list[ChargeView] = []
    while len(found) < limit:
        before = found[-1].id if found else 0
        page = desk.ask("charges", list[ChargeView], **query, before=before, limit=min(1000, limit - len(found)))
        found += page
        if not page:
            break
    return found


def _find(run: str) -> list[ChargeView]:
    """Return the charges of a job, or the one of a run.

    Raises:
        NotFoundError: there is none that the caller may see.
    """
    cluster, slash, rest = run.rpartition("/")
    if run.isdecimal():
        found = desk.ask("charges", list[ChargeView], job=int(run))
    else:
        found = desk.ask("charges", list[ChargeView], run=rest, cluster=cluster if slash else "")
    if not found:
        what = f"job {run}" if run.isdecimal() else f"run '{run}'"
        raise NotFoundError(f"{what} has no charge that you may see; see: carrel charge list")
    return found


def _only(run: str) -> ChargeView:
    found = _find(run)
    if len(found) > 1:
        names = ", ".join(one.run for one in found)
        raise UsageError(f"job {run} ran several times; name the run: {names}")
    return found[0]


def _path(one: ChargeView) -> str:
    return f"charges/{desk.part(one.cluster)}/{desk.part(one.run)}"


def _table(found: Sequence[ChargeView]) -> None:
    amounts = [
        desk.rounded(one.lien_micro_su or None for one in found),
        desk.rounded(one.charged_micro_su if one.charged_micro_su or one.state == "settled" else None for one in found),
        desk.rounded(one.refunded_micro_su or None for one in found),
    ]
    output.table(
        ("JOB", "RUN", "ACCOUNT", "USER", "STATE", *NUMBERS),
        [
            (
                *(one.job_id or "", one.run, one.account, one.user, " ".join((one.state, *one.flags))),
                *(column[at] for column in amounts),
            )
            for at, one in enumerate(found)
        ],
        right=NUMBERS,
        whole=("JOB", "RUN"),
    )


def _describe(detail: ChargeDetail) -> None:
    one = detail.charge
    output.fields(
        [
            ("run", f"{one.cluster}/{one.run}"),
            ("job", one.job_id),
            ("account", one.account),
            ("user", one.user),
            ("state", " ".join((one.state, *one.flags))),
            ("set aside", f"{format_su(one.lien_micro_su)} SU" if one.lien_micro_su else ""),
            ("charged", f"{format_su(one.charged_micro_su)} SU"),
            ("refunded", f"{format_su(one.refunded_micro_su)} SU" if one.refunded_micro_su else ""),
        ]
    )
    print()
    amounts = desk.column(event.amount_micro_su or None for event in detail.events)
    output.table(
        ("TIME", "WHAT", "AMOUNT", "BY", "WHY"),
        [
            (
                output.clock(event.time).replace("T", " ").removesuffix("Z"),
                " ".join((event.what, *event.flags)),
                amount,
                event.actor,
                event.reason or _inputs(event.inputs),
            )
            for event, amount in zip(detail.events, amounts, strict=True)
        ],
        right=("AMOUNT",),
        whole=("TIME",),
    )
    print()


def _inputs(inputs: dict[str, object]) -> str:
    """Return what a price was made of, without what nobody said; ``--json`` has all of it."""
    return " ".join(
        f"{name}={value if isinstance(value, str | int) else msgspec.json.encode(value).decode()}"
        for name, value in _said(inputs).items()
    )


def _said(inputs: dict[str, Any]) -> dict[str, Any]:
    said = {name: _said(value) if isinstance(value, dict) else value for name, value in inputs.items()}
    return {name: value for name, value in said.items() if value not in (None, "", 0, [], {})}
