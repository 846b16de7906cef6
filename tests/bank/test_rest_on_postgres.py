"""What is beside the ledger in its database works in PostgreSQL as well: tokens, alerts, jobs of the myBRC API."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.bank import alerts
from carrel.model.access import Associations
from carrel.testing.desk import RestBank, rest_bank

pytestmark = pytest.mark.postgres

SU = 1_000_000
JOB = {
    "jobslurmid": "4711",
    "userid": "1",
    "accountid": "physics",
    "amount": "60.00",
    "startdate": "2026-03-01T01:00:00Z",
    "enddate": "2026-03-01T02:00:00Z",
    "cpu_time": 2.5,
}


@pytest.fixture
def desk(tmp_path: Path, postgres: str) -> Iterator[RestBank]:
    with rest_bank(tmp_path, database=postgres, extra="[bank.mybrc]\nenabled = true") as found:
        found.slurm.known = Associations(users={"physics": frozenset({"daemon"})})
        found.account("physics", 100 * SU)
        yield found


def test_a_token_is_made_used_and_revoked(desk: RestBank) -> None:
    made = desk.done("POST", "/v1/tokens", {"user": "daemon"})
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert desk.ask("GET", "/v1/accounts", uid=None, headers=headers).json[0]["available_micro_su"] == 100 * SU
    desk.done("DELETE", f"/v1/tokens/{made['token']['name']}")
    assert desk.ask("GET", "/v1/accounts", uid=None, headers=headers).status == 401


def test_charges_are_found_and_shown(desk: RestBank) -> None:
    secret = desk.done("POST", "/v1/tokens", {"scope": "admin"})["secret"]
    headers = {"Authorization": f"Token {secret}"}
    assert desk.ask("GET", "/api/can_submit_job/60/1/physics/", uid=None, headers=headers).json["success"]
    for _ in range(2):
        assert desk.ask("PUT", "/api/jobs/4711/", JOB, uid=None, headers=headers).json["amount"] == "60.00"
    listed = desk.ask("GET", "/api/jobs/?start_time=0&user=daemon", uid=None, headers=headers).json
    assert (listed["count"], listed["total_amount"], listed["total_cpu_time"]) == (1, "60.00", "2.50")
    (charge,) = desk.done("GET", "/v1/charges?job=4711&state=settled&user=daemon")
    assert desk.done("GET", f"/v1/charges/mybrc/{charge['run'].replace('@', '%40')}")["charge"] == charge
    assert desk.done("GET", "/v1/bank")["database"] == "postgresql"
    store = desk.bank.ledger.store
    (alert,) = alerts.due(store, int(time.time()))
    assert alert.percent == 50
    alerts.told(store, alert)
    assert alerts.due(store, int(time.time())) == []


def test_a_name_with_a_nul_is_no_fault_of_ours(desk: RestBank) -> None:
    assert desk.ask("GET", "/v1/accounts/%00").status == 400
    assert desk.ask("GET", "/v1/charges?user=%00").status == 400
