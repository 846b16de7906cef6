"""carrelctld's REST API. Its OpenAPI description is made from these handlers.

Litestar is imported here and in what is served here (the bank), so that only the controller pays for it.
"""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, get, post
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.status_codes import HTTP_200_OK, HTTP_202_ACCEPTED

from carrel import __version__
from carrel.daemons import bank_api, callers, hosts_api, maps, munge, mybrc, transport, views
from carrel.daemons.banking import Bank
from carrel.daemons.board import EVERYBODY, Board
from carrel.daemons.branch import Branch
from carrel.daemons.desk import Desk
from carrel.daemons.hosts import HostDesk
from carrel.daemons.mybrc_desk import MybrcDesk
from carrel.daemons.wishes import Wishes
from carrel.errors import CarrelError, NotFoundError, RefusedError, UnreachableError, UsageError
from carrel.model.guestnode import HostReport, Orders
from carrel.model.report import NodeReport, ReportAnswer

REQUEST_MAX_BYTES = 16 * 2**20
"""Read before anybody knows who asks: over TCP the credential is for the body, too. A batch of commands takes 4 MiB."""

_LOG = logging.getLogger("carrelctld")
AnyRequest = Request[Any, Any, Any]

_STATUS = {NotFoundError: 404, RefusedError: 403, UsageError: 400, UnreachableError: 503}


class Service:
    """What the handlers work on."""

    def __init__(
        self,
        *,
        board: Board,
        trusted: frozenset[int],
        addresses: Callable[[], Awaitable[dict[str, str]]],
        changed: Callable[[], None],
        silent_after_s: float,
        munge_socket: str,
        hosts: HostDesk,
        exchange: Callable[[HostReport, str], Awaitable[Orders]] | None = None,
        bank: Bank | None = None,
        branch: Branch | None = None,
        guest_nodes: Callable[[], views.GuestNodesHealth | None] = lambda: None,
    ) -> None:
        """Keep what ``create`` was given.

        Args:
            board: What the nodes reported.
            trusted: Uids that may report and see everything.
            addresses: Node name to address; empty where Slurm cannot tell.
            changed: Called when guests changed.
            silent_after_s: A node that was not heard for so long is shown as silent.
            munge_socket: Munge's socket; empty: its own default.
            hosts: The hosts of guests-as-nodes.
            exchange: Takes what a host says of itself, and returns what it shall carry; None: there are no hosts.
            bank: The ledger and the prices; None: this site runs no bank.
            branch: What works on that bank: its rounds, and what they could not charge.
            guest_nodes: Returns how it goes with guests that are nodes; None: there are no hosts.
        """
        self.name = secrets.token_hex(8)
        self.board = board
        self.trusted = trusted
        self.addresses = addresses
        self.changed = changed
        self.silent_after_s = silent_after_s
        self.munge_socket = munge_socket
        self.wishes = Wishes()
        self.hosts = hosts
        self.exchange = exchange
        self.bank = bank
        self.branch = branch
        self.guest_nodes = guest_nodes
        self.started = datetime.now(UTC)

    async def caller(self, request: AnyRequest) -> int:
        """Return the caller's uid, or EVERYBODY for one that may see and change everything."""
        return await _caller(request)

    def node_views(self) -> list[views.NodeView]:
        now_s = time.time()
        return [
            views.node_view(heard.report, heard_s=heard.at_s, silent=now_s - heard.at_s > self.silent_after_s)
            for _, heard in sorted(self.board.nodes.items())
        ]


async def _caller(request: AnyRequest) -> int:
    """Return the caller's uid, or EVERYBODY for one that may see everything."""
    service: Service = request.app.state.service
    uid = await callers.uid_of(request, munge_socket=service.munge_socket)
    return EVERYBODY if uid in service.trusted else uid


@post("/v1/reports", status_code=HTTP_202_ACCEPTED, summary="Take a node's whole state, in place of its last one")
async def take_report(request: AnyRequest, data: JSONBody[NodeReport]) -> ReportAnswer:
    if await _caller(request) != EVERYBODY:
        raise RefusedError("only root's carreld may report")
    service: Service = request.app.state.service
    if service.board.take(data, now_s=time.time()):
        service.changed()
    return ReportAnswer(controller=service.name, sampling=service.wishes.all(time.time()))


@post(
    "/v1/jobs/{job_id:int}/sampling", status_code=HTTP_202_ACCEPTED, summary="Change how often a running job is sampled"
)
async def wish_sampling(request: AnyRequest, job_id: FromPath[int], data: JSONBody[views.Sampling]) -> None:
    uid = await _caller(request)
    service: Service = request.app.state.service
    service.wishes.add(job_id=job_id, every_s=data.every_s, uid=0 if uid == EVERYBODY else uid, now_s=time.time())


@post(
    "/v1/hosts/{name:str}/report",
    status_code=HTTP_200_OK,
    summary="Take what a host of guests-as-nodes says of itself; the answer, what it shall carry, waits for a change",
)
async def host_report(
    request: AnyRequest, name: FromPath[str], data: JSONBody[HostReport], digest: FromQuery[str] = ""
) -> Response[Orders]:
    if await _caller(request) != EVERYBODY:
        raise RefusedError("only root's carreld may speak for a host")
    service: Service = request.app.state.service
    if service.exchange is None or data.host != name:
        raise NotFoundError(f"{name!r} is not among guest_nodes.hosts of this controller's configuration")
    orders = await service.exchange(data, digest)
    question = request.headers.get("authorization", "")
    if not question.startswith(munge.SCHEME):
        return Response(orders)  # on the unix socket, whose directory is root's
    body = msgspec.json.encode(orders)
    credential = await munge.sign_answer(question, body, socket=service.munge_socket)
    # What was signed goes out letter by letter.
    return Response(body, media_type=MediaType.JSON, headers={transport.CREDENTIAL: credential})  # type: ignore[arg-type]


