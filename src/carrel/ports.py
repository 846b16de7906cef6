"""The whole extension surface: what Carrel asks of a driver, of a sink, of a scheduler, and of a ledger's database.

A driver is loaded from the entry-point group ``carrel.drivers``, a sink from ``carrel.sinks``; ours take the same road
as a stranger's. ``carrel.testing.DriverContract`` and ``SinkContract`` tell their authors whether they are right.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from carrel.config import Config
from carrel.model.guest import Counters, Entry, Guest, GuestRequest, GuestSpec
from carrel.model.image import ImageFiles, KernelFiles
from carrel.model.job import Job
from carrel.model.sample import Batch
from carrel.model.shipping import ShippingStatus
from carrel.model.template import Recipe


class ImageSource(Protocol):
    """The image store, as far as a driver needs it."""

    def files(self, name: str) -> ImageFiles:
        """Return the image of this name or hash.

        Raises:
            NotFoundError: there is none; the sentence names the known ones.
        """
        ...

    def kernel(self) -> KernelFiles:
        """Return the kernel that guests boot. May take seconds the first time.

        Raises:
            NodeFaultError: there is none and none can be had.
        """
        ...


class DriverContext(msgspec.Struct, frozen=True, kw_only=True):
    """Where a driver works and what it may use."""

    config: Config
    node: str
    directory: Path
    """For the driver alone: a directory per guest goes here."""
    lock: Path
    """Locked (``flock``, exclusive) for as long as carreld lives."""
    images: ImageSource


class LoadedDriver(Protocol):
    """What an entry point of the group ``carrel.drivers`` names: a class that makes itself from its context."""

    @classmethod
    def from_context(cls, context: DriverContext) -> Self:
        """Return a driver. Guests of an earlier one are found by looking."""
        ...


class Driver(Protocol):
    """Makes and unmakes guests on one node. Every method may be called twice, and by two processes in turn."""

    async def check(self) -> tuple[str, str]:
        """Return how guests run on this node, as a word (``kvm``, ``tcg`` …) and why so. May take seconds.

        Raises:
            NodeFaultError: they do not; the sentence says why.
        """
        ...

    async def guests(self) -> Sequence[Guest]:
        """Return all guests that exist on this node, known to us or not, also those left by an earlier process."""
        ...

    async def ensure(self, spec: GuestSpec) -> Guest:
        """Return the guest, ready to enter; make it first if it is absent.

        A second call, also a concurrent one, returns the same guest. Cancelling the call may leave a guest
        that is starting; ``guests`` lists it and ``destroy`` removes it.

        Raises:
            RefusedError: the request cannot be met; the user reads the sentence.
            NodeFaultError: this node cannot; another might.
        """
        ...

    async def destroy(self, name: str) -> None:
        """Leave nothing of the guest: process, disk, sockets, cgroup, mounts. Absent before is fine."""
        ...

    async def enter(self, name: str, port: str) -> Entry:
        """Return a way in for one task. ``port`` is unique among the guest's living tasks.

        The caller owns the descriptor of an ``Agent`` entry. When its other end closes, all that the task
        started in the guest is killed.

        Raises:
            NotFoundError: there is no such guest.
            RefusedError: it is down; the sentence says why.
        """
        ...

    async def suspend(self, name: str, *, suspended: bool) -> None:
        """Stop the guest's CPUs, or let them run on with the clock set right. A second call changes nothing."""
        ...

    async def read(self, name: str) -> Counters:
        """Return what the guest used so far; counters that cannot be read are absent."""
        ...


class RemoteDriver(Driver, Protocol):
    """A driver for hosts that carry no carreld: carrelctld calls it, and a slurmd runs in each guest.

    ``node`` of a spec is the host that was chosen, ``host_name`` the name that the guest has in Slurm, ``facts`` what
    it is told. ``guests`` raises where it cannot tell, for what is not listed counts as gone.
    """

    def recipe(self, request: GuestRequest) -> Recipe:
        """Return how a guest of this request is made. May read a file.

        Raises:
            CarrelError: it cannot be made, or must not hold the cluster's key; its owner reads the sentence.
        """
        ...


class SinkContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink may use. Its settings are ``config.sink_settings``."""

    config: Config
    node: str
    status: Callable[[], ShippingStatus]
    """Returns how all sinks of the node are doing, for those that show it."""


class LoadedSink(Protocol):
    """What an entry point of the group ``carrel.sinks`` names: a class that makes itself from its context."""

    @classmethod
    def from_context(cls, context: SinkContext) -> Self:
        """Return a sink. Nobody needs to be there yet.

        Raises:
            CarrelError: its settings are wrong, or a library is missing.
        """
        ...


class Sink(Protocol):
    """Takes the samples of jobs elsewhere, in a process that is not the sampler's.

    The segments are its spool: a sink that is down reads on later. It is called from one thread, its own.
    """

    @property
    def period_s(self) -> float:
        """What has come meanwhile is brought so often."""
        ...

    @property
    def metrics(self) -> Sequence[str]:
        """Patterns of the metrics that it wants: ``job.*``."""
        ...

    @property
    def rows_max(self) -> int:
        """It gets no more at once: they are in memory."""
        ...

    def write(self, batches: Sequence[Batch]) -> None:
        """Take batches, of several series in turn; when it returns, they are safe there.

        The same rows may come again, after a failure or a restart, and cut into other batches; in the order of their
        series always. ``(batch.series, row.seq)`` names a row for ever. A call must end by itself.

        Raises:
            UnreachableError: nobody is there; the same batches come again later.
            RefusedError: one of them will never be taken. They come again one by one, and it is dropped and counted.
        """
        ...

    def close(self) -> None:
        """Let go of everything. Rows that ``write`` took are not lost by it."""
        ...


class Scheduler(Protocol):
    """Slurm, as far as a daemon needs it. A look that fails raises; it never answers *none*."""

    async def jobs(self) -> Sequence[Job]:
        """Return the jobs that Slurm knows and has not finished with, seen from this node.

        Raises:
            UnreachableError: Slurm did not answer: nothing is known.
        """
        ...

    async def job(self, job_id: int) -> Job | None:
        """Return one job with its CPUs and memory on this node; None: Slurm answered and has no such job.

        Raises:
            UnreachableError: Slurm did not answer.
        """
        ...

    async def drain(self, node: str, reason: str) -> None:
        """Take the node out of scheduling with one sentence. A second call changes nothing."""
        ...

    async def requeue(self, job_id: int) -> None:
        """Give the job back to the queue, as the node's fault and not its own."""
        ...


class Reading(Protocol):
    """One unchanging view of the ledger's tables."""

    def rows(self, sql: str, *values: Any) -> Iterator[Sequence[Any]]:
        """Yield the rows of a query; ``%s`` is a value, ``IN ({ints})`` and ``IN ({texts})`` take a list."""
        ...

    def unguarded(self) -> set[str]:
        """Return the names of the triggers that should refuse changes and are not there, or off."""
        ...


class Writing(Reading, Protocol):
    """One transaction; nobody else writes before it ends."""

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Add rows, all columns in the order of ``carrel.bank.tables``."""
        ...

    def update(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Change rows by their key, and add one to their version.

        Raises:
            LostRaceError: the database has another version of one; at the latest when the transaction ends.
        """
        ...


class Store(Protocol):
    """A database that holds the ledger. It knows tables and transactions, and no rule.

    Every method raises ``UnreachableError`` where the database does not answer. After one that was raised by the end
    of ``writing`` nobody can tell whether the rows are there: the keys of the commands tell the next one.
    """

    def migrate(self) -> int:
        """Bring the tables to this version and return it; once done, nothing is done again.

        Raises:
            CarrelError: they are of a later version than this program.
        """
        ...

    def writing(self) -> AbstractContextManager[Writing]:
        """Begin a transaction that is durable when it ends without an error, and undone otherwise."""
        ...

    def reading(self) -> AbstractContextManager[Reading]:
        """Begin a view of what is committed now. Any number at once, beside the writer."""
        ...

    def close(self) -> None:
        """Let go of the database; a second call does nothing."""
        ...
