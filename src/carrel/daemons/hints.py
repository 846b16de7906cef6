"""Hints of the hooks: ``<directory>/begin.4711``, empty files that ``sh`` leaves without a Python.

A prolog leaves ``begin``, and ``report`` where a report is wanted in the job's output; an epilog ``end``.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

FRESH_S = 10.0
"""Of what began and ended while no carreld lived, nothing can be seen any more."""


class Hint(NamedTuple):
    """A job has begun, or ended, on this node, or wants a report in its output."""

    job_id: int
    what: Literal["report", "begin", "end"]


class Hints:
    """Those of one node."""

    def __init__(self, directory: Path) -> None:
        """Read nothing yet."""
        self.directory = directory

    def prepare(self, *, wanted: bool) -> None:
        """Make the directory, or remove it: then hooks leave nothing.

        Raises:
            OSError: it cannot be made.
        """
        if wanted:
            self.directory.mkdir(mode=0o700, exist_ok=True)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def taken(self) -> Iterator[Hint]:
        """Yield what was left since the last call: wishes first, then for each job in the order of time."""
        left: dict[int, list[tuple[float, str]]] = {}
        try:
            found = list(self.directory.iterdir())
        except OSError:
            return
        for path in found:
            kind, _, job_id = path.name.partition(".")
            try:
                left_s = path.stat().st_mtime
                path.unlink()
            except OSError:
                continue
            if not (job_id.isascii() and job_id.isdigit()):
                continue
            if kind == "report":
                yield Hint(int(job_id), "report")
            else:
                left.setdefault(int(job_id), []).append((left_s, kind))
        for number, hints in sorted(left.items()):
            last_s, last = max(hints)
            if last == "begin" or (len(hints) > 1 and time.time() - last_s < FRESH_S):
                yield Hint(number, "begin")
            if last == "end":
                yield Hint(number, "end")
