"""Jobs to try a site with: from a trace in the Standard Workload Format, or generated in bursts.

The format (version 2.2 of the Parallel Workloads Archive) has one job a line, 18 numbers, -1 for what is not known, and
comments that begin with a semicolon. What is used of it: submission (2), run time (4), processors given (5) or asked
for (8), and memory in KiB for each processor, asked for (10) or used (7).
"""

import math
from collections.abc import Iterable, Iterator
from random import Random

import msgspec

from carrel.errors import CarrelError
from carrel.model.host import Demand

_FIELDS = 18
_MEMORY_STEP_BYTES = 256 * 2**20
"""Guests come in sizes; and jobs of one size are one question to the queue."""

_LONGEST = 10
"""A partition has a time limit; without one, the end of a workload is its single longest job."""


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A job, before it is known when it runs."""

    at_s: float
    run_s: float
    demand: Demand


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How the processors of a job become guests."""

    cpus_max: int
    """A guest has no more; a wider job has several."""
    memory_per_cpu_bytes: int
    """Where a trace does not say."""


class Bursts(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that come many at once."""

    jobs: int
    burst: int = 100
    """So many come together."""
    every_s: float = 300.0
    run_s: float = 300.0
    """About the mean; run times are log-normal, so that few are long, and none is longer than ten times this."""
    cpus: tuple[int, ...] = (1, 2, 4, 8)
    """Sizes, each as likely as another."""


def generate(bursts: Bursts, sizes: Sizes, *, seed: int) -> Iterator[Arrival]:
    """Yield the jobs in the order of their submission; a seed repeats them."""
    random = Random(seed)  # noqa: S311  # it keeps no secret
    shapes: dict[int, Demand] = {}
    # The mean of a log-normal is exp(mu + sigma² / 2); with sigma 1 that is 1.65 times its median.
    median = bursts.run_s / 1.6487
    for number in range(bursts.jobs):
        cpus = random.choice(bursts.cpus)
        if cpus not in shapes:
            shapes[cpus] = guests(cpus, cpus * sizes.memory_per_cpu_bytes, sizes)
        run_s = round(median * random.lognormvariate(0.0, 1.0), 3)
        run_s = min(max(run_s, 1.0), _LONGEST * bursts.run_s)
        yield Arrival(number // bursts.burst * bursts.every_s, run_s, shapes[cpus])


def read_swf(lines: Iterable[str], sizes: Sizes) -> Iterator[Arrival]:
    """Yield the jobs of a trace that ran, in its order; what was cancelled before it ran is left out.

    Raises:
        CarrelError: a line is not of the format; the sentence has its number.
    """
    shapes: dict[tuple[int, int], Demand] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition(";")[0].strip()
        if not text:
            continue
        fields = text.split()
        try:
            values = [float(field) for field in fields]
        except ValueError:
            values = []
        if len(values) < _FIELDS or not all(map(math.isfinite, values)):
            raise CarrelError(
                f"line {number}: {text[:40]!r} is no job of the Standard Workload Format ({_FIELDS} numbers)"
            )
        at_s, run_s = values[1], values[3]
        cpus = int(values[4] if values[4] > 0 else values[7])
        if run_s < 0 or cpus < 1:
            continue
        kib = next((each for each in (values[9], values[6]) if each > 0), 0)
        memory_bytes = cpus * (int(kib * 2**10) or sizes.memory_per_cpu_bytes)
        memory_bytes = -(-memory_bytes // _MEMORY_STEP_BYTES) * _MEMORY_STEP_BYTES
        shape = (cpus, memory_bytes)
        if shape not in shapes:
            shapes[shape] = guests(cpus, memory_bytes, sizes)
        yield Arrival(at_s, run_s, shapes[shape])


def guests(cpus: int, memory_bytes: int, sizes: Sizes) -> Demand:
    """Return a job's guests: as few as there can be, all alike.

    >>> guests(20, 20 * 2**30, Sizes(cpus_max=8, memory_per_cpu_bytes=0))
    Demand(cpus=7, memory_bytes=7158278827, count=3, apart=False)
    """
    count = -(-cpus // sizes.cpus_max)
    return Demand(cpus=-(-cpus // count), memory_bytes=-(-memory_bytes // count), count=count)
