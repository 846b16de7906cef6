"""``carrel bank``: the service units of the site, as a whole."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import desk, output
from carrel.cli.guest import Json
from carrel.daemons.bank_views import BankView, Synced, Verified
from carrel.daemons.settling import Reconciled
from carrel.errors import RefusedError
from carrel.model.money import format_su

app = App(name="bank", help="The site's service units: the ledger as a whole, prices, tokens.")
app.command("carrel.cli.prices:app", name="prices", help="What an hour of each resource costs.")
app.command("carrel.cli.tokens:app", name="token", help="Tokens, by which programs ask the bank.")


@app.command
def status(*, json: Json = False) -> None:
    """Show the bank as a whole: what is settled, running, committed and available, and what a person should look at."""
    bank = desk.ask("bank", BankView)
    if json:
        output.objects([bank])
        return
    sums = bank.totals
    output.fields(
        [
            ("cluster", bank.cluster),
            ("database", f"{bank.database}, {bank.transactions} transactions"),
            ("prices", bank.prices or "none in force; see: carrel bank prices show"),
            ("offline", bank.offline),
            ("accounts", f"{bank.accounts}, with {bank.allocations} allocations"),
            ("settled", f"{format_su(sums.settled_micro_su)} SU"),
            ("running", f"{format_su(sums.running_micro_su)} SU"),
            ("committed", f"{format_su(sums.committed_micro_su)} SU"),
            ("available", f"{format_su(sums.available_micro_su)} SU"),
            ("open liens", bank.open_liens),
            ("unknown ends", bank.unknown_ends),
            ("last hash", bank.last_hash),
        ]
    )
    for line in bank.parked:
        print(f"waits: {line}")
    if bank.unknown_ends:
        print("\nnext: carrel charge list --state unknown_end")


@app.command
def verify(*, json: Json = False) -> int:
    """Read the whole ledger and name every invariant that does not hold; exit 1 when there is one."""
    found = desk.change("bank/verify", Verified)
    if json:
        output.objects([found])
    else:
        for broken in found.breaks:
            print(f"{broken.invariant}: {broken.sentence}")
        if not found.breaks:
            print(f"{found.transactions} transactions, every invariant holds")
    return 1 if found.breaks else 0


@app.command
def backup(
    directory: Annotated[Path, Parameter(help="Where the copy goes; one that is there is replaced, as a whole.")], /
) -> None:
    """Copy the ledger, with how far it was compared with Slurm's accounting, while the bank goes on. On its host."""
    # It is a file, and needs no answer of carrelctld: copies are wanted most when that does not start.
    from carrel.bank.backup import LEDGER, MARKS  # noqa: PLC0415
    from carrel.bank.backup import backup as copy  # noqa: PLC0415

    settings = config.load().bank
    marks = Path(settings.dir) / MARKS
    if not settings.database.startswith("/"):
        raise RefusedError(f"bank.database is a PostgreSQL: copy {marks} first, and then pg_dump the database")
    count = copy(Path(settings.database), marks, directory)
    print(f"{directory}: {LEDGER} with {count} transactions; to put it back: docs/how-to/bank.md")


@app.command
def reconcile(*, json: Json = False) -> int:
    """Compare what ended lately with Slurm's accounting, and charge what is missing; exit 1 when some is left."""
    found = desk.change("bank/reconcile", Reconciled)
    if json:
        output.objects([found])
    else:
        since = output.clock(datetime.fromtimestamp(found.from_s, UTC))
        print(
            f"since {since}: {found.matched} as they should be, {found.created} charged now, "
            f"{found.corrected} corrected, {found.parked} left"
        )
        if found.parked:
            print("next: carrel bank status")
    return 1 if found.parked else 0


@app.command
def sync(*, json: Json = False) -> None:
    """Open every account that Slurm's accounting has and the bank has not, with the account above it."""
    found = desk.change("bank/sync", Synced)
    if json:
        output.objects([found])
        return
    for account in found.opened:
        print(f"account {account} is open; next: carrel account add {account} --allocation NAME")
    print(f"accounts opened: {len(found.opened)}; there before: {found.known}")
