"""Where the commands get their facts: carrelctld for the cluster; where it is silent, this machine's carrelds.

A node's own view is less than the cluster's, so the user is told on stderr whenever it stands in.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from carrel import wire
from carrel.cli import output
from carrel.config import Config, this_node
from carrel.daemons import maps, transport, views
from carrel.daemons.hosts import HostView
from carrel.errors import CarrelError, NotFoundError, UnreachableError
from carrel.model.guest import Counters, Guest
from carrel.model.host import Answer, Demand
from carrel.model.report import NodeReport

_T = TypeVar("_T")


def local_nodes(settings: Config) -> list[str]:
    """Return the names of the nodes whose carreld has its directory on this machine; a sandbox has several."""
    before, marker, after = settings.node.dir.partition("{node}")
    if not marker:
        return []
    # The name may be a part of a directory's name, or all of it: /var/spool/carrel-{node}/state.
    parent, _, prefix = before.rpartition("/")
    suffix, _, rest = after.partition("/")
    pattern = f"{prefix}*{suffix}/{rest}".rstrip("/") + "/carreld.sock"
    names = (path.relative_to(parent or "/").parts[0] for path in Path(parent or "/").glob(pattern))
    return sorted(name.removeprefix(prefix).removesuffix(suffix) for name in names)


def nodes_here(settings: Config) -> list[str]:
    """Return the nodes of this machine; where no carreld ever ran, the one that would be here."""
    return local_nodes(settings) or [this_node()]


def ask_node(settings: Config, node: str, verb: str, **words: str) -> Any:
    """Ask the carreld of a node on this machine; its answer as JSON.

    Raises:
        UnreachableError: it does not answer, or the node is not on this machine.
    """
    message = wire.call(settings.node.path(node) / "carreld.sock", {"verb": verb, **words})
    return wire.answer(message)


def guests(settings: Config, *, job_id: int | None = None) -> list[views.GuestView]:
    """Return the guests that the caller may see.

    Raises:
        UnreachableError: neither carrelctld nor a carreld of this machine answers.
    """
    path = "/v1/guests" if job_id is None else f"/v1/guests?job={job_id}"
    found = _ask(settings, path, list[views.GuestView], lambda: _local_guests(settings))
    return [guest for guest in found if job_id is None or guest.job_id == job_id]


def nodes(settings: Config) -> list[views.NodeView]:
    """Return the nodes that carrelctld has heard of, or those of this machine."""
    return _ask(
        settings,
        "/v1/nodes",
        list[views.NodeView],
        lambda: [views.node_view(report, heard_s=report.sent_s, silent=False) for report in _local_reports(settings)],
    )


def events(settings: Config, job_id: int) -> list[views.EventView]:
    """Return what happened to a job, oldest first."""

    def local() -> list[views.EventView]:
        found = [event for report in _local_reports(settings) for event in report.events if event.job_id == job_id]
        return [views.event_view(event) for event in sorted(found, key=lambda event: event.time_s)]

    return _ask(settings, f"/v1/jobs/{job_id}/events", list[views.EventView], local)


def slot_map(settings: Config, job_id: int) -> list[views.Slot]:
    """Return where each guest of a job is.

    Raises:
        NotFoundError: the job has no guests.
    """

    def local() -> list[views.Slot]:
        reports = _local_reports(settings)
        mine = [g for report in reports for g in report.guests if g.run is not None and g.run.job_id == job_id]
        if not mine:
            raise NotFoundError(f"job {job_id} has no guests here; see: carrel job show {job_id}")
        return maps.slots(mine, {})

    return _ask(settings, f"/v1/jobs/{job_id}/map", list[views.Slot], local)


def consoles(settings: Config, guest: str, node: str) -> list[views.Console]:
    """Return the ends of consoles that carrelctld holds.

    Raises:
        NotFoundError: it holds none of this guest.
        UnreachableError: it does not answer; a machine's own consoles are files.
    """
    answer = _controller(settings, f"/v1/consoles/{quote(guest, safe='')}?node={quote(node, safe='')}")
    return transport.converted(answer, list[views.Console])


def sample_every(settings: Config, job_id: int, seconds: float) -> None:
    """Ask the nodes of a job, wherever they are, to sample it this often; they hear of it with their next report.

    Raises:
        UnreachableError: carrelctld does not answer.
    """
    body = msgspec.json.encode(views.Sampling(every_s=seconds))
    path = f"/v1/jobs/{job_id}/sampling"
    transport.decoded(asyncio.run(transport.request(settings.controller, "POST", path, body)))


def health(settings: Config) -> views.Health:
    """Return how carrelctld is.

    Raises:
        UnreachableError: it does not answer.
    """
    return transport.converted(_controller(settings, "/v1/health"), views.Health)


def hosts(settings: Config) -> list[HostView]:
    """Return the hosts of guests-as-nodes. Only carrelctld knows them."""
    return transport.converted(_controller(settings, "/v1/hosts"), list[HostView])


def placement(settings: Config, demand: Demand) -> Answer:
    """Return where such guests would go now."""
    words = {
        "cpus": demand.cpus,
        "memory_bytes": demand.memory_bytes,
        "count": demand.count,
        "apart": str(demand.apart).lower(),
    }
    # A site's placement command may take its time.
    timeout_s = settings.placement.command_timeout_s + transport.DEFAULT_TIMEOUT_S
    answer: Answer = transport.converted(
        _controller(settings, f"/v1/placement?{urlencode(words)}", timeout_s=timeout_s),
        Answer,  # type: ignore[arg-type]  # a union of structs is no type to mypy
    )
    return answer


def change_host(settings: Config, method: str, path: str, body: msgspec.Struct | None = None) -> None:
    """Have carrelctld change its table of hosts.

    Raises:
        RefusedError: the caller is no administrator, or what the host has or carries forbids it.
        NotFoundError: there is no such host.
    """
    _controller(settings, f"/v1/hosts{path}", method=method, body=msgspec.json.encode(body) if body else b"")


def _ask(settings: Config, path: str, kind: type[_T], local: Callable[[], _T]) -> _T:
    try:
        return transport.converted(_controller(settings, path), kind)
    except UnreachableError as error:
        here = local_nodes(settings)
        if not here:
            raise
        found = local()
        output.say(f"{error}; what follows is known to this machine alone ({', '.join(here)})")
        return found


def _controller(
    settings: Config,
    path: str,
    *,
    method: str = "GET",
    body: bytes = b"",
    timeout_s: float = transport.DEFAULT_TIMEOUT_S,
) -> object:
    asked = transport.request(settings.controller, method, path, body, timeout_s=timeout_s)
    return transport.decoded(asyncio.run(asked))


def measured(settings: Config, found: Sequence[views.GuestView]) -> list[views.GuestView]:
    """Return the guests with the memory that those of this machine take now; their nodes report it seldom."""
    fresh: dict[str, dict[str, Counters]] = {}
    for node in {guest.node for guest in found} & set(local_nodes(settings)):
        with contextlib.suppress(CarrelError):  # what was reported is better than nothing
            fresh[node] = transport.converted(
                ask_node(settings, node, "status"), NodeReport, whose=f"carreld of {node}"
            ).counters
    return [views.with_counters(guest, fresh.get(guest.node, {}).get(guest.name)) for guest in found]


def _local_guests(settings: Config) -> list[views.GuestView]:
    return [
        views.guest_view(guest, host=node if guest.per == "node" else "")
        for node, found in _each_local(settings, "list")
        for guest in transport.converted(found, list[Guest], whose="carreld")
        if guest.per != "node" or guest.node != node  # its host lists it too
    ]


def _local_reports(settings: Config) -> list[NodeReport]:
    return [transport.converted(found, NodeReport, whose="carreld") for _, found in _each_local(settings, "status")]


def _each_local(settings: Config, verb: str) -> Sequence[tuple[str, object]]:
    """Ask every carreld here, by its node; one that does not answer is named, and the others still count."""
    found = []
    problem: CarrelError | None = None
    for node in local_nodes(settings):
        try:
            found.append((node, ask_node(settings, node, verb)))
        except UnreachableError as error:
            problem = error
            output.say(f"node {node} left out: {error}")
    if problem is not None and not found:
        raise problem
    return found
