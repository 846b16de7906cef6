"""Finding where a job is counted: its first task leads to its control groups, and its guest's process to its guest.

slurmstepd puts a task into its groups before it becomes the program, so a look too early is repeated, and bounded.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

from carrel.daemons.held import HeldGroups
from carrel.daemons.sampler_thread import JobSampler, SamplerThread, answer
from carrel.errors import CarrelError
from carrel.model.guest import Guest
from carrel.model.job import JobKey
from carrel.process import Pid, process_state
from carrel.sampling import cgroup
from carrel.sampling.cgroup import JobGroups
from carrel.slurm.steps import Step, task_of

TIMEOUT_S = 10.0
PAUSE_S, PAUSE_MAX_S = 0.02, 1.0


class Attacher:
    """Tells a sampler where the jobs of a node are counted."""

    def __init__(
        self,
        sampling: SamplerThread[JobSampler],
        held: HeldGroups,
        beginning: Mapping[int, "asyncio.Task[None]"],
        remember: Callable[[JobKey, JobGroups], None],
    ) -> None:
        """Attach nothing yet.

        Args:
            sampling: Has the sampler.
            held: What was kept of jobs before their runs had names.
            beginning: By job id: Slurm is asked whose run it is.
            remember: Keeps the groups of a run for the next carreld.
        """
        self._sampling = sampling
        self._held = held
        self._beginning = beginning
        self._remember = remember
        self._working: dict[Pid, asyncio.Task[None]] = {}
        self._done: set[Pid] = set()

    def steps(self, steps: Iterable[Step]) -> None:
        """Attach what is new among the steps that live. Returns at once."""
        self._done = {manager for manager in self._done if manager.alive}
        for step in steps:
            self._start(step, self._step)

    def guest(self, guest: Guest) -> None:
        """Attach the process of a guest that is ready: without control groups it is below no step. Returns at once."""
        state = process_state(guest.pid) if guest.state == "ready" and guest.pid else None
        if guest.run and state:
            self._start(Step(guest.run.job_id, guest.name, Pid(guest.pid, state[1])), self._guest)

    def anew(self) -> None:
        """Attach all again: the sampler is a new one."""
        self._done.clear()

    def stop(self) -> None:
        """Attach nothing more."""
        for task in self._working.values():
            task.cancel()

    async def take_over(self, run: JobKey) -> None:
        """Count what was kept of a job while Slurm was asked whose it is: its tasks may be gone already."""
        groups, sampler = self._held.of(run.job_id), self._sampling.sampler
        if groups.any and sampler:
            with contextlib.suppress(CarrelError, OSError, TimeoutError):
                counted = await answer(sampler.adopt(run, groups))
                self._remember(run, counted)
                self._held.hand_over(run.job_id)

    def _start(self, step: Step, work: Callable[[Step], Coroutine[Any, Any, None]]) -> None:
        if step.manager not in self._done and step.manager not in self._working:
            self._working[step.manager] = task = asyncio.ensure_future(work(step))
            task.add_done_callback(partial(self._forget, step.manager))

    def _forget(self, manager: Pid, _: "asyncio.Task[None]") -> None:
        self._working.pop(manager, None)

    async def _step(self, step: Step) -> None:
        """Count what a step counts, once its first task is in its groups."""
        deadline_s = time.monotonic() + TIMEOUT_S
        pause_s = PAUSE_S
        while step.manager.alive and time.monotonic() < deadline_s:
            if (pid := task_of(step.manager)) and (beginning := self._beginning.get(step.job_id)):
                with contextlib.suppress(OSError):  # it has just ended
                    self._held.hold(step.job_id, cgroup.of_process(pid))
                await asyncio.wait([beginning])
            if pid and await self._attached(step, pid):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    async def _guest(self, step: Step) -> None:
        run = self._run(step.job_id)
        if run and await self._attached(step, step.manager.number) and self._sampling.sampler:
            with contextlib.suppress(CarrelError, TimeoutError):  # it ends just now
                await answer(self._sampling.sampler.attach_guest(run, step.manager.number))

    async def _attached(self, step: Step, pid: int) -> bool:
        sampler, run = self._sampling.sampler, self._run(step.job_id)
        if sampler is None or run is None:
            return False
        await self.take_over(run)
        try:
            # Without groups, the step is what its manager has started.
            whose = pid if cgroup.of_process(pid).any else step.manager.number
            groups = await answer(sampler.attach(run, whose))
        except (OSError, CarrelError, TimeoutError):
            return False
        self._remember(run, groups)
        self._done.add(step.manager)
        return True

    def _run(self, job_id: int) -> JobKey | None:
        sampler = self._sampling.sampler
        return max((run for run in (sampler.runs() if sampler else ()) if run.job_id == job_id), default=None)
