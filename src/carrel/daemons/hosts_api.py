"""The part of carrelctld's REST API that is about hosts. Everybody may look; only administrators change anything."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from litestar import Request, delete, get, post, put
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT

from carrel.daemons.board import EVERYBODY
from carrel.daemons.hosts import Drained, HostDesk, HostView, HostWish
from carrel.errors import NotFoundError, RefusedError
from carrel.model.host import Answer, Demand

AnyRequest = Request[Any, Any, Any]


@get("/v1/hosts", summary="Hosts of guests that are Slurm nodes, in the order of the policy first")
async def list_hosts(request: AnyRequest) -> list[HostView]:
    return await _views(request)


@get("/v1/hosts/{name:str}", summary="One host")
async def show_host(request: AnyRequest, name: FromPath[str]) -> HostView:
    for view in await _views(request):
        if view.name == name:
            return view
    raise NotFoundError(f"no host {name!r}; see: carrel host list")


@post("/v1/hosts", status_code=HTTP_204_NO_CONTENT, summary="Add a host, or change what it has")
async def add_host(request: AnyRequest, data: JSONBody[HostWish]) -> None:
    await _change(request, lambda desk: desk.add(data))


@delete("/v1/hosts/{name:str}", summary="Forget a host that carries no guest")
async def remove_host(request: AnyRequest, name: FromPath[str]) -> None:
    await _change(request, lambda desk: desk.admission.table.remove(name))


@put("/v1/hosts/{name:str}/state", status_code=HTTP_204_NO_CONTENT, summary="Drain a host, or let it have guests again")
async def set_host_state(request: AnyRequest, name: FromPath[str], data: JSONBody[Drained]) -> None:
    if data.drained:
        await _change(request, lambda desk: desk.admission.table.drain(name, data.reason))
    else:
        await _change(request, lambda desk: desk.admission.table.undrain(name))


@post("/v1/hosts/refresh", status_code=HTTP_204_NO_CONTENT, summary="Read anew what hosts have; a name: that one")
async def refresh_hosts(request: AnyRequest, name: FromQuery[str] = "") -> None:
    await _change(request, lambda desk: desk.refresh(name))


@get("/v1/placement", status_code=HTTP_200_OK, summary="Where such guests would go now; nothing is taken")
async def query_placement(
    request: AnyRequest,
    cpus: FromQuery[int],
    memory_bytes: FromQuery[int],
    count: FromQuery[int] = 1,
    apart: FromQuery[bool] = False,
) -> Answer:
    await _caller(request)
    try:
        demand = Demand(cpus=cpus, memory_bytes=memory_bytes, count=count, apart=apart)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return await asyncio.to_thread(_desk(request).query, demand)


HANDLERS = (list_hosts, show_host, add_host, remove_host, set_host_state, refresh_hosts, query_placement)


async def _views(request: AnyRequest) -> list[HostView]:
    everything = await _caller(request) == EVERYBODY
    return await asyncio.to_thread(_desk(request).views, with_places=everything)


async def _change(request: AnyRequest, deed: Callable[[HostDesk], None]) -> None:
    if await _caller(request) != EVERYBODY:
        raise RefusedError("only an administrator changes hosts")
    await asyncio.to_thread(deed, _desk(request))


def _desk(request: AnyRequest) -> HostDesk:
    desk: HostDesk = request.app.state.service.hosts
    return desk


async def _caller(request: AnyRequest) -> int:
    caller: Callable[[AnyRequest], Awaitable[int]] = request.app.state.service.caller
    return await caller(request)
