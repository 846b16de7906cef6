"""Guests that are Slurm nodes, towards their hosts: what each shall carry, and what is made of what it says."""

from collections.abc import Collection, Iterator, Mapping

import msgspec

from carrel.core import standing
from carrel.core.guestdeeds import Assign
from carrel.core.guestworld import Limits, World
from carrel.model.guestnode import GuestNode, HostReport, NodeOrder
from carrel.model.job import JobKey
from carrel.model.pool import Look, PoolJob, PoolNode, Reservation, reservation_name

Attempt = tuple[JobKey, str, float]
"""A guest among all that its run may have one after another: run, name, when it was started."""


def orders(world: World) -> dict[str, tuple[NodeOrder, ...]]:
    """Return what each host shall carry: a guest for each name of a living run that points at it."""
    found: dict[str, list[NodeOrder]] = {host: [] for host in world.hosts}
    for job in world.look.jobs:
        for order in _orders(world, job) if job.alive else ():
            found[order.host].append(order)
    return {host: tuple(its) for host, its in found.items()}


def foreseen(world: World, assigned: Assign) -> World:
    """Return what the next look will show where Slurm took the names: hosts may begin before it."""
    look, name = world.look, reservation_name(assigned.run)
    nodes = {
        node: msgspec.structs.replace(
            look.nodes[node],
            address=standing.of(world.hosts[host]).address(world.hosts[host], None) or look.nodes[node].address,
            host_name=host,
            state=look.nodes[node].state - {"DRAIN"},
        )
        for node, host in assigned.hosts
    }
    mine = Reservation(name=name, nodes=tuple(nodes), users=assigned.user)
    jobs = (msgspec.structs.replace(job, reservation=name) if job.key == assigned.run else job for job in look.jobs)
    return msgspec.structs.replace(
        world,
        look=msgspec.structs.replace(
            look, jobs=tuple(jobs), nodes=look.nodes | nodes, reservations=look.reservations | {name: mine}
        ),
    )


def judged(
    look: Look, hosts: Mapping[str, HostReport], *, counted: Collection[Attempt], now_s: float, limits: Limits
) -> dict[str, HostReport]:
    """Return what hosts said, in which a guest whose slurmd has not come in time has failed.

    One of ``counted`` has failed before: its name may have been closed meanwhile.
    """
    waiting = {job.key for job in look.jobs if job.job.state in {"held", "pending"}}

    def seen(guest: GuestNode) -> GuestNode:
        node = look.nodes.get(guest.node)
        late = guest.ready_s and now_s - guest.ready_s > limits.join_max_s
        if guest.state != "ready" or guest.run not in waiting or not late:
            return guest
        known = (guest.run, guest.node, guest.started_s) in counted
        if node is None or not node.resting or (node.closed and not known):
            return guest
        why = f"slurmd did not come within {limits.join_max_s:g} s (guest_nodes.join_max_s) after it was ready"
        return msgspec.structs.replace(guest, state="failed", reason=f"guest {guest.node}: its {why}")

    return {
        name: msgspec.structs.replace(report, guests=tuple(seen(guest) for guest in report.guests))
        for name, report in hosts.items()
    }


def failed(look: Look, hosts: Mapping[str, HostReport]) -> tuple[tuple[JobKey, str, GuestNode], ...]:
    """Return the guests that failed, of runs that have not started: run, host, guest."""
    waiting = {job.key for job in look.jobs if job.job.state in {"held", "pending"}}
    return tuple(
        (guest.run, host, guest)
        for host, report in hosts.items()
        for guest in report.guests
        if guest.run in waiting and guest.state == "failed"
    )


def _orders(world: World, job: PoolJob) -> Iterator[NodeOrder]:
    if job.wish is None:
        return
    nodes = world.run_nodes(job.key)
    # What runs goes on where it is, though another of its hosts is silent: whether that one is lost, Slurm finds out.
    room = list(world.run_places(job.key) if job.job.state in {"held", "pending"} else world.newest_places(job.key))
    for node in nodes:
        host = world.host_of(job.key, node)
        place = next((place for place in room if place.host == host), None)
        if place is None:  # where names and room differ, the run begins anew
            continue
        room.remove(place)
        plain = NodeOrder(
            node=node.name,
            host=host,
            run=job.key,
            uid=job.job.uid,
            gid=job.job.gid,
            user=job.job.user,
            cpus=place.cpus,
            memory_bytes=place.memory_bytes,
            request=job.wish.request,
            cwd=job.wish.cwd,
            join=_may_join(job, node),
        )
        order = standing.of(world.hosts[host]).order(plain, job, nodes, place)
        if order is not None:
            yield order


def _may_join(job: PoolJob, node: PoolNode) -> bool:
    """Tell whether slurmd may run under this name: from when the job is pinned to it and the name is open."""
    return job.reservation == reservation_name(job.key) and not node.parting and not (node.resting and node.closed)
