"""Guests that are Slurm nodes: what each run needs now, from what Slurm, the hosts and the host table say.

::

    job                    room    names     guest, slurmd      next
    not held by us         -       -         -                  hold
    waits for others       any     any       any                give all of it back, say for what, let Slurm watch
    held, tasks            none    -         -                  make jobs of as many as may have room (``guestarrays``)
    held, may start        none    -         -                  find room               (never: cancel; busy: say so)
    held                   on h    none      none left          assign names, reserve them
    held                   on h    reserved  -                  pin the job, open the names
    held                   on h    reserved  has an address     point its name there, if its slurmd is inside
    held                   on h    reserved  joins too late     as one that failed      (``guesthosts``)
    held                   on h    reserved  ready, joined      release
    held                   on h    reserved  failed             give the names back     (too often: cancel)
    released too long      on h    reserved  ready, joined      hold it again, and let it rest
    configuring too long   -       -         -                  give the job back
    running                on h    reserved  -                  close the names: nobody follows onto them
    running                on h    reserved  failed             tell Slurm that the node is down
    ended, unknown         -       reserved  -                  unpin, delete the reservation
    ended, unknown         on h    none      none left          give the room back
    -                      -       none      -                  power the name down, and keep it closed meanwhile

A name is in use for as long as its reservation is there, and a host carries a guest for each reserved name of a run
that lives (``guesthosts``). So nothing of this is stored: each row is one that a killed controller finds again. Room is
given back by nobody but a host that says it carries nothing of the run any more. No name is open that is not reserved:
a job that Slurm could start by itself would start there.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from carrel.core.guestarrays import next_tasks
from carrel.core.guestdeeds import (
    Action,
    Assign,
    Cancel,
    Close,
    Down,
    FindRoom,
    GiveBackJob,
    GiveBackRoom,
    Hold,
    Open,
    Pin,
    Point,
    Recall,
    Release,
    Rest,
    Tell,
    Watch,
)
from carrel.core.guestnames import give_back, names_at_rest
from carrel.core.guestworld import World
from carrel.model.host import Demand
from carrel.model.job import JobKey
from carrel.model.pool import Place, PoolJob, PoolNode, reservation_name, run_of_reservation


def plan(world: World) -> tuple[Action, ...]:
    """Return what is to be done now; nothing where all is as it should be."""
    actions: list[Action] = []
    alive = {job.key: job for job in world.look.jobs if job.alive}
    taken: set[str] = set()
    for job in world.look.jobs:
        if job.alive:
            actions += _living(world, job, taken)
    actions += _gone(world, alive)
    actions += names_at_rest(world)
    return tuple(actions)


def released(world: World) -> frozenset[JobKey]:
    """Return the runs that have all that they need and that Slurm may start."""
    return frozenset(job.key for job in world.look.jobs if job.job.state == "pending" and _ready(world, job))


def over(world: World) -> frozenset[tuple[JobKey, int]]:
    """Return the attempts with room whose runs have ended, and of which no host carries anything."""
    alive = {job.key for job in world.look.jobs if job.alive}
    return frozenset((room.run, room.attempt) for room in _rooms_of_the_gone(world, alive) if room.run not in alive)


# -- a run that lives ------------------------------------------------------------------------------------------------


def _living(world: World, job: PoolJob, taken: set[str]) -> list[Action]:
    if job.job.state in {"running", "suspended", "ended"}:
        return _running(world, job)
    if job.wish is not None and job.wish.held_by_user and job.reason == "JobHeldUser":
        return []
    ready, waits = _ready(world, job), _waits(world, job)
    released = job.job.state == "pending" and ready and not waits
    watched = job.job.state == "pending" and job.waits_for_others
    if job.reason != "JobHeldAdmin" and not (released or watched):
        return [Hold(job.key, waits or "its guests are not there yet")]
    if not world.complete:
        return []
    if why := _refused(world, job):
        return [Cancel(job.key, why)]
    if refusal := next((guest for guest in world.carried(job.key).values() if guest.state == "refused"), None):
        return [Cancel(job.key, refusal.reason)]
    if waits:
        return _rest(world, job, waits)
    if released:
        return _recall(world, job)
    if ready:
        return [Release(job.key, "its guests are there")]
    return [*next_tasks(world, job)] or _prepare(world, job, taken)


def _waits(world: World, job: PoolJob) -> str:
    """Return for what the job waits that is no matter of guests, as far as it can be known; or an empty string."""
    if job.waits_for_others:
        return "waits for the jobs that it depends on"
    if world.look.partition_state in {"DOWN", "INACTIVE"}:
        return f"waits for its partition, which is {world.look.partition_state}"
    # Of a released job it is only when Slurm expects to start it.
    if job.job.state == "held" and job.begins_s > world.now_s and not job.key.restart:
        return "waits for the time at which its owner lets it begin"
    return world.resting.get(job.key, "")


def _rest(world: World, job: PoolJob, why: str) -> list[Action]:
    """Have no guests for a job that could not start on them."""
    if nodes := world.run_nodes(job.key):
        return [*_unpinned(job), *give_back(nodes, reservation_name(job.key), why)]
    if not world.carried(job.key) and (attempts := world.idle_attempts(job.key)):
        return [GiveBackRoom(job.key, attempt, why) for attempt in attempts]
    if job.job.state == "held" and job.waits_for_others:
        return [Watch(job.key, why)]
    return [Rest(job.key, why)]


def _recall(world: World, job: PoolJob) -> list[Action]:
    since_s = world.ready_since_s.get(job.key, world.now_s)
    if world.now_s - since_s <= world.limits.start_max_s:
        return []
    return [Recall(job.key, f"slurm did not start it within {world.limits.start_max_s:g} s: {job.reason}")]


def _refused(world: World, job: PoolJob) -> str:
    """Return why this job can never have guests, or an empty string."""
    if job.wish is None or not job.wish.request.image:
        return "it asked for no guest; say --guest=IMAGE --guest-per=node"
    if not job.memory_bytes:
        return "nobody said how much memory its guest shall have; say --mem=…"
    names = len(world.look.nodes)
    if names and job.nodes > names:  # none at all is no limit, but a site that is not set up yet
        return f"{job.nodes} nodes are more than the {names} names that this cluster has for guests; ask for fewer"
    return ""


def _prepare(world: World, job: PoolJob, taken: set[str]) -> list[Action]:
    nodes, places, carried = world.run_nodes(job.key), world.run_places(job.key), world.carried(job.key)
    name = reservation_name(job.key)
    broken = [guest for guest in carried.values() if guest.state in {"failed", "ended"}]
    halfway = any(node.closed and not node.resting for node in nodes)  # given back, but for the reservation
    if nodes and (broken or halfway or job.key not in world.begun or not _fits(world, job, nodes, places)):
        changed = broken[0].reason if broken else "the job or its hosts have changed"
        return [*_unpinned(job), *give_back(nodes, name, changed)]
    if nodes:
        if job.reservation != name:
            return [Pin(job.key, name, "its names are reserved")]
        opened = [Open(node.name, "its job is pinned") for node in nodes if node.closed]
        return [*opened, *_astray(world, job.key, nodes)]
    if carried or not {place.host for place in places} <= set(world.settled):
        return []  # of an earlier attempt: a second guest beside it would take room that nobody counted
    if places and (job.key not in world.begun or not _is_room(job, places)):
        return [GiveBackRoom(job.key, places[0].attempt, "its guests begin anew")]
    if places:
        return _assign(world, job, places, taken)
    if why := world.given_up.get(job.key):
        return [Tell(job.key, why)]
    if not world.look.nodes:
        return [Tell(job.key, "its partition has no nodes; an administrator adds their names to slurm.conf")]
    demand = Demand(cpus=job.cpus, memory_bytes=job.memory_bytes, count=job.nodes)
    lost = [place.attempt for place in world.places if place.run == job.key]
    return [FindRoom(job.key, demand, max(lost, default=-1) + 1, "it waits for guests")]


def _astray(world: World, run: JobKey, nodes: Sequence[PoolNode]) -> Iterator[Point]:
    """Yield what points names at the addresses that their guests have got meanwhile."""
    for node in nodes:
        address = world.address_of(run, node)
        if address and node.address != address:
            yield Point(node.name, address, "its guest has this address")


def _is_room(job: PoolJob, places: Sequence[Place]) -> bool:
    return len(places) == job.nodes and all(_is_size(place, job) for place in places)


def _assign(world: World, job: PoolJob, places: Sequence[Place], taken: set[str]) -> list[Action]:
    free = [name for name in world.free if name not in taken][: len(places)]
    if len(free) < len(places):
        return [Tell(job.key, "waits for a node name of the pool to become free")]
    taken |= set(free)
    hosts = tuple((name, place.host) for name, place in zip(free, places, strict=True))
    return [Assign(job.key, job.job.user, hosts, "it has room")]


def _fits(world: World, job: PoolJob, nodes: Sequence[PoolNode], places: Sequence[Place]) -> bool:
    """Tell whether the names point at the hosts where the run has room of the right size."""
    if not _is_room(job, places) or len(nodes) != job.nodes:
        return False
    wanted = sorted(place.host for place in places)
    return wanted == sorted(world.host_of(job.key, node) for node in nodes)


def _is_size(place: Place, job: PoolJob) -> bool:
    return place.cpus == job.cpus and place.memory_bytes == job.memory_bytes


def _ready(world: World, job: PoolJob) -> bool:
    nodes, carried = world.run_nodes(job.key), world.carried(job.key)
    return (
        job.reservation == reservation_name(job.key)
        and _fits(world, job, nodes, world.run_places(job.key))
        and all(node.joined and not node.closed and not node.busy for node in nodes)
        and all(node.address == world.address_of(job.key, node) for node in nodes)
        and all(node.name in carried and carried[node.name].state == "ready" for node in nodes)
    )


def _running(world: World, job: PoolJob) -> list[Action]:
    nodes, carried = world.run_nodes(job.key), world.carried(job.key)
    own = {node.name for node in nodes}
    if job.starting:
        late = job.started_s is not None and world.now_s - job.started_s > world.limits.configuring_max_s
        if late or not own.issuperset(job.job.nodes):
            return [GiveBackJob(job.key, "its nodes do not answer" if late else "it was given another job's node")]
    actions: list[Action] = []
    for node in nodes:
        guest = carried.get(node.name)
        if "DOWN" in node.state:
            continue
        if guest and guest.state in {"failed", "refused"}:
            actions.append(Down(node.name, job.key, guest.reason))
        elif job.job.slurm_state == "COMPLETING" and "NOT_RESPONDING" in node.state:
            # Else Slurm would wait for its slurmd for SlurmdTimeout, and nothing runs there any more.
            actions.append(Down(node.name, job.key, "its slurmd does not answer"))
        elif not node.closed:
            actions.append(Close(node.name, f"the guest of job {job.key.job_id} alone"))
    return actions


# -- what is left of runs that are gone -------------------------------------------------------------------------------


def _gone(world: World, alive: Mapping[JobKey, PoolJob]) -> list[Action]:
    actions: list[Action] = []
    naming: dict[str, list[PoolJob]] = {}
    for job in world.look.jobs:
        if job.job.state in {"held", "pending"}:
            naming.setdefault(job.reservation, []).append(job)
    for name, reserved in world.look.reservations.items():
        if run_of_reservation(name, world.look.cluster) in alive:
            continue
        users = naming.get(name, ())
        actions += [Pin(job.key, "", "its earlier run is over") for job in users]
        if not users:
            nodes = [world.look.nodes[node] for node in reserved.nodes if node in world.look.nodes]
            actions += give_back(nodes, name, "its run is over")
    return actions + _rooms_of_the_gone(world, alive)


def _rooms_of_the_gone(world: World, alive: Collection[JobKey]) -> list[GiveBackRoom]:
    """Give back room of runs that are over, and of attempts that were given up when a host fell silent.

    Not before no host of the attempt carries anything of the run.
    """
    actions = []
    newest = dict(sorted((place.run, place.attempt) for place in world.places))
    for run, last in newest.items():
        ended = run not in alive and reservation_name(run) not in world.look.reservations
        why = "its run is over" if ended else "its guests are elsewhere"
        actions += [GiveBackRoom(run, at, why) for at in world.idle_attempts(run) if ended or at < last]
    return actions


def _unpinned(job: PoolJob) -> list[Action]:
    return [Pin(job.key, "", "its guests begin anew")] if job.reservation else []
