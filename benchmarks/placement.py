# ruff: noqa: S311  # chance here keeps no secret
"""Measure placement, the queue and the simulator on this machine, and print what was seen.

Usage: .venv/bin/python benchmarks/placement.py [--repeat 5] [--jobs 100000] [--whole]

Every figure is a median of ``--repeat`` measurements with its spread, on one core. ``--whole`` also simulates a million
jobs on ten thousand hosts under each policy, once, which takes minutes. Nothing is asserted.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import get_args

from carrel.config import Launches, Rate
from carrel.core.placement import Hosts
from carrel.core.simulation import Setting, Simulation, Summary
from carrel.core.workload import Bursts, Sizes, generate
from carrel.hosts.table import Facts, HostTable
from carrel.model.host import Demand, Here, Host, Policy

GIB = 2**30
CPUS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
HOST_CPUS, HOST_MEMORY_BYTES = 48, 192 * GIB
ADMISSIONS = 20_000
TAKES = 300
LOAD = 0.9
"""Of what the hosts can do, in the bursts: a queue forms and goes."""
RUN_S = 600.0
EVERY_S = 15.0


def hosts(count: int) -> tuple[Host, ...]:
    return tuple(Host(name=f"h{at}", cpus=HOST_CPUS, memory_bytes=HOST_MEMORY_BYTES) for at in range(count))


def row(what: str, values: Sequence[float], unit: str, note: str = "") -> None:
    """Print the median and the spread."""
    middle, spread = statistics.median(values), f"{min(values):.4g} … {max(values):.4g}"
    print(f"{what:<58} {middle:>9.4g} {unit:<9} {spread:<20} n={len(values)} {note}", flush=True)


def admissions_per_s(count: int, policy: Policy) -> float:
    """Fill hosts and keep them nearly full: each admission that finds no room is followed by an end."""
    index = Hosts(hosts(count), policy=policy, random=Random(1))
    random = Random(2)
    demands = [Demand(cpus=cpus, memory_bytes=2 * GIB * cpus) for cpus in CPUS]
    carried: list[tuple[Here, Demand]] = []
    begun_s = time.perf_counter()
    for _ in range(ADMISSIONS):
        demand = random.choice(demands)
        answer = index.admit(demand)
        if isinstance(answer, Here):
            carried.append((answer, demand))
        if not isinstance(answer, Here) or len(carried) > count:
            at = random.randrange(len(carried))
            carried[at], carried[-1] = carried[-1], carried[at]
            index.give_back(*carried.pop())
    return ADMISSIONS / (time.perf_counter() - begun_s)


def takes_per_s(count: int) -> float:
    """Take places and give them back through the controller's table, each in a transaction that is on the disk."""
    with tempfile.TemporaryDirectory() as directory:
        table = HostTable(Path(directory) / "hosts.db", partial(Hosts, policy="best-fit"))
        table.put(Facts(name=host.name, cpus=host.cpus, memory_bytes=host.memory_bytes) for host in hosts(count))
        demand = Demand(cpus=4, memory_bytes=GIB)
        begun_s = time.perf_counter()
        for number in range(TAKES):
            table.take(str(number), demand, partial(Hosts.place, demand=demand))
        took_s = time.perf_counter() - begun_s
        table.close()
    return TAKES / took_s


def history(count: int, jobs: int, policy: Policy) -> tuple[Summary, float]:
    """Simulate bursts that keep the hosts busy; return what came of it, and the seconds that it took."""
    mean_cpus = sum(CPUS) / len(CPUS)
    burst = max(int(count * HOST_CPUS * LOAD * EVERY_S / (mean_cpus * RUN_S)), 1)
    setting = Setting(
        hosts=hosts(count),
        policy=policy,
        clone="instant",
        clone_s=1.0,
        launches=Launches(rate=Rate(instant=10**9)),
    )
    bursts = Bursts(jobs=jobs, burst=burst, every_s=EVERY_S, run_s=RUN_S, cpus=CPUS)
    sizes = Sizes(cpus_max=HOST_CPUS, memory_per_cpu_bytes=2 * GIB)
    begun_s = time.perf_counter()
    summary = Simulation(setting).run(generate(bursts, sizes, seed=1))
    return summary, time.perf_counter() - begun_s


def whole() -> None:
    """A million jobs on ten thousand hosts."""
    for policy in get_args(Policy):
        found, took_s = history(10_000, 1_000_000, policy)
        print(
            f"1,000,000 jobs on 10,000 hosts, {policy:<13} {took_s:>7.0f} s  {found.events / took_s:>7.0f} events/s  "
            f"in use {found.utilisation:.1%}  wait {found.wait_s.mean:.0f} s  slow-down {found.slowdown.mean:.2f}",
            flush=True,
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--whole", action="store_true")
    words = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}")

    def measure(what: str, one: Callable[[], float], unit: str) -> None:
        row(what, [one() for _ in range(words.repeat)], unit)

    for count in (1_000, 10_000):
        for policy in get_args(Policy):
            measure(f"admissions, {policy}, {count:,} hosts", partial(admissions_per_s, count, policy), "1/s")
        measure(f"takes in the table, best-fit, {count:,} hosts", partial(takes_per_s, count), "1/s")
    for count in (1_000, 10_000):
        for policy in get_args(Policy):
            runs = [history(count, words.jobs, policy) for _ in range(words.repeat)]
            rates = [found.events / took_s for found, took_s in runs]
            row(f"simulator, {words.jobs:,} jobs, {policy}, {count:,} hosts", rates, "events/s")
    if words.whole:
        whole()


if __name__ == "__main__":
    main()
