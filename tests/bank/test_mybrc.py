"""The myBRC API as its clients know it: every status and every message, and what it does to the ledger."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.bank import queries
from carrel.errors import UnreachableError
from carrel.model.access import Associations
from carrel.testing.desk import Answer, RestBank, rest_bank

SU = 1_000_000
UID, STRANGER = 1, 2  # daemon, bin
PEOPLE = Associations(
    users={name: frozenset({"daemon"}) for name in ("physics", "empty", "co_condo", "later")},
    administrators=frozenset({"root"}),
)
JOB = {
    "jobslurmid": "4711",
    "userid": "1",
    "accountid": "physics",
    "amount": "40.00",
    "jobstatus": "RUNNING",
    "partition": "savio",
    "qos": "normal",
    "submitdate": "2026-03-01T00:00:00Z",
    "startdate": "2026-03-01T01:00:00Z",
    "nodes": [{"name": "n0001.savio1"}],
    "num_cpus": 20,
    "num_alloc_nodes": 1,
}
END = {
    **JOB,
    "jobstatus": "COMPLETING",
    "enddate": "2026-03-01T02:00:00Z",
    "raw_time": 1.0,
    "cpu_time": 20.0,
    "num_req_nodes": 1,
    "amount": "15.50",
}
SERVER = "[bank.mybrc]\nenabled = true\nunlimited_prefixes = ['co_']\n"


class Client:
    """A cluster whose plug-ins speak myBRC."""

    def __init__(self, bank: RestBank, base: str = "/api") -> None:
        self.bank = bank
        self.base = base
        self.staff = self.token(user="root", scope="admin")

    def token(self, **words: Any) -> str:
        secret = self.bank.done("POST", "/v1/tokens", words)["secret"]
        assert isinstance(secret, str)
        return secret

    def ask(self, method: str, path: str, body: Any = None, *, token: str | None = None) -> Answer:
        authorization = f"Token {self.staff if token is None else token}"
        headers = {} if token == "" else {"Authorization": authorization}
        return self.bank.ask(method, self.base + path, body, uid=None, headers=headers)

    def can_submit(self, cost: str, user: str = "1", account: str = "physics") -> tuple[int, bool, str]:
        answer = self.ask("GET", f"/can_submit_job/{cost}/{user}/{account}/")
        assert answer.json.keys() == {"success", "message"}
        return answer.status, answer.json["success"], answer.json["message"]

    def account(self, name: str = "physics") -> tuple[int, int]:
        """Return what is set aside and what is charged."""
        (found,) = queries.balances(self.bank.bank.ledger.store, project=name)
        return found.lien_micro_su, found.spent_micro_su


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with rest_bank(tmp_path, extra=SERVER) as bank:
        bank.slurm.known = PEOPLE
        bank.account("physics", 100 * SU)
        yield Client(bank)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """For questions that change nothing."""
    with rest_bank(tmp_path_factory.mktemp("asked"), extra=SERVER) as bank:
        bank.slurm.known = PEOPLE
        bank.account("physics", 100 * SU)
        bank.account("co_condo")
        bank.done("POST", "/v1/accounts", {"account": "empty"}, key="e")
        bank.done("POST", "/v1/accounts", {"account": "later"}, key="l")
        terms = {"allocation": "later", "starts": "2999-01-01T00:00:00Z"}
        bank.done("POST", "/v1/accounts/later/allocations", terms, key="la")
        yield Client(bank)


CONVERSION = "Encountered exception [<class 'decimal.ConversionSyntax'>] when converting job_cost {} to a decimal."


@pytest.mark.parametrize(
    ("cost", "user", "account", "status", "message"),
    [
        ("100.01", "1", "physics", 200,
         "Adding job_cost 100.01 to account balance 0.00 would exceed account allocation 100.00."),
        ("1.00", "2", "physics", 200, "User bin is not a member of account physics."),
        ("1.00", "1", "empty", 200, "Account empty has no active compute allocation."),
        ("1.00", "1", "later", 200, "Account later has no active compute allocation."),
        ("%20", "1", "physics", 400, "job_cost  is not a nonempty string."),
        ("1", "%20", "physics", 400, "user_id  is not a nonempty string."),
        ("1", "1", "%20", 400, "account_id  is not a nonempty string."),
        ("alphabetic", "1", "physics", 400, CONVERSION.format("alphabetic")),
        ("NaN", "1", "physics", 400, CONVERSION.format("NaN")),
        ("Infinity", "1", "physics", 400, CONVERSION.format("Infinity")),
        ("-0.01", "1", "physics", 400, "job_cost -0.01 is not nonnegative."),
        ("1000000000.00", "1", "physics", 400, "job_cost 1000000000.00 has greater than 11 digits."),
        ("1e400", "1", "physics", 400, "job_cost 1e400 has greater than 11 digits."),
        ("1.000", "1", "physics", 400, "job_cost 1.000 has greater than 2 decimal places."),
        ("1.00", "4294967000", "physics", 400, "No user exists with user_id 4294967000."),
        ("1.00", "root", "physics", 400, "No user exists with user_id root."),
        ("1.00", "1", "ghostly", 400, "No account exists with account_id ghostly."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", ["/api", "/mybrc-rest"])
def test_a_denial_is_200_and_a_malformed_question_is_400_each_in_its_own_words(
    asked: Client, *, base: str, cost: str, user: str, account: str, status: int, message: str
) -> None:
    client = asked
    client.base = base
    assert client.can_submit(cost, user, account) == (status, False, message)
    assert client.account() == (0, 0)


def test_a_condo_may_submit_whatever_it_costs(asked: Client) -> None:
    message = "A job with job_cost 100000000.00 can be submitted."
    assert asked.can_submit("100000000.00", account="co_condo") == (200, True, message)


def test_a_job_that_may_be_submitted_has_its_cost_set_aside(client: Client) -> None:
    assert client.can_submit("100.00") == (200, True, "A job with job_cost 100.00 can be submitted.")
    assert client.account() == (100 * SU, 0)
    message = "Adding job_cost 0.01 to account balance 100.00 would exceed account allocation 100.00."
    assert client.can_submit("0.01") == (200, False, message)


def test_of_fifty_jobs_that_ask_at_once_as_many_pass_as_are_covered(client: Client) -> None:
    async def every() -> list[Answer]:
        path = "/api/can_submit_job/8.00/1/physics/"
        headers = {"Authorization": f"Token {client.staff}"}
        return await asyncio.gather(*(client.bank.ask_async("GET", path, uid=None, headers=headers) for _ in range(50)))

    answers = asyncio.run(every())
    assert [answer.status for answer in answers] == [200] * 50
    assert sum(answer.json["success"] for answer in answers) == 12
    assert client.account() == (96 * SU, 0)


def test_a_users_cap_has_words_of_its_own(client: Client) -> None:
    def cap(amount: int) -> None:
        body = {"user": "daemon", "cap_micro_su": amount, "reason": "x"}
        client.bank.done("POST", "/v1/accounts/physics/cap", body, key=f"cap{amount}")

    cap(10 * SU)
    message = "Adding job_cost 10.01 to user balance 0.00 would exceed user allocation 10.00."
    assert client.can_submit("10.01") == (200, False, message)
    cap(0)
    message = "User daemon is not an active member of the compute allocation for account physics."
    assert client.can_submit("0.01") == (200, False, message)


def test_a_cap_above_the_account_stands_in_the_way_with_its_figures(client: Client) -> None:
    client.bank.done("POST", "/v1/accounts/physics/cap", {"cap_micro_su": 5 * SU, "reason": "x"}, key="cap")
    message = "Adding job_cost 6 to account balance 0.00 would exceed account allocation 5.00."
    assert client.can_submit("6") == (200, False, message)


def test_a_site_may_allow_all_jobs(tmp_path: Path) -> None:
    with rest_bank(tmp_path, extra="[bank.mybrc]\nenabled = true\nallow_all = true") as bank:
        client = Client(bank)
        assert client.can_submit("9", account="ghostly") == (200, True, "A job with job_cost 9 can be submitted.")


def test_a_site_that_does_not_serve_it_has_no_such_address(tmp_path: Path) -> None:
    with rest_bank(tmp_path) as bank:
        assert Client(bank).ask("GET", "/jobs/").status == 404


@pytest.mark.parametrize(("offline", "status"), [("closed", 200), ("hold", 200), ("open", 500)])
def test_a_bank_that_is_away_answers_by_the_sites_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str, status: int
) -> None:
    with rest_bank(tmp_path, extra=f'offline = "{offline}"\n{SERVER}') as bank:
        bank.slurm.known = PEOPLE
        client = Client(bank)
        bank.account("physics", 100 * SU)

        async def away(command: Any) -> Any:
            raise UnreachableError(f"the test ended the ledger: {command.key}")

        monkeypatch.setattr(bank.bank.ledger, "do", away)
        seen, success, message = client.can_submit("1")
        assert (seen, success) == (status, False)
        assert (message == "Unexpected server error.") == (status == 500)


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT"])
def test_other_verbs_are_not_for_a_question(asked: Client, method: str) -> None:
    assert asked.ask(method, "/can_submit_job/1/1/physics/", {}).status == 405


@pytest.mark.parametrize(
    ("token", "detail"),
    [("", "Authentication credentials were not provided."), ("0" * 40, "Invalid token."), ("x", "Invalid token.")],
)
@pytest.mark.parametrize("path", ["/jobs/", "/jobs/1/", "/can_submit_job/1/1/physics/", "/partitions/", "/users/"])
def test_without_a_good_token_nothing_is_told(asked: Client, token: str, detail: str, path: str) -> None:
    answer = asked.ask("GET", path, token=token)
    assert (answer.status, answer.json) == (401, {"detail": detail})


def test_a_revoked_and_an_expired_token_are_invalid_alike(client: Client) -> None:
    made = client.bank.done("POST", "/v1/tokens", {"scope": "admin"})
    client.bank.done("DELETE", f"/v1/tokens/{made['token']['name']}")
    answer = client.ask("GET", "/jobs/", token=made["secret"])
    assert (answer.status, answer.json) == (401, {"detail": "Invalid token."})


def test_a_token_that_reads_reports_nothing_and_asks_for_itself_alone(client: Client) -> None:
    reader = client.token(user="bin")
    detail = {"detail": "You do not have permission to perform this action."}
    for method, path in (("POST", "/jobs/"), ("PUT", "/jobs/4711/"), ("PATCH", "/jobs/4711/")):
        answer = client.ask(method, path, JOB, token=reader)
        assert (answer.status, answer.json) == (403, detail)
    answer = client.ask("GET", "/can_submit_job/1/1/physics/", token=reader)
    assert (answer.status, answer.json) == (403, detail)
    assert client.account() == (0, 0)


def test_another_users_jobs_are_not_there(client: Client) -> None:
    assert client.ask("POST", "/jobs/", JOB).status == 201
    stranger, own = client.token(user="bin"), client.token(user="daemon")
    hidden, absent = client.ask("GET", "/jobs/4711/", token=stranger), client.ask("GET", "/jobs/9/", token=stranger)
    assert (hidden.status, hidden.text) == (absent.status, absent.text) == (404, '{"detail":"Not found."}')
    assert client.ask("GET", "/jobs/?start_time=0", token=stranger).json["count"] == 0
    assert client.ask("GET", "/jobs/?start_time=0&user=daemon", token=stranger).json["count"] == 0
    assert client.ask("GET", "/jobs/?start_time=0", token=own).json["count"] == 1
    assert client.ask("GET", "/projects/", token=stranger).json["results"] == []
    assert client.ask("GET", "/users/", token=own).json["results"] == [{"username": "daemon", "email": ""}]


def test_a_password_is_a_token_and_gives_one_for_a_day(client: Client) -> None:
    def login(**words: str) -> Answer:
        return client.bank.ask("POST", "/api/api_token_auth/", words, uid=None)

    password = client.token(user="daemon")
    answer = login(username="daemon", password=password)
    assert answer.status == 200
    assert client.ask("GET", "/jobs/", token=answer.json["token"]).status == 200
    assert login(username="bin", password=password).status == 400
    assert login(username="daemon", password="wrong").status == 400  # a wrong one
    unknown = login(username="nobody-known", password=password)
    assert (unknown.status, unknown.json) == (200, {"error": "No user exists with username nobody-known."})
    assert login(username="daemon").json == {"password": ["This field is required."]}


def test_a_job_that_started_takes_the_lien_of_its_question_and_pays_at_its_end(client: Client) -> None:
    client.can_submit("40.00")
    answer = client.ask("POST", "/jobs/", JOB)
    assert (answer.status, answer.json["amount"]) == (201, "40.00")
    assert client.account() == (40 * SU, 0), "one lien, not two"
    answer = client.ask("PUT", "/jobs/4711/", END)
    assert (answer.status, answer.json["amount"], answer.json["cpu_time"]) == (200, "15.50", 20.0)
    assert client.account() == (0, 15_500_000)


def test_the_same_report_again_changes_nothing(client: Client) -> None:
    first = client.ask("POST", "/jobs/", JOB)
    written = client.bank.written()
    again = client.ask("POST", "/jobs/", JOB)
    assert (again.status, again.json) == (first.status, first.json)
    assert client.bank.written() == written
    ended = client.ask("PUT", "/jobs/4711/", END)
    written = client.bank.written()
    assert client.ask("PUT", "/jobs/4711/", END).json == ended.json
    # A start that comes late is no start.
    assert client.ask("POST", "/jobs/", JOB).json["amount"] == "15.50"
    assert client.bank.written() == written


def test_a_job_that_waited_longer_than_its_lien_is_covered_at_its_start_all_the_same(client: Client) -> None:
    costly = {**JOB, "amount": "140.00"}
    assert client.ask("POST", "/jobs/", costly).status == 201
    assert client.account() == (140 * SU, 0)
    assert client.ask("PUT", "/jobs/4711/", END).status == 200
    assert client.account() == (0, 15_500_000)


def test_an_end_without_a_start_is_charged(client: Client) -> None:
    assert client.ask("PUT", "/jobs/4711/", END).status == 200
    assert client.account() == (0, 15_500_000)


def test_a_second_run_of_a_job_is_charged_beside_the_first(client: Client) -> None:
    client.ask("POST", "/jobs/", JOB)
    client.ask("PUT", "/jobs/4711/", END)
    again = {"startdate": "2026-03-02T01:00:00Z", "enddate": "2026-03-02T02:00:00Z"}
    client.ask("POST", "/jobs/", {**JOB, "startdate": again["startdate"]})
    assert client.account() == (40 * SU, 15_500_000)
    assert client.ask("PUT", "/jobs/4711/", {**END, **again, "amount": "4.50"}).json["amount"] == "20.00"
    assert client.account() == (0, 20 * SU)


def test_another_amount_for_an_ended_job_corrects_it_as_often_as_it_is_said(client: Client) -> None:
    for amount in ("15.50", "9.00", "15.50", "9.00"):
        assert client.ask("PUT", "/jobs/4711/", {**END, "amount": amount}).json["amount"] == amount
    assert client.account() == (0, 9 * SU)


def test_a_running_job_may_be_priced_anew(client: Client) -> None:
    for amount in ("40.00", "60.00", "40.00", "60.00"):
        assert client.ask("PUT", "/jobs/4711/", {**JOB, "amount": amount}).status == 200
    assert client.account() == (60 * SU, 0)


@pytest.mark.parametrize("status", ["COMPLETED", "COMPLETING", "FAILED COMPLETING", "CANCELLED by 0", "TIMEOUT"])
def test_a_job_has_ended_when_its_status_says_so(client: Client, status: str) -> None:
    client.ask("POST", "/jobs/", JOB)
    client.ask("PUT", "/jobs/4711/", {**JOB, "jobstatus": status, "amount": "3.00"})
    assert client.account() == (0, 3 * SU)


def test_an_end_without_an_amount_leaves_what_was_set_aside_as_the_charge(client: Client) -> None:
    client.ask("POST", "/jobs/", JOB)
    client.ask("PUT", "/jobs/4711/", {name: value for name, value in END.items() if name != "amount"})
    assert client.account() == (0, 40 * SU)


def test_a_job_without_a_start_is_kept_and_moves_no_money(client: Client) -> None:
    waiting = {name: value for name, value in JOB.items() if name != "startdate"}
    assert client.ask("POST", "/jobs/", waiting).status == 201
    assert client.account() == (0, 0)
    assert client.ask("GET", "/jobs/4711/").json["partition"] == "savio"


def test_nodes_are_added_and_never_removed(client: Client) -> None:
    client.ask("POST", "/jobs/", JOB)
    more = {**JOB, "nodes": [{"name": "n0002.savio1"}]}
    names = [node["name"] for node in client.ask("PUT", "/jobs/4711/", more).json["nodes"]]
    assert names == ["n0001.savio1", "n0002.savio1"]


def test_a_job_cannot_go_to_another_account_or_user(client: Client) -> None:
    client.bank.account("biology", 5 * SU)
    client.ask("POST", "/jobs/", JOB)
    answer = client.ask("PUT", "/jobs/4711/", {**END, "accountid": "biology", "userid": "2"})
    assert (answer.status, set(answer.json)) == (400, {"accountid", "userid"})
    assert client.account() == (40 * SU, 0)


def test_a_patch_says_that_it_is_not_supported(asked: Client) -> None:
    answer = asked.ask("PATCH", "/jobs/4711/", {"amount": "1"})
    assert (answer.status, answer.json) == (200, {"failure": "This method is not supported."})


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"jobslurmid": None}, "jobslurmid", "Not a valid string."),
        ({"jobslurmid": ""}, "jobslurmid", "This field may not be blank."),
        ({"jobslurmid": "1" * 151}, "jobslurmid", "Ensure this field has no more than 150 characters."),
        ({"userid": "root"}, "userid", "Enter a valid value."),
        ({"userid": "4294967000"}, "userid", "No user exists with user_id 4294967000."),
        ({"accountid": "ghostly"}, "accountid", "there is no account 'ghostly'; see: carrel account list"),
        ({"amount": None}, "amount", "A valid number is required."),
        ({"amount": "NaN"}, "amount", "A valid number is required."),
        ({"amount": "ten"}, "amount", "A valid number is required."),
        ({"amount": "-1"}, "amount", "Ensure this value is greater than or equal to 0."),
        ({"amount": "1.001"}, "amount", "Ensure that there are no more than 2 decimal places."),
        ({"amount": "123456789012"}, "amount", "Ensure that there are no more than 11 digits in total."),
        ({"amount": 9223372036854775808}, "amount", "Ensure that there are no more than 11 digits in total."),
        ({"amount": "100000000.01"}, "amount", "Ensure this value is less than or equal to 100000000."),
        ({"startdate": "soon"}, "startdate", "Datetime has wrong format."),
        ({"startdate": 7}, "startdate", "Datetime has wrong format."),
        ({"jobstatus": "x" * 51}, "jobstatus", "Ensure this field has no more than 50 characters."),
        ({"partition": "a\0b"}, "partition", "Null characters are not allowed."),
        ({"nodes": "n1"}, "nodes", "Expected a list of items."),
        ({"nodes": [{"name": "n" * 31}]}, "nodes", "Ensure this field has no more than 30 characters."),
        ({"nodes": ["n1"]}, "nodes", "Not a valid string."),
        ({"num_cpus": "four"}, "num_cpus", "A valid integer is required."),
        ({"num_cpus": 2**31}, "num_cpus", "A valid integer is required."),
        ({"raw_time": "long"}, "raw_time", "A valid number is required."),
        ({"enddate": "2026-01-01T00:00:00Z"}, "non_field_errors", "must be in order"),
        ({"submitdate": "2026-04-01T00:00:00Z"}, "non_field_errors", "must be in order"),
    ],
)
def test_a_job_that_is_none_is_400_with_the_field(
    asked: Client, change: dict[str, Any], field: str, sentence: str
) -> None:
    written = asked.bank.written()
    answer = asked.ask("POST", "/jobs/", {**JOB, **change})
    assert answer.status == 400, answer.text
    assert sentence in answer.json[field][0]
    assert asked.bank.written() == written


@pytest.mark.parametrize("body", ["[]", "7", '"x"'])
def test_a_body_that_is_no_object_is_400(asked: Client, body: str) -> None:
    answer = asked.ask("POST", "/jobs/", body)
    assert (answer.status, "Expected a dictionary" in answer.text) == (400, True)


def test_what_is_required_is_said_for_each_field(asked: Client) -> None:
    answer = asked.ask("POST", "/jobs/", {})
    required = ["This field is required."]
    assert answer.json == dict.fromkeys(("jobslurmid", "userid", "accountid"), required)


def test_jobs_are_listed_by_their_start_in_pages_of_a_hundred_with_their_sums(client: Client) -> None:
    client.bank.account("biology", 5 * SU)
    for number in range(103):
        start = f"2026-03-01T{number // 60:02}:{number % 60:02}:00Z"
        odd = {"amount": "0.50", "cpu_time": 2.5, "jobslurmid": str(number), "startdate": start,
               "enddate": "2026-03-02T00:00:00Z", "accountid": "biology" if number == 7 else "physics",
               "partition": "gpu" if number % 2 else "savio"}  # fmt: skip
        assert client.ask("PUT", f"/jobs/{number}/", {**END, **odd}).status == 200
    first = client.ask("GET", "/jobs/?start_time=0").json
    assert (first["count"], len(first["results"]), first["previous"]) == (103, 100, None)
    assert (first["total_amount"], first["total_cpu_time"]) == ("51.50", "257.50")
    assert [job["jobslurmid"] for job in first["results"][:3]] == ["0", "1", "2"]
    second = client.ask("GET", first["next"].removeprefix("/api")).json
    assert (len(second["results"]), second["next"]) == (3, None)
    assert client.ask("GET", "/jobs/?start_time=0&page=3").json == {"detail": "Invalid page."}

    def count(query: str) -> Any:
        return client.ask("GET", f"/jobs/?start_time=0&{query}").json["count"]

    narrowed = [count(q) for q in ("account=biology", "user=daemon", "user=bin", "partition=gpu", "jobstatus=RUNNING",
                                   "min_amount=0.51", "max_amount=0.50", "end_time=1772323260")]  # fmt: skip
    assert narrowed == [1, 103, 0, 51, 0, 0, 103, 1]


@pytest.mark.parametrize("query", ["min_amount=x", "start_time=soon", "page=-1", "end_time=99999999999999999999"])
def test_a_filter_that_is_no_number_is_400(asked: Client, query: str) -> None:
    assert asked.ask("GET", f"/jobs/?{query}").status == 400


def test_allocations_and_projects_are_listed_for_the_usage_scripts(client: Client) -> None:
    client.ask("PUT", "/jobs/4711/", END)
    (allocation,) = client.ask("GET", "/allocations/?project=physics").json["results"]
    assert (allocation["status"], allocation["value"], allocation["usage"]) == ("Active", "100.00", "15.50")
    assert client.ask("GET", "/projects/").json["results"] == [{"id": 1, "name": "physics"}]
    names = [one["username"] for one in client.ask("GET", "/users/?username=daemon").json["results"]]
    assert names == ["daemon"]
