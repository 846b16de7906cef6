"""One job that is being sampled: its sources, its segment, and what a reader of it should know."""

import contextlib
import glob
import os
import time
from pathlib import Path

import msgspec

from carrel.core import schedule
from carrel.errors import RefusedError
from carrel.model.job import Job
from carrel.model.sample import Note, View
from carrel.sampling import cgroup
from carrel.sampling.blocks import Block, Reading
from carrel.sampling.folder import JobFolder, stem
from carrel.sampling.gpu import GpuSource
from carrel.sampling.outside import GuestsOutside
from carrel.sampling.processes import DENSE_S, ProcessSource
from carrel.sampling.segment import SegmentWriter

FINISHED = (".parquet", ".csv", ".csv.zst")


class SampledJob:
    """Only the sampler's thread calls these."""

    def __init__(self, job: Job, folder: JobFolder, *, node: str, view: View, interval_us: int, now_us: int) -> None:
        """Open the segment, a new one or that of an earlier sampler of this node.

        Raises:
            RefusedError: the samples of this run are finished.
            CarrelError: something else is in their place.
            OSError: the segment cannot be made.
        """
        self.job = job
        self.folder = folder
        self.node = node
        self.stem = stem(node, view)
        for end in FINISHED:
            if self._exists(self.stem + end):
                raise RefusedError(f"{folder.path / (self.stem + end)}: job {job.key} has been sampled to its end")
        name = f"{self.stem}.seg"
        self.writer = SegmentWriter(folder.create(name), name=str(folder.path / name))
        self.interval_us = interval_us
        self.due_us = now_us
        self.group: cgroup.GroupSource | None = None
        self.groups = cgroup.JobGroups()
        self.processes: ProcessSource | None = None
        self.gpus: GpuSource | None = None
        self.guests: GuestsOutside | None = None
        self.failures = 0
        """Samples that could not be stored."""
        self._carried: dict[str, int] = {}
        self._processes_us = 0
        self._dense_until_s = time.monotonic() + DENSE_S
        self._unstored_us = 0
        self._cap_steps = 1
        self._start(now_us)

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.folder.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _start(self, now_us: int) -> None:
        last_us = self.writer.last_us
        with contextlib.suppress(OSError):  # a full disk now need not be one at the next sample
            if last_us:
                text = f"the sampler was away for {(now_us - last_us) / 1e6:.1f} s"
                self.writer.note(Note(time_us=now_us, what="gap", text=text, from_us=last_us))
            text = f"sampled every {self.interval_us / 1e6:g} s"
            self.writer.note(Note(time_us=now_us, what="start", text=text, job=self.job))

    def attach(self, groups: cgroup.JobGroups, *, pid: int, process_period_s: float) -> None:
        """Count from now on also what is counted in these groups; without any, a process and its descendants."""
        groups = groups.joined(self.groups)
        if self.processes is not None and groups == self.groups:
            if not groups.any:
                self.processes.add_root(pid)
            return
        if self.group is not None:
            self.group.close()  # its counters are in the new one too
        if self.processes is not None:
            self.processes.close()
        self.groups = groups
        self.processes = ProcessSource(groups.processes, root_pid=pid, period_s=process_period_s)
        self._processes_us = 0
        if groups.any:
            cgroup.hold(groups)
            self.group = cgroup.GroupSource(groups, carried=self._carried)

    def attach_inside(self, group: cgroup.GroupSource | None, processes: ProcessSource) -> None:
        """Count what is counted inside a guest."""
        self.group, self.processes = group, processes

    def outside(self) -> GuestsOutside:
        """Return what looks at the job's guests from outside."""
        if self.guests is None:
            self.guests = GuestsOutside()
        return self.guests

    def _detach(self) -> None:
        if self.group is not None:
            self._carried |= self.group.totals()
            self.group.close()
            self.group = None

    def read(self, now_us: int, *, forced: bool, stretch: int, costs_us: dict[str, float]) -> Reading | None:
        """Read what belongs to this job alone; None: there is nothing to read.

        Args:
            now_us: Time of the sample.
            forced: Also what is not due.
            stretch: Processes are read only every so many samples.
            costs_us: CPU time is added here, by source.
        """
        began_ns = time.thread_time_ns()
        blocks = self._group_blocks(now_us)
        if self.guests is not None:
            blocks += self.guests.read()
        middle_ns = time.thread_time_ns()
        costs_us["job"] = costs_us.get("job", 0.0) + (middle_ns - began_ns) / 1000
        if self.processes is not None and (forced or self._processes_due(now_us, stretch)):
            with contextlib.suppress(OSError, ValueError):  # all of them have just ended
                blocks += self.processes.read()
            self._processes_us = now_us
            costs_us["processes"] = costs_us.get("processes", 0.0) + (time.thread_time_ns() - middle_ns) / 1000
        if self.gpus is not None:
            blocks += self.gpus.read()
        return Reading(blocks) if blocks else None

    def _group_blocks(self, now_us: int) -> list[Block]:
        if self.group is None and self.groups.any and os.path.isdir(self.groups.processes):  # noqa: PTH112  # hot path
            cgroup.hold(self.groups)
            self.group = cgroup.GroupSource(self.groups, carried=self._carried)
        if self.group is None:
            return []
        try:
            return self.group.read()
        except (OSError, ValueError) as error:
            # Between two steps slurmstepd removes and makes the job's groups, and their counters begin anew.
            self._detach()
            self.say("cgroup", f"the job's control groups are gone ({error}); its counters go on with the next", now_us)
            return []

    def _processes_due(self, now_us: int, stretch: int) -> bool:
        if self.processes is None:
            return False
        dense = stretch == 1 and time.monotonic() < self._dense_until_s
        period_us = self.interval_us if dense else max(self.processes.period_s * 1e6, self.interval_us * stretch)
        return now_us - self._processes_us >= period_us - self.interval_us / 2

    def store(self, now_us: int, readings: tuple[Reading | None, Reading | None]) -> OSError | None:
        """Append a row; return what kept it from being stored."""
        late = schedule.missed(self.due_us, now_us, self.interval_us)
        if late and self.writer.last_us:
            text = f"{late} samples were not taken in time"
            self.say("gap", text, now_us, from_us=self.writer.last_us)
        try:
            self.writer.row(now_us, readings)
            if self._unstored_us:
                text = f"{self.failures} samples in all could not be stored"
                self.writer.note(Note(time_us=now_us, what="gap", text=text, from_us=self._unstored_us))
                self._unstored_us = 0
        except OSError as error:
            self.failures += 1
            self._unstored_us = self._unstored_us or self.writer.last_us or now_us
            return error
        return None

    def bound(self, bytes_max: int, interval_max_us: int, now_us: int) -> None:
        """Sample half as often whenever half of the room that was left is used: so there is always some left."""
        if self.writer.size < bytes_max * (1 - 0.5**self._cap_steps) or self.interval_us >= interval_max_us:
            return
        self._cap_steps += 1
        self.change_interval(min(self.interval_us * 2, interval_max_us), now_us)
        text = (
            f"sampled every {self.interval_us / 1e6:g} s from now on: {self.writer.size} of {bytes_max} bytes are used"
        )
        self.say("degraded", text, now_us)

    def change_interval(self, interval_us: int, now_us: int) -> None:
        self.interval_us = interval_us
        self.due_us = schedule.due_after_change_us(self.due_us, now_us, interval_us)

    def describe(self, job: Job, now_us: int) -> None:
        """Take what is better known of the job now than at its start."""
        self.job = job
        with contextlib.suppress(OSError):
            self.writer.note(Note(time_us=now_us, what="tags", text="more is known of the job", job=job))

    def say(self, what: str, text: str, now_us: int, *, from_us: int = 0) -> None:
        """Leave a note to readers; a disk that is full says so by itself."""
        note = msgspec.convert({"time_us": now_us, "what": what, "text": text, "from_us": from_us}, Note)
        with contextlib.suppress(OSError):
            self.writer.note(note)

    def end(self, now_us: int, costs_us: dict[str, float]) -> None:
        with contextlib.suppress(OSError):
            self.writer.note(Note(time_us=now_us, what="end", text="the job has ended here", cost_us=costs_us))

    def let_go(self, *, release: bool) -> None:
        """Close the sources; ``release``: the job has ended, so nothing shall keep its control groups."""
        if self.group is not None:
            self.group.close()
            self.group = None
        if self.processes is not None:
            self.processes.close()
            self.processes = None
        if self.gpus is not None:
            self.gpus.close()
            self.gpus = None
        if self.guests is not None:
            self.guests.close()
            self.guests = None
        if release:
            cgroup.release(self.groups)


def segments(root: Path) -> list[Path]:
    """Return all segments below a root: of jobs that run, or whose end nobody has worked on yet."""
    # Path.glob fails where a directory goes while it is looked through: one whose job's samples are too old.
    return sorted(root / found for found in glob.glob("*/*/samples.*.seg", root_dir=root))  # noqa: PTH207  # see above
