"""What people and programs see: the structs of the REST API and of ``--json``, the same for both.

Times are RFC 3339 in UTC here; inside Carrel they are seconds since the epoch.
"""

from datetime import UTC, datetime

import msgspec

from carrel.model.guest import Clone, Counters, Guest, GuestState, Per
from carrel.model.report import Event, NodeReport
from carrel.model.sample import SamplerStatus
from carrel.model.shipping import SinkStatus


class GuestView(msgspec.Struct, frozen=True, kw_only=True):
    """A guest on a node."""

    name: str
    node: str
    """Slurm's name of the node that it is on, or is."""
    host: str = ""
    """What carries it, where it is a node itself."""
    address: str = ""
    """Where Slurm reaches a slurmd that runs in it."""
    driver: str
    state: GuestState
    job_id: int | None
    run: str | None
    """Job id, submit time and restart count; null: nobody remembers whose it is."""
    cluster: str | None
    user: str
    uid: int
    image_name: str
    image: str
    per: Per
    clone: Clone
    clone_why: str
    """Why this kind of clone and not another."""
    step: str
    task: int
    slot: int
    cpus: int
    memory_bytes: int
    memory_pss_bytes: int | None
    """What it really takes, pages shared with others counted by their share; null: not read yet."""
    memory_shared_bytes: int | None
    """Pages that others have too, most of them a template's."""
    host_name: str
    kernel: str
    accelerator: str
    accelerator_why: str
    started: datetime | None
    ready: datetime | None
    boot_s: float | None
    """Seconds from its start until a task could enter."""
    phases: dict[str, float]
    """Seconds of each phase of its start, in order."""
    tasks: int
    reason: str
    console: str
    pid: int


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node, as its carreld last described it."""

    node: str
    state: str
    """``ready``; ``faulty``: see ``faults``; ``silent``: no report lately, so nothing is known."""
    version: str
    accelerator: str
    accelerator_why: str
    faults: tuple[str, ...]
    guests: int
    sampler: SamplerStatus | None
    """How the sampling of jobs goes; null: they are not sampled."""
    sinks: tuple[SinkStatus, ...]
    """Where samples also go."""
    started: datetime | None
    heard: datetime | None


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal."""

    time: datetime
    node: str
    what: str
    text: str
    job_id: int
    guest: str


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One guest in the slot map of a job, with VINO-Slurm's attributes ``id hm mem_mb cores arch``."""

    id: int
    """Slot on its node."""
    hm: str
    """Address of the node."""
    mem_mb: int
    cores: int
    arch: str
    node: str
    step: str
    task: int
    guest: str


class Console(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a guest's console."""

    guest: str
    node: str
    text: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How often a job shall be sampled."""

    every_s: float


class GuestNodesHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How carrelctld does what jobs need whose guests are Slurm nodes."""

    partition: str
    """Whose jobs it looks at."""
    trouble: str
    """Why nothing is done for those that wait; empty: nothing is wrong."""
    silent: tuple[str, ...] = ()
    """Hosts that have not asked lately what they shall carry: none gets a guest."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """That carrelctld runs, and what it has heard."""

    version: str
    started: datetime
    nodes: int
    guests: int
    guest_nodes: GuestNodesHealth | None = None
    """null: it was given no hosts for guests that are nodes."""


class ErrorView(msgspec.Struct, frozen=True, kw_only=True):
    """One sentence."""

    error: str


def moment(time_s: float | None) -> datetime | None:
    """Return the time of day, or None where there is none; whole milliseconds are enough for people."""
    return datetime.fromtimestamp(round(time_s, 3), UTC) if time_s else None


def with_counters(guest: GuestView, counters: Counters | None) -> GuestView:
    """Return the guest with what it used as of these counters; None changes nothing."""
    if counters is None:
        return guest
    return msgspec.structs.replace(
        guest, memory_pss_bytes=counters.memory_pss_bytes, memory_shared_bytes=counters.memory_shared_bytes
    )


def guest_view(guest: Guest, counters: Counters | None = None, *, host: str = "") -> GuestView:
    """Return a guest as people see it.

    Args:
        guest: The guest.
        counters: What it used, as far as that was read.
        host: What carries it, where it is a node itself.
    """
    run = guest.run
    return GuestView(
        name=guest.name,
        node=guest.node,
        host=host,
        address=guest.address,
        driver=guest.driver,
        state=guest.state,
        job_id=run.job_id if run else None,
        run=str(run) if run else None,
        cluster=run.cluster if run else None,
        user=guest.user,
        uid=guest.uid,
        image_name=guest.image_name,
        image=guest.image,
        per=guest.per,
        clone=guest.clone,
        clone_why=guest.clone_why,
        step=guest.step,
        task=guest.task,
        slot=guest.slot,
        cpus=guest.cpus,
        memory_bytes=guest.memory_bytes,
        memory_pss_bytes=counters.memory_pss_bytes if counters else None,
        memory_shared_bytes=counters.memory_shared_bytes if counters else None,
        host_name=guest.host_name,
        kernel=guest.kernel,
        accelerator=guest.accelerator,
        accelerator_why=guest.accelerator_why,
        started=moment(guest.started_s),
        ready=moment(guest.ready_s),
        boot_s=round(guest.ready_s - guest.started_s, 3) if guest.ready_s and guest.started_s else None,
        phases=dict(guest.phases),
        tasks=guest.tasks,
        reason=guest.reason,
        console=guest.console,
        pid=guest.pid,
    )


def node_view(report: NodeReport, *, heard_s: float, silent: bool) -> NodeView:
    facts = report.facts
    return NodeView(
        node=facts.node,
        state="silent" if silent else "faulty" if facts.faults else "ready",
        version=facts.version,
        accelerator=facts.accelerator,
        accelerator_why=facts.accelerator_why,
        faults=facts.faults,
        guests=len(report.guests),
        sampler=report.sampler,
        sinks=report.sinks,
        started=moment(facts.started_s),
        heard=moment(heard_s),
    )


def event_view(event: Event) -> EventView:
    return EventView(
        time=datetime.fromtimestamp(round(event.time_s, 3), UTC),
        node=event.node,
        what=event.what,
        text=event.text,
        job_id=event.job_id,
        guest=event.guest,
    )
