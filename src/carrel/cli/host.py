"""``carrel host``: the hosts of guests that are Slurm nodes of their own, and what is taken of them."""

import asyncio
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import api, output
from carrel.cli.guest import Json
from carrel.core.sizes import memory_bytes
from carrel.daemons.hosts import Drained, HostView, HostWish
from carrel.drivers.vsphere.settings import Settings
from carrel.errors import NodeFaultError, NotFoundError, UsageError
from carrel.model.host import Demand, Here, Host, Never, NotNow

_NOT_NOW, _NEVER = 1, 4
"""Exit statuses of ``query``: a script can tell a host that is full from a size that no host has."""

_VCENTER_SAYS = "vCenter: "
"""How the reason begins of a host that was drained because vCenter does not use it."""

Name = Annotated[str, Parameter(show_default=False, help="The host's name; of one with a carreld, its node name.")]
Cpus = Annotated[int, Parameter(show_default=False, help="CPUs.")]
Memory = Annotated[str, Parameter(show_default=False, help="Memory: 4G, 512M; a bare number is in MiB.")]

Cluster = Annotated[str, Parameter(show_default=False, help="Only this cluster's: C0, or DC1/C0.")]

app = App(name="host", help="Hosts of guests that are Slurm nodes of their own.")


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List hosts in the order in which the policy "first" takes them, with what guests have and may have of them."""
    found = api.hosts(config.load())
    if json:
        output.objects(found)
        return
    titles = ("HOST", "STATE", "GUESTS", "CPUS", "OF", "MEMORY", "OF", "REASON")
    output.table(
        titles,
        [
            (
                *(host.name, host.state, host.guests, host.cpus_used, host.cpus_most),
                *(output.size(host.memory_used_bytes) or "0", output.size(host.memory_most_bytes), host.reason),
            )
            for host in found
        ],
    )


@app.command
def show(host: Name, /, *, json: Json = False) -> None:
    """Show a host and what each guest has of it."""
    one = _find(api.hosts(config.load()), host)
    if json:
        output.objects([one])
        return
    output.fields(
        [
            ("host", one.name),
            ("state", f"{one.state}: {one.reason}" if one.reason else one.state),
            ("cpus", _taken(f"{one.cpus_used} of {one.cpus_most}", one.cpus, one.cpus_most, one.cpus_others)),
            (
                "memory",
                _taken(
                    f"{output.size(one.memory_used_bytes) or '0'} of {output.size(one.memory_most_bytes)}",
                    output.size(one.memory_bytes),
                    output.size(one.memory_most_bytes),
                    output.size(one.memory_others_bytes),
                ),
            ),
            ("known from", "its carreld" if one.reports else "carrel host add"),
        ]
    )
    if one.places:
        print()
        rows = [
            (place.run, place.guest, place.cpus, output.size(place.memory_bytes), place.address) for place in one.places
        ]
        output.table(("RUN", "GUEST", "CPUS", "MEMORY", "ADDRESS"), rows)


@app.command
def add(
    host: Name,
    /,
    *,
    cpus: Annotated[int, Parameter(show_default=False, help="CPUs; without, its carreld says.")] = 0,
    memory: Annotated[str, Parameter(show_default=False, help="Memory: 64G; without, its carreld says.")] = "",
    cpus_others: Annotated[int, Parameter(help="CPUs of it that are not for guests of jobs.")] = 0,
    memory_others: Annotated[str, Parameter(show_default=False, help="Memory that is not for them.")] = "",
) -> None:
    """Add a host, or change what it has."""
    if bool(cpus) is not bool(memory):
        raise UsageError(f"host {host!r}: give both --cpus and --memory, or neither for a host whose carreld reports")
    wish = HostWish(
        name=host,
        cpus=cpus,
        memory_bytes=memory_bytes(memory) if memory else 0,
        cpus_others=cpus_others,
        memory_others_bytes=memory_bytes(memory_others) if memory_others else 0,
    )
    api.change_host(config.load(), "POST", "", wish)


@app.command(name="import")
def import_(
    *, cluster: Annotated[str, Parameter(show_default=False, help="Only this cluster's: C0, or DC1/C0.")] = ""
) -> None:
    """Add the hosts that vCenter has, or read anew what they have and what others' machines take of them."""
    settings = config.load()
    found = asyncio.run(_of_vcenter(settings, cluster))
    rested = {host.name for host in api.hosts(settings) if host.reason.startswith(_VCENTER_SAYS)}
    for host in found:
        wish = HostWish(
            name=host.name,
            cpus=host.cpus,
            memory_bytes=host.memory_bytes,
            cpus_others=host.cpus_used,
            memory_others_bytes=host.memory_used_bytes,
        )
        api.change_host(settings, "POST", "", wish)
        up = host.state == "up"
        if not up or host.name in rested:  # what a person drained stays so
            drained = Drained(drained=not up, reason="" if up else f"{_VCENTER_SAYS}{host.reason}")
            api.change_host(settings, "PUT", f"/{quote(host.name, safe='')}/state", drained)
        print(f"{host.name}: {host.cpus} CPUs, {output.size(host.memory_bytes)}{_aside(host)}")