@get("/v1/guests", summary="Guests that the caller may see")
async def list_guests(request: AnyRequest, job: FromQuery[int | None] = None) -> list[views.GuestView]:
    uid = await _caller(request)
    found = request.app.state.service.board.known(uid=uid, job_id=job)
    return [views.guest_view(guest, counters, host=host) for guest, host, counters in found]


@get("/v1/guests/{name:str}", summary="The guests of this name: one on each of the job's nodes")
async def show_guest(request: AnyRequest, name: FromPath[str]) -> list[views.GuestView]:
    uid = await _caller(request)
    found = request.app.state.service.board.known(uid=uid, name=name)
    if not found:
        raise NotFoundError(f"no guest {name!r}; see: carrel guest list")
    return [views.guest_view(guest, counters, host=host) for guest, host, counters in found]


@get("/v1/nodes", summary="Nodes that have reported")
async def list_nodes(request: AnyRequest) -> list[views.NodeView]:
    await _caller(request)
    service: Service = request.app.state.service
    return service.node_views()


@get("/v1/nodes/{name:str}", summary="One node")
async def show_node(request: AnyRequest, name: FromPath[str]) -> views.NodeView:
    await _caller(request)
    service: Service = request.app.state.service
    for view in service.node_views():
        if view.node == name:
            return view
    raise NotFoundError(f"node {name!r} has not reported; does its carreld run? see: carrel node list")


@get("/v1/jobs/{job_id:int}/events", summary="What happened to a job, oldest first; 0: to the nodes themselves")
async def job_events(request: AnyRequest, job_id: FromPath[int]) -> list[views.EventView]:
    uid = await _caller(request)
    return [views.event_view(event) for event in request.app.state.service.board.events(job_id, uid=uid)]


@get("/v1/jobs/{job_id:int}/map", summary="The slot map of a job's guests")
async def job_map(request: AnyRequest, job_id: FromPath[int]) -> list[views.Slot]:
    uid = await _caller(request)
    service: Service = request.app.state.service
    found = service.board.guests(uid=uid, job_id=job_id)
    if not found:
        raise NotFoundError(f"job {job_id} has no guests; see: carrel job show {job_id}")
    return maps.slots(found, await service.addresses())


@get("/v1/consoles/{guest:str}", summary="The end of the consoles of the guests of this name")
async def consoles(request: AnyRequest, guest: FromPath[str], node: FromQuery[str] = "") -> list[views.Console]:
    uid = await _caller(request)
    held = request.app.state.service.board.consoles(guest, uid=uid)
    found = [views.Console(guest=guest, node=where, text=text) for where, text in held if node in ("", where)]
    if not found:
        raise NotFoundError(f"no console of guest {guest!r} is held; see: carrel guest list")
    return found


@get("/v1/health", summary="That the controller runs")
async def health(request: AnyRequest) -> views.Health:
    service: Service = request.app.state.service
    return views.Health(
        version=__version__,
        started=service.started,
        nodes=len(service.board.nodes),
        guests=len(service.board.guests()),
        guest_nodes=service.guest_nodes(),
    )


def create(service: Service) -> Litestar:
    """Return the application for ``service``."""
    app = Litestar(
        route_handlers=[
            take_report,
            host_report,
            list_guests,
            show_guest,
            list_nodes,
            show_node,
            job_events,
            job_map,
            wish_sampling,
            consoles,
            health,
            *hosts_api.HANDLERS,
            bank_api.create(),
            *mybrc.create(),
        ],
        openapi_config=OpenAPIConfig(title="carrelctld", version=__version__, path="/v1/schema", render_plugins=[]),
        exception_handlers={CarrelError: _sentence, HTTPException: _http_sentence, Exception: _our_fault},
        logging_config=None,  # the daemon's own
        request_max_body_size=REQUEST_MAX_BYTES,
    )
    app.state.service = service
    app.state.desk = app.state.mybrc = None
    if service.bank is not None:
        app.state.desk = Desk(service.bank, service.branch, trusted=service.trusted, munge_socket=service.munge_socket)
        if service.bank.settings.mybrc.enabled:
            app.state.mybrc = MybrcDesk(app.state.desk)
    return app


def _sentence(_request: AnyRequest, error: CarrelError) -> Response[views.ErrorView]:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return Response(views.ErrorView(error=str(error)), status_code=status)


def _http_sentence(_request: AnyRequest, error: HTTPException) -> Response[views.ErrorView]:
    return Response(
        views.ErrorView(error=_with_places(error)), status_code=error.status_code, headers=error.headers or {}
    )


def _our_fault(request: AnyRequest, error: Exception) -> Response[views.ErrorView]:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Response(views.ErrorView(error="carrelctld failed at this; its log says how"), status_code=500)


def _with_places(error: HTTPException) -> str:
    """Return the sentence, with the fields of the request that it is about."""
    places = [f"{found.get('key', '')}: {found['message']}" for found in _found(error)]
    return "; ".join([error.detail, *places]).lower().replace("`", "'")


def _found(error: HTTPException) -> list[dict[str, str]]:
    extra = error.extra if isinstance(error.extra, list) else []
    return [found for found in extra if isinstance(found, dict) and "message" in found]
