#!/usr/bin/env python3
"""Guests as nodes on a thousand hosts: what the controller uses at rest, and while guests are begun.

Usage: many_hosts.py [HOSTS [LAUNCHES_PER_S [SECONDS]]]; 1000 hosts, 10 launches a second, 20 s by default. Needs root.

At rest it is a real carrelctld over a real Slurm, asked by that many emulated hosts over its socket, each of which
waits for orders as carreld does. Launches are those of the controller's own loop, queue and table in this process, over
``carrel.testing.guestnodes``: Slurm and hosts in memory, whose own share is in the figure, while Slurm's commands and
HTTP are not. Prints seconds of CPU per second.
"""

import asyncio
import os
import subprocess  # a carrelctld that runs beside the measurement
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from carrel.config import Config, Controller, GuestNodes, Launches, Placement, Rate
from carrel.daemons import transport
from carrel.errors import CarrelError
from carrel.hosts.table import Facts, HostTable
from carrel.model.guestnode import HostReport, Orders
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guestnodes import Site, Trouble

HOST_CPUS, MEMORY_BYTES = 16, 2**36
NAMES = 600
RUN_S = 5.0
SETTLE_S = 15.0
"""Until every host has asked once and been answered."""
QUESTION_TIMEOUT_S = 30.0
RETRY_S = 1.0


def main() -> None:
    """Measure."""
    count, rate, seconds = [*map(float, sys.argv[1:]), *(1000.0, 10.0, 20.0)[len(sys.argv) - 1 :]]
    print(f"{int(count)} hosts, load {os.getloadavg()[0]:.1f}, seconds of CPU per second:")
    with Sandbox(nodes=1, hosts=1) as box, tempfile.TemporaryDirectory() as directory:
        asyncio.run(at_rest(box, Path(directory), int(count), seconds))
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(launching(Path(directory), int(count), rate, seconds))


async def at_rest(box: Sandbox, directory: Path, count: int, seconds: float) -> None:
    """Have hosts that carry nothing ask a controller of their own for orders."""
    names = [f"n{number}" for number in range(1, count + 1)]
    HostTable(directory / "hosts.db").put(_facts(names))
    controller = Controller(listen=f"unix:{directory}/carrelctld.sock")
    settings = directory / "carrel.toml"
    settings.write_text(
        f'[slurm]\nconf = "{box.dir}/etc/slurm.conf"\n[controller]\nlisten = "{controller.listen}"\n'
        f'[guest_nodes]\nhosts = "n[1-{count}]"\n[placement]\ntable = "{directory}/hosts.db"\n'
    )
    command = [sys.executable, "-m", "carrel.cli.main", "serve", "controller"]
    daemon = subprocess.Popen(  # noqa: ASYNC220  # our own program, and nothing else runs yet
        command, env={**os.environ, "CARREL_CONFIG": str(settings)}, stderr=subprocess.DEVNULL
    )
    hosts = [asyncio.create_task(ask(controller, name)) for name in names]
    try:
        await asyncio.sleep(SETTLE_S)
        began_s, before, answered = time.monotonic(), cpu_seconds(daemon.pid), ask.answers
        await asyncio.sleep(seconds)
        took_s = time.monotonic() - began_s
        own, commands = (later - first for later, first in zip(cpu_seconds(daemon.pid), before, strict=True))
        print(f"  at rest: carrelctld {own / took_s:.3f}, the commands that it runs {commands / took_s:.3f}")
        print(f"    {(ask.answers - answered) / took_s:.0f} questions a second")
    finally:
        for host in hosts:
            host.cancel()
        await asyncio.gather(*hosts, return_exceptions=True)
        daemon.terminate()
        daemon.wait()


async def ask(controller: Controller, host: str) -> None:
    """Ask for orders, again and again."""
    body, digest = msgspec.json.encode(HostReport(host=host, address="127.0.0.1")), ""
    while True:
        try:
            path = f"/v1/hosts/{host}/report?digest={digest}"
            answer = await transport.request(controller, "POST", path, body, timeout_s=QUESTION_TIMEOUT_S)
            digest = msgspec.convert(transport.decoded(answer), Orders).digest
            ask.answers += 1
        except CarrelError:
            await asyncio.sleep(RETRY_S)


ask.answers = 0


async def launching(directory: Path, count: int, rate: float, seconds: float) -> None:
    """Submit jobs of a few seconds to a site in memory."""
    settings = Config(
        guest_nodes=GuestNodes(hosts=f"h[1-{count}]"),
        placement=Placement(
            table=str(directory / "hosts.db"), policy="least-loaded", launches=Launches(rate=Rate(instant=10**6))
        ),
    )
    hosts = {f"h{number}": HOST_CPUS for number in range(1, count + 1)}
    trouble = Trouble(message_max_s=0.001, command_max_s=0.01)
    site = Site(settings, hosts=hosts, names=NAMES, trouble=trouble, seed=1)
    site.begin()
    await asyncio.sleep(RUN_S)
    rest = await _share(seconds / 2)
    jobs: list[int] = []

    async def submit() -> None:
        while True:
            jobs.append(site.slurm.submit(cpus=1, nodes=1, runs_s=RUN_S))
            await asyncio.sleep(1 / rate)

    submitting = asyncio.create_task(submit())
    busy = await _share(seconds)
    submitting.cancel()
    began = sum(site.slurm.jobs[job].job.job.state != "held" for job in jobs)
    print(f"  {began / seconds:.1f} launches a second: {busy:.3f}; at rest {rest:.3f}; {len(site.wrong)} of them wrong")
    await site.end()


async def _share(seconds: float) -> float:
    """Return this process's use of CPU during so many seconds."""
    began_s, before_s = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - before_s) / (time.monotonic() - began_s)


def _facts(names: list[str]) -> list[Facts]:
    return [Facts(name=name, cpus=HOST_CPUS, memory_bytes=MEMORY_BYTES) for name in names]


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Return what a process has used, and what those have that it waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / tick, (int(fields[13]) + int(fields[14])) / tick


if __name__ == "__main__":
    main()