async def _of_vcenter(settings: config.Config, cluster: str) -> Sequence[Host]:
    try:
        # An extra, loaded only for those who ask.
        from carrel.drivers.vsphere.driver import NAME, VsphereDriver  # noqa: PLC0415
    except ImportError as error:
        raise NodeFaultError(f"{error}; vCenter is reached through pyvmomi: pip install pyvmomi") from error
    vsphere = VsphereDriver(config.driver_settings(settings, NAME, Settings))
    try:
        return await vsphere.hosts(cluster=cluster)
    finally:
        vsphere.close()


def _aside(host: Host) -> str:
    others = f"; others take {host.cpus_used} and {output.size(host.memory_used_bytes)}" if host.cpus_used else ""
    return others + (f"; drained: {host.reason}" if host.reason else "")


@app.command
def remove(host: Name, /) -> None:
    """Forget a host that carries no guest."""
    api.change_host(config.load(), "DELETE", f"/{quote(host, safe='')}")


@app.command
def refresh(host: Name = "", /) -> None:
    """Read anew what a host has, or all of them, from what their carrelds report."""
    api.change_host(config.load(), "POST", f"/refresh?name={quote(host, safe='')}")


@app.command
def drain(host: Name, /, *, reason: Annotated[str, Parameter(show_default=False, help="Why, as a sentence.")]) -> None:
    """Let a host have no further guest; those that it carries stay."""
    api.change_host(config.load(), "PUT", f"/{quote(host, safe='')}/state", Drained(drained=True, reason=reason))


@app.command
def undrain(host: Name, /) -> None:
    """Let a host have guests again."""
    api.change_host(config.load(), "PUT", f"/{quote(host, safe='')}/state", Drained(drained=False))


@app.command
def query(
    cpus: Cpus,
    memory: Memory,
    /,
    *,
    guests: Annotated[int, Parameter(help="How many guests of this size.")] = 1,
    apart: Annotated[bool, Parameter(negative="", show_default=False, help="Each on a host of its own.")] = False,
    json: Json = False,
) -> int:
    """Say where guests of this size would go now; exit 1: nowhere now, 4: nowhere ever. Nothing is taken."""
    try:
        demand = Demand(cpus=cpus, memory_bytes=memory_bytes(memory), count=guests, apart=apart)
    except ValueError as error:
        raise UsageError(str(error)) from error
    answer = api.placement(config.load(), demand)
    if json:
        output.objects([answer])
    elif isinstance(answer, Here):
        print(f"here: {', '.join(answer.hosts)}")
    else:
        print(f"{'never' if isinstance(answer, Never) else 'not now'}: {answer.reason}")
    return _NEVER if isinstance(answer, Never) else _NOT_NOW if isinstance(answer, NotNow) else 0


def _taken(taken: str, has: object, most: object, others: object) -> str:
    more = [f"{has} before overcommit"] if has != most else []
    more += [f"{others} not for guests of jobs"] if others else []
    return f"{taken} ({'; '.join(more)})" if more else taken


def _find(found: list[HostView], name: str) -> HostView:
    for one in found:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in found) or "none"
    raise NotFoundError(f"no host {name!r}; known: {known}; see: carrel host add")
