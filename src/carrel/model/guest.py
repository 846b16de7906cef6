"""A guest is a VM or container made for one run on one node."""

from typing import Literal

import msgspec

from carrel.model.job import JobKey

Per = Literal["job", "task"]
Clone = Literal["full", "linked", "instant"]
CloneWish = Literal["auto", "instant", "linked", "full"]
GuestState = Literal["starting", "ready", "suspended", "down"]


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A host directory that appears in the guest."""

    source: str
    target: str
    read_only: bool = False


class GuestRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for, before anything is known about the node; empty or None: the site's setting."""

    image: str
    per: Per | None = None
    clone: CloneWish | None = None
    driver: str = ""
    mounts: tuple[str, ...] = ()
    """Each ``SRC[:DST][:ro]``, as written."""
    root: bool = False
    boot_timeout_s: float | None = None


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a driver needs to make one guest. Two specs of one name are the same guest."""

    name: str
    """Unique on the node: ``<run>`` for a guest per job, ``<run>.<step>.<task>`` for a guest per task."""
    run: JobKey
    node: str
    host_name: str
    """The guest's host name: its node's."""
    image: str
    """Content hash of the image, resolved from the name that the user gave."""
    image_name: str
    per: Per
    clone: CloneWish
    cpus: int
    memory_bytes: int
    """RAM of the guest: the job's memory on the node less the reserve."""
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    user: str = ""
    home: str = "/"
    shell: str = "/bin/sh"
    mounts: tuple[Mount, ...] = ()
    asked_mounts: tuple[Mount, ...] = ()
    """Those of ``mounts`` that the user named; a guest without them is not the one that was asked for."""
    root: bool = False
    boot_timeout_s: float = 120.0
    step: str = ""
    task: int = -1
    slot: int = 0
    """Slot on the node (VINO): 0 for a guest per job; for guests per task distinct on the node."""
    passwd: tuple[str, ...] = ()
    """Lines for the guest's /etc/passwd, in its format."""
    group: tuple[str, ...] = ()
    """Lines for the guest's /etc/group."""
    job_cgroups: tuple[str, ...] = ()
    """The job's directories in the cgroup hierarchies that count or limit it; the guest's go below."""
    job_freezer: str = ""
    """The job's directory in the freezer hierarchy, which vanishes with the job; empty: Slurm uses no cgroups."""


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that exists, known to anybody or not."""

    name: str
    node: str
    driver: str
    state: GuestState
    run: JobKey | None = None
    """None: nobody remembers whose it is; the sweep removes it."""
    image_name: str = ""
    image: str = ""
    per: Per = "job"
    clone: Clone = "linked"
    clone_why: str = ""
    """Why this kind and not another."""
    step: str = ""
    task: int = -1
    slot: int = 0
    cpus: int = 0
    memory_bytes: int = 0
    uid: int = -1
    user: str = ""
    host_name: str = ""
    kernel: str = ""
    accelerator: str = ""
    accelerator_why: str = ""
    """Why this accelerator was taken and not another."""
    pid: int = 0
    started_s: float = 0.0
    ready_s: float | None = None
    """Time of day when the first task could enter."""
    phases: tuple[tuple[str, float], ...] = ()
    """What its start consisted of: a word and seconds each, in order."""
    reason: str = ""
    """Why it is down, as a sentence for the user."""
    console: str = ""
    """Path of the console log on its node."""
    end_file: str = ""
    """Path of the file on its node that says why the guest is gone, once it is."""
    tasks: int = 0
    """Tasks inside right now."""


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest used, seen from outside; a counter that cannot be read is absent."""

    cpu_seconds_total: float | None = None
    memory_bytes: int | None = None
    memory_pss_bytes: int | None = None
    """What it really takes: pages shared with others count by their share."""
    memory_shared_bytes: int | None = None
    """Pages that others have too, most of them a template's."""
    disk_read_bytes: int | None = None
    """By the guest, from all its disks."""
    disk_written_bytes: int | None = None
    disk_reads: int | None = None
    disk_writes: int | None = None


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """Enter by talking the relay protocol to ``carrel-agent`` over this connected descriptor."""

    fd: int


class IsNode(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing to enter: the guest is a Slurm node of this name."""

    name: str


Entry = Agent | IsNode
