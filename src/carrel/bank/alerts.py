"""Which alerts were given: remembered beside the ledger, so that each crossing is told once, whoever is killed when.

A crossing is written before it is told, and marked as told afterwards. Killed between the two, it is told again after
the restart, under the same name, by which the one who hears it twice knows.
"""

import msgspec

from carrel.bank import queries
from carrel.core.alerts import THRESHOLDS, Usage, reached, usage
from carrel.ports import Store


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An account crossed a threshold."""

    account: str
    percent: int
    number: int
    """Counts the crossings of this account."""
    used: Usage

    @property
    def name(self) -> str:
        """The crossing's own: the same when it is told again."""
        return f"{self.account}/{self.percent}/{self.number}"


def due(store: Store, now_s: int, thresholds: tuple[int, ...] = THRESHOLDS) -> list[Alert]:
    """Return what is to be told now, after it was written down. Where usage sank, the next crossing counts anew."""
    now = usage(queries.balances(store), now_s)
    found = []
    with store.writing() as session:
        known = {row[0]: row for row in session.rows("SELECT project, percent, told, number, version FROM alert")}
        for account, used in sorted(now.items()):
            level = reached(used, thresholds)
            _, percent, told, number, version = known.get(account, (account, 0, 1, 0, 0))
            if level != percent:
                told, number = (0, number + 1) if level > percent else (1, number)
                if version:
                    session.update("alert", [(account, level, told, number, version)])
                else:
                    session.insert("alert", [(account, level, told, number, 1)])
            if not told:
                found.append(Alert(account=account, percent=level, number=number, used=used))
    return found


def told(store: Store, alert: Alert) -> None:
    """Remember that somebody was told. A second call changes nothing."""
    sql = "SELECT project, percent, told, number, version FROM alert WHERE project = %s AND number = %s AND told = 0"
    with store.writing() as session:
        rows = [
            (project, percent, 1, number, version)
            for project, percent, _, number, version in session.rows(sql, alert.account, alert.number)
        ]
        if rows:
            session.update("alert", rows)
