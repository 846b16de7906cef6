"""What is left to do when the samples of a job are all there: tables, by one process after the other; and old ones go.

One at a time and at the lowest priority: the node's CPUs are the next job's.
"""

import asyncio
import contextlib
import os
import random
import subprocess  # awaited here; see carrel.sampling.compact
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from carrel.config import Metrics
from carrel.daemons.records import Sampled
from carrel.errors import CarrelError
from carrel.process import run_async
from carrel.sampling import compact, prune
from carrel.sampling.folder import JobFolder, of_stem
from carrel.sampling.job import segments
from carrel.sampling.spool import Spool
from carrel.slurm.client import SlurmClient

TABLES_TIMEOUT_S = 3600.0
REPORT_TIMEOUT_S = 120.0
RETRY_S = 600.0
PRUNE_PERIOD_S = 86400.0
"""Nodes may share the root: each looks at all of it once a day, at a moment of its own."""


class Work(NamedTuple):
    """The samples of one run on this node, of all views."""

    open: Callable[[], JobFolder]
    done: Callable[[], None]
    node: str
    """The node whose samples these are: this one, or a guest on it that was a Slurm node."""
    output: Callable[[], Awaitable[str]] | None = None
    """Asked for the file at whose end what the job used is to be printed, once; None: nowhere."""


class Finisher:
    """Makes tables of what it is given, and removes old samples."""

    def __init__(
        self,
        settings: Metrics,
        node: str,
        slurm: SlurmClient,
        *,
        spool: Spool | None,
        failed: Callable[[str, Exception], None],
    ) -> None:
        """Wait for work; ``slurm`` knows jobs' outputs, ``spool`` what sinks have yet to take, ``failed`` counts."""
        self._spool = spool
        self._settings = settings
        self._node = node
        self._slurm = slurm
        self._failed = failed
        self._work: asyncio.Queue[Work] = asyncio.Queue()
        self._reports: set[asyncio.Task[None]] = set()

    def put(self, sampled: Sampled, done: Callable[[], None]) -> None:
        """Make a run's tables soon, and again until they are made, which ``done`` is told: a disk may be full."""
        job, node = sampled.job, sampled.node or self._node
        root = Path(self._settings.root)
        folder = partial(JobFolder.make, root, job.key, user=job.user, uid=job.uid, gid=job.gid)
        # Where the batch script ran, since its output is there; a step of srun alone has no file of its own.
        wanted = sampled.report and job.nodes[:1] == (node,)
        output = partial(self._slurm.output, job.key.job_id) if wanted else None
        self._work.put_nowait(Work(folder, done, node, output))

    async def run(self) -> None:
        """Work until cancelled."""
        pruning = asyncio.ensure_future(self._prune())
        try:
            while True:
                work = await self._work.get()
                try:
                    await self._finish(work)
                except FileNotFoundError:
                    work.done()  # its owner has removed it
                except (OSError, CarrelError) as error:
                    self._failed("tables", error)
                    asyncio.get_running_loop().call_later(RETRY_S, self._work.put_nowait, work)
                else:
                    work.done()
        finally:
            pruning.cancel()
            for report in self._reports:
                report.cancel()

    async def _finish(self, work: Work) -> None:
        folder = await asyncio.to_thread(work.open)
        try:
            for name in await asyncio.to_thread(os.listdir, folder.descriptor):
                if name.endswith(".seg") and _is_of(name, work.node):
                    await self._make_tables(folder, name.removesuffix(".seg"))
            if work.output is not None:
                # The tables of the next job do not wait for it.
                report = asyncio.ensure_future(self._report(work.output, folder.path, folder.uid))
                self._reports.add(report)
                report.add_done_callback(self._reports.discard)
        finally:
            folder.close()

    async def _make_tables(self, folder: JobFolder, stem: str) -> None:
        child = await asyncio.to_thread(compact.spawn, folder, stem, self._settings.formats, spool=self._spool)
        try:
            _, said = await asyncio.to_thread(child.communicate, timeout=TABLES_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise CarrelError(f"{folder.path}: no tables after {TABLES_TIMEOUT_S:g} s; is its disk slow?") from None
        if child.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exited with {child.returncode}"]
            raise CarrelError(f"{folder.path}: {last[0]}")

    async def _report(self, output: Callable[[], Awaitable[str]], path: Path, uid: int) -> None:
        """Print what the job used at the end of its output. What fails is counted: the job has ended."""
        try:
            if file := await output():
                # By name: what people see is above us, and in a process of its own, which becomes the user.
                words = [sys.executable, "-m", "carrel.cli.atend", str(path), file]
                await run_async([*words, "--uid", str(uid)], timeout_s=REPORT_TIMEOUT_S)
        except CarrelError as error:
            self._failed("report", error)

    async def leftovers(self, known: Callable[[Path], bool]) -> None:
        """Finish what this node has begun and nobody remembers: it lost its power, or its directory."""
        root = Path(self._settings.root)
        folders = {path.parent for path in await asyncio.to_thread(segments, root) if _is_of(path.name, self._node)}
        for folder in sorted(folders):
            if not known(folder):
                self._work.put_nowait(Work(partial(JobFolder.found, root, folder), _nothing, self._node))

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_PERIOD_S * random.random())  # noqa: S311  # so that nodes do not meet
            with contextlib.suppress(OSError):
                await asyncio.to_thread(prune.prune, self._settings)


def _is_of(name: str, node: str) -> bool:
    """Say whether samples are of this node, or of a guest on it."""
    return name.startswith("samples.") and of_stem(name)[0].partition(":")[0] == node


def _nothing() -> None:
    """Nobody waits for it."""
