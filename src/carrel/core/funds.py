"""Which allocations pay, and the sentence where they do not: the part of the rules that liens and charges share."""

from typing import NoReturn

from carrel.core.book import Account, Allocation, Book, Lien, Member, Project, run_ref, token_ref
from carrel.model.ledger import Bind, Refusal, Reprice, Start, Void, Why
from carrel.model.money import HELD_MICRO_SU, format_su


class Refused(Exception):  # noqa: N818  # it is an answer on its way, not an error
    """Leaves a rule before it changed anything."""

    def __init__(self, refusal: Refusal) -> None:
        """Carry the answer."""
        self.refusal = refusal
        super().__init__(refusal.sentence)


def refuse(why: Why, sentence: str, *, needed: int = 0, available: int = 0) -> NoReturn:
    raise Refused(Refusal(why=why, sentence=sentence, needed_micro_su=needed, available_micro_su=available))


def project_of(book: Book, name: str) -> Project:
    if (project := book.projects.get(name)) is None:
        refuse("unknown", f"there is no account '{name}'; see: carrel account list")
    return project


def allocation_of(book: Book, name: str) -> Allocation:
    if (allocation := book.allocations.get(name)) is None:
        refuse("unknown", f"there is no allocation '{name}'; see: carrel account list")
    return allocation


def lien_of(book: Book, command: Reprice | Start | Void) -> Lien:
    """Return the lien of a run, or of a token where no run is named or the run is not known."""
    lien = book.by_run.get(run_ref(command.cluster, command.run)) if command.run else None
    return lien or lien_of_token(book, command)


def lien_of_run(book: Book, cluster: str, run: str) -> Lien:
    if (lien := book.by_run.get(run_ref(cluster, run))) is None:
        refuse("unknown", f"run '{run}' of cluster '{cluster}' has no lien; see: carrel charge list")
    return lien


def lien_of_token(book: Book, command: Bind | Reprice | Start | Void) -> Lien:
    lien = book.by_token.get(token_ref(command.cluster, command.token, command.het_offset))
    if lien is None:
        named = f"token '{command.token}'" if command.token else f"run '{command.run}'"
        refuse("unknown", f"{named} of cluster '{command.cluster}' has no lien; see: carrel charge list")
    return lien


def affordable(book: Book, project: str, need: int) -> dict[int, int]:
    """Return how much of ``need`` each valid allocation pays, money before credit; less in all where it does not do."""
    parts: dict[int, int] = {}
    for left in (_money, _spendable):
        for allocation in book.usable(project):
            paid = parts.get(allocation.id, 0)
            take = min(need, left(book.available(allocation)) - paid)
            if take > 0:
                parts[allocation.id] = paid + take
                need -= take
    return parts


def demand(book: Book, project: str, user: str, need: int) -> dict[int, int]:
    """Return the parts of a lien that is covered in full, by allocations and by every cap above it."""
    if need <= 0:
        return {}
    parts = affordable(book, project, need)
    if sum(parts.values()) < need:
        left = sum(max(0, _spendable(book.available(a))) for a in book.usable(project))
        refuse(
            "funds",
            f"account '{project}' has {format_su(left)} SU left, this job may need {format_su(need)} SU; "
            f"see: carrel account show {project}",
            needed=need,
            available=left,
        )
    for node in book.budget(project, user):
        if node.cap is not None and node.committed + need > node.cap:
            _refuse_cap(node, node.cap, project, need)
    return parts


def _refuse_cap(node: Project | Member, cap: int, project: str, need: int) -> NoReturn:
    left = max(0, cap - node.committed)
    why: Why
    if isinstance(node, Member):
        who, why = f"user '{node.user}' in account '{project}'", "user_cap"
    else:
        who, why = f"account '{node.name}'", "project_cap"
    refuse(
        why,
        f"{who} has {format_su(left)} SU left below the cap of {format_su(cap)} SU, this job may need "
        f"{format_su(need)} SU; see: carrel account show {project}",
        needed=need,
        available=left,
    )


def owed(book: Book, project: str, need: int, *, debtor: int = 0) -> dict[int, int]:
    """Return who pays what was used already: what valid allocations have, and the rest by one of them, below its floor.

    Args:
        book: Where to look.
        project: Whose allocations pay.
        need: How much.
        debtor: Allocation that owes the rest; 0: the one drawn on last, or the project's latest.
    """
    parts = affordable(book, project, need)
    rest = need - sum(parts.values())
    if rest > 0:
        valid = book.usable(project)
        latest = book.latest(project)
        number = debtor or (valid[-1].id if valid else latest.id if latest else 0)
        if not number:
            refuse("unknown", f"account '{project}' has no allocation that could owe {format_su(need)} SU; open one")
        parts[number] = parts.get(number, 0) + rest
    return parts


def check_size(
    book: Book, amount: int, accounts: list[Account], nodes: list[Project | Member], *, most: int = HELD_MICRO_SU // 2
) -> None:
    """Refuse what would not fit into 64 bits, wherever it would end up: what comes in by half of what is owed."""
    balances = [*(abs(account.balance) for account in accounts), *(abs(node.committed) for node in nodes)]
    if max(balances) + amount > most:
        refuse("invalid", f"{format_su(amount)} SU more is beyond what an account can hold at transaction {book.seq}")


def _money(account: Account) -> int:
    return account.balance


def _spendable(account: Account) -> int:
    return account.balance - account.floor
