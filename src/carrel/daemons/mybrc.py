"""The myBRC API, for clusters whose plug-ins speak it: below ``/api`` and, as in its first generation, ``/mybrc-rest``.

Statuses, fields and texts are that API's own, since its clients look for them; our own API has better ones.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlencode

from litestar import Request, Response, Router, get, patch, post, put
from litestar.exceptions import HTTPException
from litestar.params import FromPath

from carrel.bank import mybrc_jobs, queries
from carrel.bank.mybrc_jobs import Wanted
from carrel.core import mybrc
from carrel.core.mybrc import BadJobError
from carrel.core.pricing import hourly
from carrel.daemons.bank_views import AccountView
from carrel.daemons.callers import uid_named, without_nul
from carrel.daemons.desk import Desk
from carrel.daemons.mybrc_desk import MybrcDesk, user_of
from carrel.errors import CarrelError, UnreachableError, UsageError
from carrel.model.access import Person
from carrel.model.money import MICRO_SU_PER_SU

AnyRequest = Request[Any, Any, Any]
Json = Response[Any]
SCHEME = "Token "
TOKEN_TTL_S = 86400
"""What a token lives that was had for a password."""
PAGE_MAX = 2**31
_HOUR_MS = 3_600_000
BASES = ("/api", "/mybrc-rest")


class _At(NamedTuple):
    """The desk, and who stands before it."""

    mybrc: MybrcDesk
    person: Person

    @property
    def desk(self) -> Desk:
        return self.mybrc.desk


class _Denied(Exception):  # noqa: N818  # an answer on its way
    """An answer that ends the request."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(body)
        self.status = status
        self.body = body


def _found(request: AnyRequest) -> MybrcDesk:
    desk: MybrcDesk | None = request.app.state.mybrc
    if desk is None:
        raise _Denied(404, {"detail": "Not found."})
    return desk


async def _met(request: AnyRequest, *, writes: bool = False) -> _At:
    found = _found(request)
    try:
        without_nul(request)
    except UsageError as error:
        raise _Denied(400, {"detail": str(error)}) from error
    authorization = request.headers.get("authorization", "")
    if not authorization.startswith(SCHEME):
        raise _Denied(401, {"detail": "Authentication credentials were not provided."})
    try:
        person = await found.desk.callers.bearer(authorization.removeprefix(SCHEME).strip())
    except HTTPException:
        raise _Denied(401, {"detail": "Invalid token."}) from None
    if writes and not person.writes:
        raise _Denied(403, {"detail": "You do not have permission to perform this action."})
    return _At(found, person)


async def _body(request: AnyRequest) -> Any:
    try:
        return await request.json()
    except HTTPException:
        raise _Denied(400, {"detail": "JSON parse error."}) from None


@post("/api_token_auth", status_code=200)
async def api_token_auth(request: AnyRequest) -> Json:
    """Give a token of a day for a password, which is a token of the user's: passwords are not ours to know."""
    found = _found(request)
    given = await _body(request)
    words = given if isinstance(given, dict) else {}
    missing = {name: ["This field is required."] for name in ("username", "password") if not words.get(name)}
    if missing:
        return Response(missing, status_code=400)
    user, password = str(words["username"]), str(words["password"])
    if uid_named(user) is None:
        return Response({"error": f"No user exists with username {user}."}, status_code=200)
    tokens = found.desk.callers.tokens
    known = await found.desk.read(lambda _: tokens.find(password))
    if known is None or known.user != user:
        return Response({"non_field_errors": ["Unable to log in with provided credentials."]}, status_code=400)
    made = await found.desk.read(
        lambda _: tokens.add(user=user, scope=known.scope, ttl_s=TOKEN_TTL_S, note=f"for {known.name}")
    )
    return Response({"token": made[1]}, status_code=200)


