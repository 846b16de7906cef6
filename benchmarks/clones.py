"""Bare tasks and each kind of clone, paired in one run: from ``srun`` to its command's first word, and their memory.

All are on one node, which Slurm believes to have memory for all of them, and CPUs for as many as come.
"""

import json
import os
import statistics
import subprocess  # many commands at once, each with its pipes
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from carrel.sandbox.cluster import Sandbox

Row = Callable[..., float]

IMAGE = "debian12"
CONF = "PartitionName=shared Nodes=ALL OverSubscribe=FORCE:64"
RESERVE_MIB = 160
CARREL_CONF = f'[guests]\nclone = "linked"\nboot_timeout_s = 600.0\nmemory_reserve_bytes = {RESERVE_MIB * 2**20}\n'
COUNTS = (1, 10, 20)
KINDS = ("bare", "instant", "linked", "full")
SIZES_MIB = (256, 1024)
NODE_MEMORY_MB = 64000
END_TIMEOUT_S = 120.0


class Task:
    """A task that says its job's id first and then waits until it is told to end."""

    def __init__(self, box: Sandbox, kind: str, memory_mib: int) -> None:
        guest = [] if kind == "bare" else [f"--guest={IMAGE}", f"--guest-clone={kind}"]
        options = ["-p", "shared", "-N1", "-n1", f"--mem={memory_mib + RESERVE_MIB}", *guest]
        self.begun_s = time.monotonic()
        self._srun = subprocess.Popen(
            ["srun", *options, "sh", "-c", "echo $SLURM_JOB_ID; read word; exit 0"],
            env={**os.environ, **box.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def first_word(self) -> tuple[int, float]:
        """Return the job's id and when it came."""
        assert self._srun.stdout is not None
        word = self._srun.stdout.readline()
        at_s = time.monotonic()
        assert word.strip().isdigit(), f"srun said {word!r}"
        return int(word), at_s

    def end(self) -> None:
        assert self._srun.stdin is not None
        self._srun.stdin.close()
        self._srun.wait(END_TIMEOUT_S)


@contextmanager
def wave(box: Sandbox, kind: str, count: int, memory_mib: int) -> Iterator[tuple[list[int], float]]:
    """Start tasks at once; yield their jobs, and ms from the first ``srun`` to the last first word."""
    tasks = [Task(box, kind, memory_mib) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as threads:
            words = list(threads.map(Task.first_word, tasks))
        yield [job_id for job_id, _ in words], (max(at_s for _, at_s in words) - tasks[0].begun_s) * 1000
    finally:
        for task in tasks:
            task.end()
        until_none_is_left(box)


def launching(box: Sandbox, row: Row, repeat: int) -> None:
    """At once: bare, instant, linked and full, in turn; and what the starts consisted of."""
    for count in COUNTS:
        seen: dict[str, list[float]] = {kind: [] for kind in KINDS}
        phases: dict[tuple[str, str], list[float]] = {}
        for _ in range(repeat):
            for kind in KINDS:
                with wave(box, kind, count, SIZES_MIB[0]) as (jobs, took_ms):
                    seen[kind].append(took_ms)
                    for guest in guests(box) if kind != "bare" else ():
                        assert guest["job_id"] in jobs
                        assert guest["clone"] == kind, guest["clone_why"]
                        for phase, seconds in guest["phases"].items():
                            phases.setdefault((kind, phase), []).append(seconds * 1000)
        for kind in KINDS:
            row(f"{count} at once, {kind}: to the last one's first word", seen[kind], "ms")
            for (of, phase), values in phases.items():
                if of == kind:
                    row(f"  of which in the guest's start: {phase}", values, "ms")
        instant = statistics.median(seen["instant"])
        row(f"{count} at once, full over instant", [statistics.median(seen["full"]) / instant], "times")
        row(f"{count} at once, instant over bare", [instant - statistics.median(seen["bare"])], "ms more")


def memory(box: Sandbox, row: Row, _repeat: int) -> None:
    """What the n-th instant clone of a template takes once it has run a command, with n - 1 others beside it."""
    for size_mib in SIZES_MIB:
        tasks: list[Task] = []
        try:
            for number in range(1, max(COUNTS) + 1):
                tasks.append(Task(box, "instant", size_mib))
                job_id, _ = tasks[-1].first_word()
                if number in COUNTS:
                    (guest,) = guests(box, job_id)
                    pss_mb, shared_mb = (guest[key] / 1e6 for key in ("memory_pss_bytes", "memory_shared_bytes"))
                    share = f"{pss_mb * 1e6 / guest['memory_bytes']:.0%} of its RAM, {shared_mb:.0f} MB shared"
                    row(f"PSS of instant clone {number}, {size_mib} MiB of memory", [pss_mb], "MB", share)
        finally:
            for task in tasks:
                task.end()
            until_none_is_left(box)


def measure(row: Row, repeat: int) -> None:
    """Do all of it in a cluster of its own."""
    with Sandbox(nodes=1, node_memory_mb=NODE_MEMORY_MB, extra_conf=CONF, carrel_conf=CARREL_CONF) as box:
        sizes = ",".join(str(size + RESERVE_MIB) for size in SIZES_MIB)
        done = box.run(["carrel", "image", "warm", IMAGE, "--memory", sizes], timeout_s=600)
        assert done.returncode == 0, done.stderr
        for kind in KINDS:  # the page cache is warm for all
            with wave(box, kind, 1, SIZES_MIB[0]):
                pass
        launching(box, row, repeat)
        memory(box, row, repeat)


def guests(box: Sandbox, job_id: int | None = None) -> Sequence[dict[str, Any]]:
    """Return the guests, or those of a job with the memory that they take."""
    words = ["list"] if job_id is None else ["show", str(job_id)]
    done = box.run(["carrel", "guest", *words, "--json"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def until_none_is_left(box: Sandbox) -> None:
    """Wait until every guest is gone, or one kind's end would fall into the next one's start."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while guests(box) or box.run(["squeue", "-h"]).stdout.strip():
        assert time.monotonic() < deadline_s, "guests do not end"
        time.sleep(0.05)  # the fact is in another process
