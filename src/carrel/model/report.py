"""What a node tells the controller: its whole state each time, so that a lost report costs nothing."""

import msgspec

from carrel.model.guest import Counters, Guest
from carrel.model.sample import SamplerStatus
from carrel.model.shipping import SinkStatus


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal, for people. Nothing is decided from it."""

    time_s: float
    node: str
    what: str
    """Short and stable, to search for: ``guest-ready``, ``guest-down``, ``task-entered``, ``refused`` …"""
    text: str
    job_id: int = 0
    guest: str = ""
    uid: int = -1
    """Whose job it is, who may read it then; -1: for administrators."""


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node can do, and if it cannot carry guests, why."""

    node: str
    version: str
    started_s: float
    accelerator: str = ""
    """``kvm``, ``tcg``, or empty: not known yet."""
    accelerator_why: str = ""
    faults: tuple[str, ...] = ()
    """Sentences; empty: this node can run guests."""
    cpus: int = 0
    """CPUs and memory of the machine, for one that is a host of guests-as-nodes; 0: not told."""
    memory_bytes: int = 0


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that carreld knows, every time."""

    facts: NodeFacts
    guests: tuple[Guest, ...] = ()
    counters: dict[str, Counters] = {}
    """What guests used, by name, as last read; a guest that was not read yet is absent."""
    events: tuple[Event, ...] = ()
    """Events since the last report that was taken."""
    consoles: dict[str, str] = {}
    """Last 16 KiB of the console of guests that went down or are starting, by guest name."""
    sampler: SamplerStatus | None = None
    """null: jobs are not sampled here."""
    sinks: tuple[SinkStatus, ...] = ()
    sent_s: float = 0.0


class SamplingWish(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants a running job to be sampled this often; whether they may, the job's nodes know."""

    job_id: int
    every_s: float
    uid: int
    asked_s: float


class ReportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller answers to a report."""

    controller: str = ""
    """Which one answers: another word after each of its starts, since it has forgotten what it was told before."""
    sampling: tuple[SamplingWish, ...] = ()
    """The same ones for some minutes: each is granted once."""
