"""What could not be charged is not forgotten: neither with the daemon that knew of it, nor when it is long ago."""

import asyncio
from pathlib import Path

import pytest

from carrel.bank import queries
from carrel.config import Bank as BankSettings
from carrel.config import Config, Prices, RefundPercent, Slurm
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.daemons.branch import Branch
from carrel.daemons.settling import Reconciled
from carrel.model.cluster import ClusterFacts
from carrel.model.ledger import Deposit, OpenAllocation, OpenProject

PRICES = '[[version]]\nname = "v"\nvalid_from = 2020-01-01\n[version.partition.main]\nrates = { cpu = 3600 }\n'
MORE = "[version.partition.bare]\nrates = { cpu = 3600 }\n"
SACCT = r"""#!/bin/sh
for word; do
    case "$before" in -S) since=$(date -ud "$word" +%s) ;; esac
    case "$word" in --delimiter=*) part=${word#*=} ;; esac
    before=$word
done
awk -F'|' -v since="$since" -v part="$part" '$9 >= since { gsub(/[|]/, part); print }' "$(dirname "$0")/records"
"""
"""As far as it is asked: what ended since then."""
A_MONTH_S = 30 * 86400


class Site:
    """A bank whose daemon may be killed, and a Slurm that only has accounting."""

    def __init__(self, root: Path) -> None:
        """Open the account."""
        self.root = root
        (root / "sacct").write_text(SACCT)
        (root / "sacct").chmod(0o755)
        self.prices = root / "prices.toml"
        self.prices.write_text(PRICES)
        self.bank = self._begin()
        self.now_s = self.bank.since_s
        for command in (
            OpenProject(key="p", project="physics"),
            OpenAllocation(key="a", allocation="physics", project="physics"),
            Deposit(key="d", allocation="physics", amount_micro_su=10**9, reason="test"),
        ):
            self.bank.ledger.call(command)

    def ended(self, *lines: str, state: str = "COMPLETED") -> None:
        """Have these runs in Slurm's accounting: job id, partition; they ended now, after ten seconds."""
        form = "{0}|{0}|{4}|ada|{1}|normal|{2}|{2}|{3}|10|cpu=1,mem=1G,node=1||physics"
        rows = [form.format(*line.split(), self.now_s, self.now_s + 10, state) for line in lines]
        (self.root / "records").write_text("\n".join(rows) + "\n")

    def reconcile(self) -> Reconciled:
        return asyncio.run(self.branch.reconcile())

    def kill(self, *, later_s: int = 0, refund_percent: int = 100) -> None:
        """Begin with another daemon, which finds what is on disk, and finds that all until then was compared."""
        self.bank.reconciled(self.now_s + later_s)
        self.bank = self._begin(refund_percent)

    def charged(self) -> dict[int, int]:
        return {lien.job_id: lien.charged_micro_su for lien in queries.liens(self.bank.ledger.store)}

    def _begin(self, refund_percent: int = 100) -> Bank:
        settings = BankSettings(
            enabled=True,
            database=str(self.root / "ledger.db"),
            dir=str(self.root),
            prices=Prices(book=str(self.prices)),
            refund_percent=RefundPercent(node_fail=refund_percent),
        )
        config = Config(bank=settings, slurm=Slurm(bin_dir=str(self.root)))
        bank = Bank(config)
        bank.learn(
            ClusterFacts(partitions={}, default_partition=""),
            {"ClusterName": "k", "AccountingStorageType": "accounting_storage/slurmdbd"},
        )
        self.branch = Branch(config, bank, Board())
        return bank


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_run_without_a_price_is_listed_by_the_next_daemon_and_charged_once_it_has_one(site: Site) -> None:
    site.ended("7 bare", "8 main")
    found = site.reconcile()
    assert (found.created, found.parked) == (1, 1)
    site.kill(later_s=A_MONTH_S)
    (line,) = site.branch.rounds.waiting()
    assert line.startswith("run 7.")
    assert site.reconcile().parked == 1
    assert site.charged() == {8: 10_000_000}
    site.prices.write_text(PRICES + MORE)
    found = site.reconcile()
    assert (found.created, found.parked) == (1, 0)
    assert site.branch.rounds.waiting() == []
    site.kill(later_s=2 * A_MONTH_S)
    assert site.branch.rounds.waiting() == []
    assert site.reconcile().created == 0
    assert site.charged() == {7: 10_000_000, 8: 10_000_000}


def test_a_run_of_an_account_that_the_bank_does_not_know_waits_until_it_does(site: Site) -> None:
    site.ended("7 main")
    records = site.root / "records"
    records.write_text(records.read_text().replace("physics", "chemistry"))
    assert site.reconcile().parked == 1
    site.kill(later_s=A_MONTH_S)
    for command in (
        OpenProject(key="p2", project="chemistry"),
        OpenAllocation(key="a2", allocation="chemistry", project="chemistry"),
    ):
        site.bank.ledger.call(command)
    site.reconcile()
    assert site.reconcile().parked == 0
    assert site.charged() == {7: 10_000_000}


def test_a_line_that_cannot_be_read_is_kept_until_it_can(site: Site) -> None:
    site.ended("7 main", "8 main")
    records = site.root / "records"
    whole = records.read_text()
    records.write_text(whole.replace("physics", "phys|ics", 1))
    found = site.reconcile()
    assert (found.created, found.parked) == (1, 1)
    site.kill(later_s=A_MONTH_S)
    assert site.reconcile().parked == 1
    records.write_text(whole)
    found = site.reconcile()
    assert (found.created, found.parked) == (1, 0)
    assert site.charged() == {7: 10_000_000, 8: 10_000_000}


def test_a_refund_that_a_kill_came_before_is_made_good_once(site: Site) -> None:
    site.kill(refund_percent=0)  # so that there is a charge, and no refund yet
    site.ended("7 main", state="NODE_FAIL")
    site.reconcile()
    assert [lien.state for lien in queries.liens(site.bank.ledger.store)] == ["settled"]
    for found in (1, 0, 0):
        site.kill()
        assert site.reconcile().corrected == found
    (lien,) = queries.liens(site.bank.ledger.store)
    assert (lien.state, lien.refunded_micro_su) == ("refunded", 10_000_000)


def test_f32_a_record_that_comes_a_day_late_is_charged_all_the_same(site: Site) -> None:
    (site.root / "records").write_text("")
    site.reconcile()
    site.kill(later_s=25 * 3600)
    site.ended("7 main")
    assert site.reconcile().created == 1
    assert site.charged() == {7: 10_000_000}


def test_a_list_that_cannot_be_read_stops_nothing_and_is_left_for_a_person(site: Site) -> None:
    (site.root / "parked.json").write_text("[")
    site.kill()
    assert site.branch.rounds.waiting() == []
    assert (site.root / "parked.unread").read_text() == "["