@get("/can_submit_job/{job_cost:str}/{user_id:str}/{account_id:str}")
async def can_submit_job(
    request: AnyRequest, job_cost: FromPath[str], user_id: FromPath[str], account_id: FromPath[str]
) -> Json:
    at = await _met(request)
    if not at.person.writes and user_of(user_id) != at.person.user:
        raise _Denied(403, {"detail": "You do not have permission to perform this action."})
    try:
        decision = await at.mybrc.can_submit(at.person, job_cost, user_id, account_id)
    except UnreachableError:
        # The plug-ins take a failure for yes: so it is one only where the site chose to let jobs through.
        if at.desk.bank.settings.offline == "open":
            return Response({"success": False, "message": mybrc.SERVER_ERROR}, status_code=500)
        return Response({"success": False, "message": "The bank does not answer; try again later."}, status_code=200)
    body = {"success": decision.success, "message": decision.message}
    return Response(body, status_code=decision.status)


@get("/jobs")
async def list_jobs(request: AnyRequest) -> Json:
    at = await _met(request)
    query = dict(request.query_params)
    number, wanted = _wanted(query, at)
    page = await at.desk.read(mybrc_jobs.page, wanted=wanted, number=number)
    if number > 1 and not page.records:
        raise _Denied(404, {"detail": "Invalid page."})
    here = request.url.path
    more = number * mybrc_jobs.PAGE < page.count
    return Response(
        {
            "count": page.count,
            "next": _page_url(here, query, number + 1) if more else None,
            "previous": _page_url(here, query, number - 1) if number > 1 else None,
            "results": [mybrc.shown(one.job, one.amount_micro_su) for one in page.records],
            "total_amount": mybrc.decimal_text(page.amount_micro_su),
            "total_cpu_time": f"{Decimal(page.cpu_ms) / _HOUR_MS:.2f}",
        },
        status_code=200,
    )


@get("/jobs/{jobslurmid:str}")
async def show_job(request: AnyRequest, jobslurmid: FromPath[str]) -> Json:
    at = await _met(request)
    record = await at.desk.read(mybrc_jobs.find, jobslurmid=jobslurmid)
    if record is None or not (record.user == at.person.user or at.person.reads(record.job.accountid)):
        raise _Denied(404, {"detail": "Not found."})
    return Response(mybrc.shown(record.job, record.amount_micro_su), status_code=200)


@post("/jobs")
async def post_job(request: AnyRequest) -> Json:
    return await _report(request, "", 201)


@put("/jobs/{jobslurmid:str}")
async def put_job(request: AnyRequest, jobslurmid: FromPath[str]) -> Json:
    return await _report(request, jobslurmid, 200)


@patch("/jobs/{jobslurmid:str}")
async def patch_job(request: AnyRequest, jobslurmid: FromPath[str]) -> Json:  # noqa: ARG001  # the route's
    await _met(request, writes=True)
    return Response({"failure": mybrc.UNSUPPORTED}, status_code=200)


async def _report(request: AnyRequest, jobslurmid: str, status: int) -> Json:
    at = await _met(request, writes=True)
    try:
        said = mybrc.job(await _body(request), jobslurmid=jobslurmid)
        record = await at.mybrc.report(at.person, said)
    except BadJobError as error:
        return Response(error.errors, status_code=400)
    return Response(mybrc.shown(record.job, record.amount_micro_su), status_code=status)


@get("/partitions")
async def list_partitions(request: AnyRequest) -> Json:
    at = await _met(request)
    version = at.desk.bank.book.at(datetime.now(UTC))
    rows = []
    for name, facts in at.desk.bank.cluster.partitions.items():
        listed = version.list_of(name) if version else None
        rate = hourly({"cpu": 1}, listed.rates, listed.mode) / MICRO_SU_PER_SU if listed else None
        rows.append(
            {
                "name": name,
                "shared": not facts.exclusive,
                "num_nodes": len(facts.nodes),
                "num_cores": sum(node.cpus for node in facts.nodes),
                "su_per_core_hour": None if rate is None else f"{float(rate):.2f}",
            }
        )
    return _listed(rows)


@get("/users")
async def list_users(request: AnyRequest) -> Json:
    at = await _met(request)
    budgets = await at.desk.read(queries.budgets)
    slurm = at.person.associations
    names = {one.user for one in budgets if one.user} | {
        user for users in (slurm.users.values() if slurm else ()) for user in users
    }
    asked = request.query_params.get("username", "")
    seen = names if at.person.sees_all else names & {at.person.user}
    return _listed([{"username": name, "email": ""} for name in sorted(seen) if asked in ("", name)])


