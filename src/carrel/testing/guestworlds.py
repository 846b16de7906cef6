"""Worlds for the decision on guests as nodes: names v1 to v3, hosts h1 and h2, and job 7, but for what a test says."""

import msgspec

from carrel.core import guestnodes as decide
from carrel.core.guestworld import Limits, World
from carrel.model.guest import GuestRequest
from carrel.model.guestnode import GuestNode, GuestNodeState, HostReport
from carrel.model.job import Job, JobKey
from carrel.model.pool import Look, Place, PoolJob, PoolNode, Reservation, Wish, reservation_name

MIB = 2**20
RUN = JobKey(cluster="k", job_id=7, submit_s=100)
NEXT_RUN = JobKey(cluster="k", job_id=7, submit_s=103, restart=1)
NOW_S = 1000.0
RESTING = "IDLE+CLOUD+DRAIN+POWERED_DOWN"
WISH = Wish(request=GuestRequest(image="debian12", per="node"), cwd="/home/ada")


def job(state: str = "PENDING", *, key: JobKey = RUN, reason: str = "JobHeldAdmin", **more: object) -> PoolJob:
    """Return a job of one CPU and 320 MiB that we hold, unless told otherwise."""
    words = {"PENDING": "held" if "Held" in reason else "pending", "RUNNING": "running", "CONFIGURING": "running"}
    nodes = more.pop("on", ())
    known = Job(key=key, state=words.get(state, "ended"), slurm_state=state, user="ada", uid=7, gid=8, nodes=nodes)  # type: ignore[arg-type]
    found = PoolJob(job=known, nodes=1, cpus=1, memory_bytes=320 * MIB, reason=reason, wish=WISH)
    return msgspec.structs.replace(found, **more)


def place(host: str = "h1", *, run: JobKey = RUN, attempt: int = 0, cpus: int = 1) -> Place:
    return Place(run=run, attempt=attempt, host=host, cpus=cpus, memory_bytes=320 * MIB)


def node(name: str, state: str = RESTING, *, on: str = "") -> PoolNode:
    return PoolNode(
        name=name, state=frozenset(state.split("+")), address=f"10.0.0.{on[1:]}" if on else name, host_name=on
    )


def guest(name: str = "v1", state: GuestNodeState = "ready", *, run: JobKey = RUN, reason: str = "") -> GuestNode:
    return GuestNode(node=name, run=run, state=state, joined=True, reason=reason)


def world(
    *jobs: PoolJob,
    nodes: tuple[PoolNode, ...] = (),
    places: tuple[Place, ...] = (),
    reserved: dict[JobKey, tuple[str, ...]] | None = None,
    guests: dict[str, tuple[GuestNode, ...]] | None = None,
    begun: tuple[JobKey, ...] | None = None,
    given_up: dict[JobKey, str] | None = None,
    settled: tuple[str, ...] | None = None,
    resting: dict[JobKey, str] | None = None,
    ready_since_s: float = NOW_S,
    partition_state: str = "UP",
) -> World:
    """Return a world with names v1 to v3 at rest and hosts h1 and h2, but for what is told otherwise."""
    known = {name: node(name) for name in ("v1", "v2", "v3")} | {each.name: each for each in nodes}
    carried = {"h1": (), "h2": ()} | (guests or {})
    names = [(reservation_name(run), its) for run, its in (reserved or {}).items()]
    return World(
        look=Look(
            cluster="k",
            jobs=jobs,
            nodes=known,
            reservations={name: Reservation(name=name, nodes=its, users="ada") for name, its in names},
            partition_state=partition_state,
        ),
        places=places,
        hosts={name: HostReport(host=name, address=f"10.0.0.{name[1:]}", guests=its) for name, its in carried.items()},
        settled=settled if settled is not None else tuple(carried),
        begun=begun if begun is not None else {place.run for place in places},
        given_up=given_up or {},
        resting=resting or {},
        ready_since_s={each.key: ready_since_s for each in jobs},
        now_s=NOW_S,
        limits=Limits(configuring_max_s=30.0, start_max_s=120.0, join_max_s=60.0),
    )


def kinds(of: World) -> list[str]:
    return [type(action).__name__ for action in decide.plan(of)]


PINNED = job(reservation=reservation_name(RUN))
RELEASED = msgspec.structs.replace(PINNED, reason="Licenses", job=msgspec.structs.replace(PINNED.job, state="pending"))
OPEN = node("v1", "IDLE+CLOUD", on="h1")
CLOSED = node("v1", "IDLE+CLOUD+DRAIN", on="h1")


def ready(of: PoolJob = PINNED, **more: object) -> World:
    """Return a world in which a job has all that it needs."""
    words = {"nodes": (OPEN,), "places": (place(),), "reserved": {RUN: ("v1",)}, "guests": {"h1": (guest(),)}}
    return world(of, **(words | more))  # type: ignore[arg-type]
