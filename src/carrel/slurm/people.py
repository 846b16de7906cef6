"""Slurm's accounting of people, as text: which accounts there are, who belongs to them, coordinates, administers.

Read from ``sacctmgr``, which writes only names that administrators chose.
"""

from collections import defaultdict

from carrel.model.access import Associations

ROOT = "root"
"""The account above all; nobody is charged for it."""
ASSOC_FORMAT = "format=Account,ParentName,User"
ACCOUNT_FORMAT = "format=Account,Coordinators"
USER_FORMAT = "format=User,AdminLevel"


def parse(assocs: str, accounts: str, users: str) -> Associations:
    r"""Read what ``sacctmgr -nP show assoc | account WithCoord | user`` print with the formats above.

    >>> found = parse("root||\nphysics|root|\nphysics||ada", "physics|grace", "ada|None\nmax|Administrator")
    >>> found.accounts, found.coordinates("grace", "physics"), found.administrators
    ({'physics': ''}, True, frozenset({'max'}))
    """
    parents: dict[str, str] = {}
    members: dict[str, set[str]] = defaultdict(set)
    for line in assocs.splitlines():
        account, parent, user = _fields(line, 3)
        if user and account != ROOT:
            members[account].add(user)
        elif account and account != ROOT:
            parents[account] = "" if parent == ROOT else parent
    coordinators = {account: frozenset(filter(None, names.split(","))) for account, names in _pairs(accounts)}
    return Associations(
        accounts=parents,
        users={account: frozenset(names) for account, names in members.items()},
        coordinators={account: names for account, names in coordinators.items() if names},
        administrators=frozenset(user for user, level in _pairs(users) if level == "Administrator"),
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    found = [_fields(line, 2) for line in text.splitlines()]
    return [(name, rest) for name, rest in found if name]


def _fields(line: str, count: int) -> list[str]:
    return [*line.split("|"), *[""] * count][:count]