@get("/projects")
async def list_projects(request: AnyRequest) -> Json:
    at = await _met(request)
    accounts = await at.desk.accounts(at.person)
    return _listed([{"id": number, "name": one.name} for number, one in enumerate(accounts, 1)])


@get("/allocations")
async def list_allocations(request: AnyRequest) -> Json:
    at = await _met(request)
    asked = request.query_params.get("project", "")
    return _listed([_allocation(one) for one in await at.desk.accounts(at.person) if asked in ("", one.name)])


def create() -> list[Router]:
    """Return the routes; they look for the ``MybrcDesk`` in ``app.state.mybrc``, None where the API is off."""
    handlers = [
        *(api_token_auth, can_submit_job, list_jobs, show_job, post_job, put_job, patch_job),
        *(list_partitions, list_users, list_projects, list_allocations),
    ]
    return [
        Router(
            path=base,
            route_handlers=list(handlers),
            exception_handlers={_Denied: _denied, CarrelError: _failed},
            include_in_schema=False,
        )
        for base in BASES
    ]


def _denied(_request: AnyRequest, error: _Denied) -> Json:
    return Response(error.body, status_code=error.status)


def _failed(_request: AnyRequest, error: CarrelError) -> Json:
    return Response({"detail": f"{mybrc.SERVER_ERROR} {error}"}, status_code=500)


def _allocation(one: AccountView) -> dict[str, Any]:
    valid = [each for each in one.allocations if each.state == "valid"]
    given = sum(
        each.settled_micro_su + each.running_micro_su + each.committed_micro_su + each.available_micro_su
        for each in valid
    )
    return {
        "project": one.name,
        "resources": [],
        "status": "Active" if valid else "Expired",
        "quantity": 1,
        "value": mybrc.decimal_text(given),
        "usage": mybrc.decimal_text(one.settled_micro_su + one.running_micro_su + one.committed_micro_su),
        "start_date": min((str(each.starts.date()) for each in valid if each.starts), default=None),
        "end_date": max((str(each.ends.date()) for each in valid if each.ends), default=None),
        "is_locked": False,
    }


def _listed(rows: list[dict[str, Any]]) -> Json:
    return Response({"count": len(rows), "next": None, "previous": None, "results": rows}, status_code=200)


def _wanted(query: dict[str, str], at: _At) -> tuple[int, Wanted]:
    """Read the filters of a list of jobs; one that is no number is named."""
    errors: dict[str, list[str]] = {}

    def number(name: str, default: int, most: int = 2**40) -> int:
        text = query.get(name, "")
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or int(text[:20]) > most:
            errors[name] = ["A valid integer is required."]
            return default
        return int(text)

    def money(name: str, default: int) -> int:
        try:
            return mybrc.cost(query[name]) if query.get(name) else default
        except mybrc.BadCostError:
            errors[name] = ["A valid number is required."]
            return default

    user, asked = query.get("user", ""), "start_time" in query or "end_time" in query
    if not at.person.sees_all and not at.person.reads(query.get("account", "")):
        user = at.person.user if user in ("", at.person.user) else "?"
    wanted = Wanted(
        user=user,
        account=query.get("account", ""),
        status=query.get("jobstatus", ""),
        partition=query.get("partition", ""),
        least_micro_su=money("min_amount", 0),
        most_micro_su=money("max_amount", 2**62),
        start_s=number("start_time", 0 if asked else _year_start(at.mybrc.settings.year_begins)),
        end_s=number("end_time", 2**62, 2**62),
    )
    page = number("page", 1, PAGE_MAX)
    if errors:
        raise _Denied(400, errors)
    return max(1, page), wanted


def _year_start(begins: str) -> int:
    """Return when the allowance year began that we are in."""
    now = datetime.now(UTC)
    month, day = (int(part) for part in begins.split("-"))
    start = datetime(now.year, month, day, tzinfo=UTC)
    return int((start if start <= now else start.replace(year=now.year - 1)).timestamp())


def _page_url(path: str, query: dict[str, str], number: int) -> str:
    return f"{path}?{urlencode({**query, 'page': number})}"
