"""An account that has used up much of its money: somebody is told, once for each crossing."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.bank import alerts
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.config import AlertSettings
from carrel.core.alerts import Usage, reached, usage
from carrel.daemons.alerts import Alerts
from carrel.model.ledger import AnyCommand, Backfill, Balance, Deposit, OpenAllocation, OpenProject, Receipt, Refund

NOW_S = 1_000_000


class Site:
    """An account with 100 micro-SU, and a hook that writes down what it is told."""

    def __init__(self, where: Path) -> None:
        self.ledger = Ledger(SqliteStore(where / "ledger.db"), clock=lambda: NOW_S)
        self.heard = where / "heard"
        self.hook = where / "hook"
        self.works(well=True)
        self.settings = AlertSettings(command=(str(self.hook),))
        self._runs = 0
        self.do(OpenProject(key="p", project="physics"))
        self.do(OpenAllocation(key="a", allocation="physics", project="physics"))
        self.do(Deposit(key="d", allocation="physics", amount_micro_su=100, reason="x"))

    def works(self, *, well: bool) -> None:
        self.hook.write_text(f'#!/bin/sh\necho "$CARREL_ALERT" >> {self.heard}\nexit {0 if well else 1}\n')
        self.hook.chmod(0o755)

    def do(self, command: AnyCommand) -> None:
        assert isinstance(self.ledger.call(command), Receipt)

    def spend(self, amount: int) -> None:
        self._runs += 1
        run = f"r{self._runs}"
        self.do(Backfill(key=run, cluster="c", run=run, project="physics", user="ada", amount_micro_su=amount))

    def look(self) -> list[str]:
        """Look once, as a daemon that has just started, and return all that the hook ever heard."""
        asyncio.run(Alerts(self.settings, self.ledger.store, clock=lambda: NOW_S).look())
        return self.heard.read_text().split() if self.heard.exists() else []


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.ledger.close()


def test_each_crossing_is_told_once(site: Site) -> None:
    told = []
    for amount in (49, 1, 24, 1, 14, 1, 9, 1):
        site.spend(amount)
        site.look()
        told.append(len(site.look()))
    assert told == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [name.split("/")[1] for name in site.look()] == ["50", "75", "90", "100"]


def test_of_several_thresholds_crossed_at_once_the_highest_is_told(site: Site) -> None:
    site.spend(95)
    assert site.look() == ["physics/90/1"]


def test_money_that_comes_in_makes_the_next_crossing_a_new_one(site: Site) -> None:
    site.spend(60)
    site.look()
    site.do(Deposit(key="more", allocation="physics", amount_micro_su=100, reason="x"))
    assert site.look() == ["physics/50/1"]
    site.spend(40)
    assert site.look() == ["physics/50/1", "physics/50/2"]


def test_a_refund_below_the_threshold_is_no_alert(site: Site) -> None:
    site.spend(60)
    site.look()
    site.do(Refund(key="r", cluster="c", run="r1", amount_micro_su=30, reason="x"))
    assert site.look() == ["physics/50/1"]


def test_killed_before_it_was_told_it_is_told_after_the_restart_under_the_same_name(site: Site) -> None:
    site.spend(60)
    (lost,) = alerts.due(site.ledger.store, NOW_S)  # written down, and then the power goes
    assert site.look() == [lost.name]
    assert site.look() == [lost.name]


def test_killed_after_it_was_told_it_is_told_again_under_the_same_name(site: Site) -> None:
    site.spend(60)
    watcher = Alerts(site.settings, site.ledger.store, clock=lambda: NOW_S)
    (alert,) = alerts.due(site.ledger.store, NOW_S)
    assert asyncio.run(watcher._tell(alert))
    assert site.look() == ["physics/50/1"] * 2
    assert site.look() == ["physics/50/1"] * 2


def test_a_hook_that_fails_is_called_again(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.works(well=False)
    site.spend(60)
    assert len(site.look()) == 1
    assert "told again later" in caplog.text
    site.works(well=True)
    assert len(site.look()) == 2
    assert len(site.look()) == 2


def test_without_a_command_the_log_says_it_with_figures(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.settings = AlertSettings()
    site.spend(60)
    site.look()
    sentence = "account 'physics' has used 0.00006 of 0.0001 SU, 50 % or more; see: carrel account show physics"
    assert sentence in caplog.text


def test_no_thresholds_are_no_alerts(site: Site) -> None:
    site.settings = AlertSettings(percent=(), command=(str(site.hook),))
    site.spend(99)
    assert site.look() == []


@pytest.mark.parametrize(
    ("given", "spent", "threshold"),
    [(0, 0, 0), (0, 1, 100), (-5, 5, 100), (1000, 999, 90), (100, 50, 50), (100, 75, 75), (100, 74, 50)],
)
def test_whole_percent_are_rounded_down(given: int, spent: int, threshold: int) -> None:
    assert reached(Usage(given, spent)) == threshold


def balance(start_s: int, end_s: int | None, *, project: str = "physics") -> Balance:
    return Balance(
        allocation="a",
        project=project,
        start_s=start_s,
        end_s=end_s,
        priority=0,
        credit_micro_su=0,
        available_micro_su=70,
        lien_micro_su=20,
        running_micro_su=0,
        spent_micro_su=10,
        expired_micro_su=0,
    )


def test_what_an_account_has_is_of_all_allocations_that_are_valid_now_and_of_no_other() -> None:
    valid = [balance(NOW_S, None), balance(0, NOW_S + 1)]
    other = [balance(NOW_S + 1, None), balance(0, NOW_S), balance(NOW_S + 1, NOW_S)]
    found = usage([*valid, *other, balance(0, None, project="biology")], NOW_S)
    assert found == {"physics": Usage(200, 20), "biology": Usage(100, 10)}


def test_an_account_that_was_given_nothing_has_used_all_of_it_once_it_spent_anything() -> None:
    assert [Usage(0, spent).percent for spent in (0, 1)] == [0, 100]
    assert Usage(1, 3).percent == 300
