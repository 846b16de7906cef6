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
from carrel.errors import CarrelError
from carrel.process import run_async
from carrel.sampling import compact, prune
from carrel.sampling.folder import JobFolder, of_stem
from carrel.sampling.job import segments
from carrel.sampling.spool import Spool

TABLES_TIMEOUT_S = 3600.0
REPORT_TIMEOUT_S = 120.0
RETRY_S = 600.0
PRUNE_PERIOD_S = 86400.0
"""Nodes may share the root: each looks at all of it once a day, at a moment of its own."""


class Work(NamedTuple):
    """The samples of one run on this node, of all views."""

    open: Callable[[], JobFolder]
    done: Callable[[], None]
    output: Callable[[], Awaitable[str]] | None = None
    """Asked for the file at whose end what the job used is to be printed, once; None: nowhere."""
    node: str = ""
    """The guest whose samples these are, where it was a Slurm node; empty: this node's own."""


class Finisher:
    """Makes tables of what it is given, and removes old samples."""

    def __init__(
        self, settings: Metrics, node: str, *, spool: Spool | None, failed: Callable[[str, Exception], None]
    ) -> None:
        """Wait for work; ``failed`` is told of what went wrong, ``spool`` knows what sinks have yet to take."""
        self._spool = spool
        self._settings = settings
        self._node = node
        self._failed = failed
        self._work: asyncio.Queue[Work] = asyncio.Queue()
        self._reports: set[asyncio.Task[None]] = set()

    def put(self, work: Work) -> None:
        """Do it soon, and again until it is done: a disk may be full for an hour."""
        self._work.put_nowait(work)

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
                    asyncio.get_running_loop().call_later(RETRY_S, self.put, work)
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
                if name.endswith(".seg") and self._ours(name, work.node):
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

    def _ours(self, name: str, node: str = "") -> bool:
        """Say whether samples are of this node, or of a guest on it; or of the guest that is called ``node``."""
        return name.startswith("samples.") and of_stem(name)[0].partition(":")[0] == (node or self._node)

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
        folders = {path.parent for path in await asyncio.to_thread(segments, root) if self._ours(path.name)}
        for folder in sorted(folders):
            if not known(folder):
                self.put(Work(partial(JobFolder.found, root, folder), _nothing))

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_PERIOD_S * random.random())  # noqa: S311  # so that nodes do not meet
            with contextlib.suppress(OSError):
                await asyncio.to_thread(prune.prune, self._settings)


def _nothing() -> None:
    """Nobody waits for it."""
