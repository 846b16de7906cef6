"""Asking and telling a bank that speaks myBRC: what counts as no, what as away, and that no report is lost."""

import asyncio
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from carrel.bank.mybrc import MybrcBank
from carrel.config import Controller
from carrel.core import imports
from carrel.core.mybrc import MybrcJob
from carrel.daemons import transport
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.testing.daemons import ControllerProcess
from carrel.testing.desk import BOOK

SU = 1_000_000
CONFIG = """
[Enable]
enable_job_submit_plugin = true
[PartitionPrice]
savio = 0.75
[QosMultiplier]
savio_normal = 1.5
[API]
url = "{url}"
token = "Token secret"
"""
JOB = MybrcJob(
    jobslurmid="4711",
    userid="1",
    accountid="physics",
    jobstatus="COMPLETED",
    submitdate=datetime(2026, 3, 1, tzinfo=UTC),
    startdate=datetime(2026, 3, 1, 1, tzinfo=UTC),
    enddate=datetime(2026, 3, 1, 2, tzinfo=UTC),
)


class Stub:
    """A bank that answers as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = {"success": True, "message": "yes"}
        self.raw: bytes | None = None
        self.asked: list[tuple[str, str, Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                told = json.loads(self.rfile.read(length)) if length else None
                stub.asked.append((self.command, self.path, told))
                assert self.headers["Authorization"] == "Token secret"
                raw = stub.raw if stub.raw is not None else json.dumps(stub.body).encode()
                self.send_response(stub.status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_PUT = do_POST = _answer  # noqa: N815  # names of the standard library

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/api"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    found = Stub()
    yield found
    found.close()


@pytest.fixture
def bank(stub: Stub, tmp_path: Path) -> Iterator[MybrcBank]:
    """The bank that a ``bank-config.toml`` names."""
    found = imports.mybrc(CONFIG.format(url=stub.url), where="bank-config.toml")
    opened = MybrcBank.configured(found, queue=tmp_path / "queue.db")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("amount", "sent"),
    [(1, "0.01"), (10_000, "0.01"), (10_001, "0.02"), (12_500_000, "12.50"), (999_999_999_990_000, "999999999.99")],
)
def test_a_cost_is_asked_with_two_decimals_rounded_up(bank: MybrcBank, stub: Stub, amount: int, sent: str) -> None:
    assert bank.can_submit(amount, uid=1001, account="fc/physics").allowed
    assert stub.asked == [("GET", f"/api/can_submit_job/{sent}/1001/fc%2Fphysics/", None)]


def test_a_cost_that_the_bank_could_not_read_is_a_denial_and_is_not_asked(bank: MybrcBank, stub: Stub) -> None:
    decision = bank.can_submit(999_999_999_990_001, uid=1, account="physics")
    assert (decision.allowed, stub.asked) == (False, [])
    assert "more than the bank can be asked for" in decision.message


def test_a_free_job_asks_nobody(bank: MybrcBank, stub: Stub) -> None:
    assert bank.can_submit(0, uid=1, account="physics").allowed
    assert stub.asked == []


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, {"success": False, "message": "Account x has no active compute allocation."}, "no active compute"),
        (400, {"success": False, "message": "No user exists with user_id 1."}, "No user exists"),
        (400, {"success": True, "message": "odd"}, "odd"),
        (200, {"message": "no success in it"}, "no success in it"),
        (200, {"success": "true"}, "no reason"),
        (200, [], "no reason"),
    ],
)
def test_whatever_is_not_a_yes_is_a_no(bank: MybrcBank, stub: Stub, status: int, body: Any, message: str) -> None:
    stub.status, stub.body = status, body
    decision = bank.can_submit(SU, uid=1, account="physics")
    assert not decision.allowed
    assert message in decision.message


@pytest.mark.parametrize("status", [401, 403, 404, 405, 301])
def test_a_wrong_token_or_address_is_no_outage(bank: MybrcBank, stub: Stub, status: int) -> None:
    stub.status = status
    with pytest.raises(RefusedError, match=str(status)) as error:
        bank.can_submit(SU, uid=1, account="physics")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("status", "raw"), [(500, None), (502, b"<html>"), (503, None), (200, b"<html>")])
def test_a_bank_that_fails_is_away(bank: MybrcBank, stub: Stub, status: int, raw: bytes | None) -> None:
    stub.status, stub.raw = status, raw
    with pytest.raises(UnreachableError):
        bank.can_submit(SU, uid=1, account="physics")


def test_a_bank_that_does_not_answer_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        bank = MybrcBank(url=url, token="Token x", queue=tmp_path / "q.db", timeout_s=0.1)
        with pytest.raises(UnreachableError, match="timed out"):
            bank.can_submit(SU, uid=1, account="physics")
        bank.close()


@pytest.mark.parametrize("url", ["", "bank.example.org", "ftp://bank.example.org", "http://"])
def test_an_address_that_is_none_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(CarrelError, match=r"API\.url"):
        MybrcBank(url=url, token="", queue=tmp_path / "q.db")


def test_a_report_is_sent_once_the_bank_takes_it_and_not_again(bank: MybrcBank, stub: Stub) -> None:
    stub.status = 503
    bank.report(JOB, 15_500_000)
    assert bank.flush()[:2] == (0, 1)
    stub.status = 200
    assert bank.flush()[:2] == (1, 0)
    assert bank.flush()[:2] == (0, 0)
    method, path, told = stub.asked[-1]
    assert (method, path) == ("PUT", "/api/jobs/4711/")
    assert (told["amount"], told["enddate"], told["userid"]) == ("15.50", "2026-03-01T02:00:00Z", "1")
    assert len(stub.asked) == 2


def test_a_report_outlives_the_daemon_that_made_it(stub: Stub, tmp_path: Path) -> None:
    queue = tmp_path / "q.db"
    for _ in range(2):  # killed before it was sent: nothing is closed
        MybrcBank(url=stub.url, token="Token secret", queue=queue).report(JOB, SU)
    after = MybrcBank(url=stub.url, token="Token secret", queue=queue)
    assert after.flush()[:2] == (1, 0)
    after.close()


def test_of_several_reports_of_a_job_the_last_is_sent(bank: MybrcBank, stub: Stub) -> None:
    for amount in (SU, 2 * SU, 3 * SU):
        bank.report(JOB, amount)
    assert bank.flush().sent == 1
    assert stub.asked[0][2]["amount"] == "3.00"


def test_the_runs_of_a_requeued_job_are_added_up(bank: MybrcBank, stub: Stub) -> None:
    bank.report(JOB, 2 * SU)
    bank.flush()
    again = {name: getattr(JOB, name) for name in JOB.__struct_fields__}
    again |= {"startdate": datetime(2026, 3, 2, tzinfo=UTC), "enddate": datetime(2026, 3, 3, tzinfo=UTC)}
    bank.report(MybrcJob(**again), 5 * SU)
    bank.flush()
    assert [told["amount"] for _, _, told in stub.asked] == ["2.00", "7.00"]


def test_a_report_that_the_bank_will_never_take_holds_up_no_other(bank: MybrcBank, stub: Stub) -> None:
    stub.status, stub.body = 400, {"userid": ["no such user"]}
    bank.report(JOB, SU)
    assert bank.flush() == (0, 0, 1, "")
    stub.status = 200
    other = {name: getattr(JOB, name) for name in JOB.__struct_fields__} | {"jobslurmid": "4712"}
    bank.report(MybrcJob(**other), SU)
    bank.report(MybrcJob(**other | {"jobslurmid": "4713"}), 100_000_001 * SU)
    assert bank.flush() == (1, 0, 2, "")
    assert [("no such user" in why, "more than the bank takes" in why) for _, why in bank.parked()] == [
        (True, False),
        (False, True),
    ]


def test_a_token_that_expired_leaves_the_reports_where_they_are(bank: MybrcBank, stub: Stub) -> None:
    stub.status = 401
    bank.report(JOB, SU)
    flushed = bank.flush()
    assert (flushed.sent, flushed.left) == (0, 1)
    assert "does not take our token" in flushed.problem


def test_our_client_and_our_server_understand_each_other() -> None:
    directory = Path(tempfile.mkdtemp(prefix="cbrc"))
    (directory / "prices.toml").write_text(BOOK)
    paths = "\n".join(f'{name} = "{directory}/{name}"' for name in ("database", "dir", "socket"))
    extra = f'munge_socket = "{directory}/none"\n[bank]\nenabled = true\n{paths}\n[bank.mybrc]\nenabled = true'
    unix = ControllerProcess(directory, extra=extra)
    unix.start()
    try:
        secret = _open(unix)
    finally:
        unix.stop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ControllerProcess(directory, listen=f"tcp:127.0.0.1:{port}", extra=extra)
    server.start()
    bank = MybrcBank(url=f"http://127.0.0.1:{port}/api", token=f"Token {secret}", queue=directory / "queue.db")
    try:
        assert bank.can_submit(10 * SU, uid=1, account="physics") == (
            True,
            "A job with job_cost 10.00 can be submitted.",
        )
        assert not bank.can_submit(1, uid=1, account="physics").allowed
        assert "No account exists" in bank.can_submit(1, uid=1, account="ghostly").message
        bank.report(JOB, 4 * SU)
        assert bank.flush() == (1, 0, 0, "")
        # The question's lien is still there for its job; what was charged and what is set aside exceed what was given.
        assert "account balance 14.00" in bank.can_submit(1, uid=1, account="physics").message
    finally:
        bank.close()
        server.kill()
        shutil.rmtree(directory)


def _open(controller: ControllerProcess) -> str:
    def post(path: str, body: Any, key: str = "") -> Any:
        asked = transport.request(
            Controller(listen=controller.listen), "POST", path, json.dumps(body).encode(), more={"Idempotency-Key": key}
        )
        return transport.decoded(asyncio.run(asked))

    post("/v1/accounts", {"account": "physics"}, "a")
    post("/v1/accounts/physics/allocations", {"allocation": "physics"}, "b")
    post("/v1/accounts/physics/deposits", {"amount_micro_su": 10 * SU, "reason": "x"}, "c")
    secret = post("/v1/tokens", {"scope": "admin"}, "d")["secret"]
    assert isinstance(secret, str)
    return secret
