"""The site's ldmsd in the place of our own sampler: one for each job, which the aggregator is told of.

To who asks, it is a sampler like ours: what begins, ends and changes is asked for, and done by the thread in ``run``.
Its state is what can be found: records of samplers that were started, and the aggregator's own objects.
"""

import heapq
import itertools
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import msgspec

from carrel.config import Config
from carrel.errors import CarrelError, NotFoundError, RefusedError, UnreachableError
from carrel.ldms import control, plan
from carrel.model.job import Job, JobKey
from carrel.model.sample import SamplerStatus, Series
from carrel.sampling.cgroup import JobGroups
from carrel.sampling.folder import JobFolder

RETRY_S = 10.0
RETELL_S = 60.0
"""An aggregator that was started again has forgotten all jobs, and is told of them again so often."""
FORGOTTEN_S = 120.0
"""A sampler that has died and that nobody has asked for by then belongs to a job that ended while no carreld lived."""
LAST_PULLS = 2
"""The aggregator gets a job's last sample by pulling it, so the sampler stays for as many pulls after the job's end."""
_WAIT_MAX_S = 30.0

_T = TypeVar("_T")


class LdmsSampler:
    """Samplers of LDMS for the jobs of one node."""

    def __init__(self, settings: Config, node: str, directory: Path) -> None:
        """Find the samplers that an earlier carreld started."""
        self._settings = settings
        self._ldms = settings.ldms
        self._node = node
        self._directory = directory / "ldms"
        self._jobs = {one.place.job.key: one for one in control.records(self._directory)}
        self._ending: set[JobKey] = set()
        self._untold: set[JobKey] = set()
        """The aggregator does not know of these yet."""
        self._decomposition = Path(settings.ldms.store_dir) / "as_is.json"
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._stopping = False
        self._awake_s = 0.0
        self._failures: Counter[str] = Counter()
        self._last_failure = ""
        self._later(self._retell, RETELL_S)
        self._later(self._sweep, FORGOTTEN_S)

    # ---- what callers ask for

    def add(self, job: Job, *, pid: int = 0, interval_s: float | None = None) -> "Future[Path]":  # noqa: ARG002  # LDMS samples the node
        """Sample a job from now on; the answer is the directory of its report. A second call changes nothing."""
        return self._ask(lambda: self._add(job, interval_s))

    def attach(self, run: JobKey, pid: int) -> "Future[JobGroups]":  # noqa: ARG002  # LDMS samples the node
        """Do nothing: LDMS counts by node."""
        return self._ask(JobGroups)

    def adopt(self, run: JobKey, groups: JobGroups) -> "Future[JobGroups]":  # noqa: ARG002  # LDMS samples the node
        """Do nothing: LDMS counts by node."""
        return self._ask(lambda: groups)

    def attach_guest(self, run: JobKey, pid: int) -> "Future[None]":  # noqa: ARG002  # LDMS samples the node
        """Do nothing: LDMS counts by node."""
        return self._ask(lambda: None)

    def guest_disks(self, run: Series, guest: str, counters: Mapping[str, int]) -> "Future[None]":  # noqa: ARG002  # the same
        """Do nothing: LDMS counts by node."""
        return self._ask(lambda: None)

    def describe(self, job: Job) -> "Future[None]":  # noqa: ARG002  # LDMS has no place for it
        """Do nothing: LDMS knows a job's number and user."""
        return self._ask(lambda: None)

    def interval(self, run: JobKey, seconds: float) -> "Future[None]":
        """Sample a running job this often from now on."""
        return self._ask(lambda: self._change_interval(self._job(run), seconds))

    def remove(self, run: JobKey) -> "Future[JobFolder]":
        """End a job's sampling once the aggregator has its last sample; the caller closes the answer."""
        answer: Future[JobFolder] = Future()
        self._ask(lambda: self._remove(self._job(run), answer)).add_done_callback(
            lambda done: answer.set_exception(error) if (error := done.exception()) else None
        )
        return answer

    def runs(self) -> tuple[JobKey, ...]:
        """Return what is being sampled, also since before this process began."""
        return tuple(run for run, one in self._jobs.copy().items() if one.pid.alive and run not in self._ending)

    def status(self) -> SamplerStatus:
        """Return how it goes."""
        return SamplerStatus(
            jobs=len(self.runs()),
            failures=dict(self._failures),
            last_failure=self._last_failure,
            awake_s=self._awake_s,
        )

    def stop(self) -> None:
        """End ``run``. Samplers go on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # ---- the thread

    def run(self) -> None:
        """Work until stopped."""
        while not self._stopping:
            self._awake_s = time.time()
            deed = self._awaited()
            if deed is not None:
                deed()

    def _awaited(self) -> Callable[[], None] | None:
        with self._wake:
            if not self._stopping:
                until_s = self._due[0][0] - time.monotonic() if self._due else _WAIT_MAX_S
                if until_s > 0:
                    self._wake.wait(min(until_s, _WAIT_MAX_S))
            if self._due and self._due[0][0] <= time.monotonic():
                return heapq.heappop(self._due)[2]
        return None

    def _later(self, deed: Callable[[], None], after_s: float = 0.0) -> None:
        with self._wake:
            heapq.heappush(self._due, (time.monotonic() + after_s, next(self._numbers), deed))
            self._wake.notify()

    def _ask(self, deed: Callable[[], _T]) -> "Future[_T]":
        answer: Future[_T] = Future()

        def command() -> None:
            try:
                answer.set_result(deed())
            except Exception as error:  # noqa: BLE001  # whatever it is, it is the caller's, and the others go on
                if not isinstance(error, NotFoundError | RefusedError):
                    self._failed("command", error)
                answer.set_exception(error)

        self._later(command)
        return answer

    def _failed(self, what: str, error: Exception) -> None:
        self._failures[what] += 1
        self._last_failure = f"{what}: {error}"

    def _job(self, run: JobKey) -> control.Record:
        if run not in self._jobs:
            raise NotFoundError(f"job {run} is not being sampled on {self._node}; has it ended?")
        return self._jobs[run]

    def _add(self, job: Job, interval_s: float | None) -> Path:
        folder = self._folder(job)
        path = folder.path
        folder.close()
        known = self._jobs.get(job.key)
        if known is None or not known.pid.alive:
            period_s = self._possible(interval_s or self._settings.metrics.period_s)
            taken = [one.place.port for run, one in self._jobs.items() if run != job.key]
            if known:
                control.stop(known, self._directory)
            port = known.place.port if known else control.free_port(taken, self._ldms)
            place = plan.Place(job=job, node=self._node, host=socket.gethostname(), port=port)
            self._jobs[job.key] = control.start(place, self._ldms, self._directory, period_s=period_s)
            self._untold.add(job.key)
            self._tell(job.key)
        return path

    def _tell(self, run: JobKey) -> None:
        """Tell the aggregator of a job, again and again until it has heard it: what it pulls is of now."""
        record = self._jobs.get(run)
        if record is None or run not in self._untold:
            return
        commands = plan.begin(
            record.place, self._ldms, period_s=record.period_s, decomposition=str(self._decomposition)
        )
        try:
            control.tell(self._ldms.aggregator, self._ldms.aggregator_port, commands, self._ldms)
        except UnreachableError as error:
            self._failed("aggregator", error)
            self._later(lambda: self._tell(run), RETRY_S)
        else:
            self._untold.discard(run)

    def _retell(self) -> None:
        """Each command that was carried out before is refused, and changes nothing."""
        for run in self.runs():
            self._untold.add(run)
            self._tell(run)
        self._later(self._retell, RETELL_S)

    def _sweep(self) -> None:
        for record in list(self._jobs.values()):
            if not record.pid.alive and record.place.job.key not in self._ending:
                self._ending.add(record.place.job.key)
                self._end(record)

    def _possible(self, seconds: float) -> float:
        low, high = self._settings.metrics.period_min_s, self._settings.metrics.period_max_s
        if not low <= seconds <= high:
            raise RefusedError(f"a job cannot be sampled every {seconds:g} s; here from {low:g} to {high:g} s")
        return seconds

    def _change_interval(self, record: control.Record, seconds: float) -> None:
        period_s = self._possible(seconds)
        place = record.place
        control.tell("localhost", place.port, plan.resample(self._ldms, period_s=period_s).splitlines(), self._ldms)
        commands = plan.repull(place, period_s=period_s)
        control.tell(self._ldms.aggregator, self._ldms.aggregator_port, commands, self._ldms)
        self._jobs[place.job.key] = msgspec.structs.replace(record, period_s=period_s)

    def _remove(self, record: control.Record, answer: "Future[JobFolder]") -> None:
        run = record.place.job.key
        self._ending.add(run)
        after_s = min(record.period_s * LAST_PULLS, _WAIT_MAX_S / 2)
        self._later(lambda: self._last(record, answer), after_s)

    def _last(self, record: control.Record, answer: "Future[JobFolder]") -> None:
        self._end(record)
        try:
            answer.set_result(self._folder(record.place.job))
        except (CarrelError, OSError) as error:
            answer.set_exception(error)

    def _end(self, record: control.Record) -> None:
        """End the sampler; its port is free once the aggregator has let go of it, or it would take another's rows."""
        run = record.place.job.key
        record.pid.kill(signal.SIGTERM)
        self._untold.discard(run)
        try:
            commands = plan.end(record.place, self._ldms)
            control.tell(self._ldms.aggregator, self._ldms.aggregator_port, commands, self._ldms)
        except CarrelError as error:
            self._failed("aggregator", error)
            self._later(lambda: self._end(record), RETRY_S)
            return
        control.stop(record, self._directory)
        self._jobs.pop(run, None)
        self._ending.discard(run)

    def _folder(self, job: Job) -> JobFolder:
        root = Path(self._settings.metrics.root)
        return JobFolder.make(root, job.key, user=job.user, uid=job.uid, gid=job.gid)
