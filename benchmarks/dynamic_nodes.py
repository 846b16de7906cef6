#!/usr/bin/env python3
"""Two ways to have a node under a name for one job: a record of a fixed pool, or a dynamic node (``slurmd -Z``).

Usage: dynamic_nodes.py [COUNT [INTERVAL_S]]; 10 uses of each, in turn, one at a time; Slurm's power_save_interval, 1 as
in a sandbox (Slurm's own default is 10). No guests. Needs root. On another release:
make matrix RELEASES=24.11 ARGS="-- .venv/bin/python benchmarks/dynamic_nodes.py"

Both do what keeps a guest's node its own job's: reserved before it is open, drained once the job runs. A record of the
pool is told so before its slurmd starts. Of a dynamic node nothing can be said before it has registered, so it does so
drained. Prints medians, how many jobs did not start, and whether dynamic nodes whose ports differ can share an address.
"""

import os
import re
import socket
import statistics
import subprocess  # slurmds that run beside the measurement
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from carrel.config import Slurm
from carrel.sandbox.cluster import Sandbox
from carrel.slurm import version

Way = Literal["pool", "dynamic"]

SHAPE = "Boards=1 SocketsPerBoard=1 ThreadsPerCore=1"
"""All of it is said: slurmctld ends itself over a dynamic node that leaves a part to its defaults (22.05)."""
POLL_S = 0.01
LATE_S = 30.0
SHARING = 3


class Use(NamedTuple):
    """One use of a name, in seconds; None: its job did not start."""

    open: float
    """From the start of slurmd until the node is idle and may be given a job."""
    running: float | None
    """From the start of slurmd."""
    whole: float | None
    """From the first that Slurm is told until the job runs."""
    free: float
    """From the end of the job until the name may be used again."""


def main() -> None:
    count, interval_s = [*map(int, sys.argv[1:]), *(10, 1)[len(sys.argv) - 1 :]]
    pool_port, *ports = free_ports(1 + SHARING)
    with Sandbox(nodes=1, guests=False, extra_conf=conf(interval_s, pool_port, ports[0])) as box:
        release = version.installed(Slurm(conf=str(box.layout.slurm_conf)))
        print(
            f"Slurm {release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, power_save_interval={interval_s}"
        )
        print(f"medians of {count}, s")
        tell(box, "update", "NodeName=p1", "State=drain", "Reason=rest")
        uses: dict[Way, list[Use]] = {"pool": [], "dynamic": []}
        for number in range(count):
            uses["pool"].append(use(box, "pool", "p1"))
            uses["dynamic"].append(use(box, "dynamic", f"d{number}"))
        print(" " * 10 + "".join(f"{field:>10}" for field in Use._fields) + f"{'not started':>14}")
        for way, each in uses.items():
            late = sum(one.running is None for one in each)
            print(f"{way:<10}" + "".join(map(middle, zip(*each, strict=True))) + f"{late:>14}")
        ran = sharing(box, ports)
        print(f"dynamic nodes on one address, each with a port of its own: {ran} of {SHARING} jobs ran")


def conf(interval_s: int, pool_port: int, dynamic_port: int) -> str:
    """Return what both ways need in slurm.conf."""
    return f"""\
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
SuspendTimeout=1
ResumeTimeout=60
SlurmctldParameters=idle_on_node_suspend,power_save_interval={interval_s}
PrivateData=cloud
SlurmdPort={dynamic_port}
NodeName=p1 Port={pool_port} State=CLOUD CPUs=64 CoresPerSocket=64 RealMemory=256000 {SHAPE}
PartitionName=pool Nodes=p1 MaxTime=INFINITE SuspendTime=31536000 State=UP
NodeSet=dynamic Feature=dynamic
PartitionName=dynamic Nodes=dynamic MaxTime=INFINITE State=UP
"""


def use(box: Sandbox, way: Way, name: str) -> Use:
    """Let one job have a node of this name, and take the name back."""
    job = submit(box, way)
    with ExitStack() as stack:
        first_s = time.monotonic()
        if way == "pool":
            tell(box, "update", f"NodeName={name}", "NodeAddr=127.0.0.1", f"NodeHostName={socket.gethostname()}")
            give(box, name, job)
        began_s = time.monotonic()
        child = stack.enter_context(slurmd(box, way, name))
        if way == "dynamic":
            need(lambda: "IDLE" in node(box, name), f"{name} has registered")
            give(box, name, job)
        need(lambda: is_open(node(box, name)), f"{name} is open")
        open_s = time.monotonic()
        tell(box, "release", job)
        runs = until(lambda: state(box, job) not in {"PENDING", "CONFIGURING"})
        running_s = time.monotonic()
        tell(box, "update", f"NodeName={name}", "State=drain", "Reason=its job alone")
        if not runs:
            box.run(["scancel", job])
        need(lambda: state(box, job) in {"COMPLETED", "CANCELLED"}, f"job {job} has ended")
        ended_s = time.monotonic()
        take_back(box, way, name, child)
        free_s = time.monotonic()
    return Use(
        open=open_s - began_s,
        running=running_s - began_s if runs else None,
        whole=running_s - first_s if runs else None,
        free=free_s - ended_s,
    )


def give(box: Sandbox, name: str, job: str) -> None:
    """Keep the node for the job, and open it."""
    words = ("Users=root", f"Nodes={name}", "StartTime=now", "Duration=infinite", "Flags=ignore_jobs")
    tell(box, "create", "reservation", f"ReservationName={name}", *words)
    tell(box, "update", f"JobId={job}", f"Reservation={name}")
    tell(box, "update", f"NodeName={name}", "State=resume")


def take_back(box: Sandbox, way: Way, name: str, child: "subprocess.Popen[bytes]") -> None:
    """Return when the name is as it was before its use."""
    tell(box, "delete", f"ReservationName={name}")
    if way == "pool":
        tell(box, "update", f"NodeName={name}", "State=power_down_force", "Reason=rest")
        end(child)
        need(lambda: at_rest(node(box, name)), f"{name} is powered down")
        tell(box, "update", f"NodeName={name}", "State=drain", "Reason=rest")
    else:
        end(child)
        tell(box, "update", f"NodeName={name}", "State=down", "Reason=gone")
        tell(box, "delete", f"NodeName={name}")
        need(lambda: not node(box, name), f"{name} is deleted")


def sharing(box: Sandbox, ports: Sequence[int]) -> int:
    """Return how many jobs ran on dynamic nodes that are there together, each with a port of its own."""
    names = [f"e{number}" for number in range(len(ports))]
    with ExitStack() as stack:
        for name, port in zip(names, ports, strict=True):
            stack.enter_context(slurmd(box, "dynamic", name, port))
        need(lambda: all("IDLE" in node(box, name) for name in names), f"{', '.join(names)} have registered")
        jobs = [submit(box, "dynamic", f"--nodelist={name}") for name in names]
        for name, job in zip(names, jobs, strict=True):
            tell(box, "update", f"NodeName={name}", "State=resume")
            tell(box, "release", job)
        until(lambda: {state(box, job) for job in jobs} == {"COMPLETED"})
        ran = sum(state(box, job) == "COMPLETED" for job in jobs)
        box.run(["scancel", *jobs])
        return ran


@contextmanager
def slurmd(box: Sandbox, way: Way, name: str, port: int = 0) -> Iterator["subprocess.Popen[bytes]"]:
    """Have the slurmd of a name; it takes a port that is not the cluster's from a configuration of its own."""
    env = {**os.environ, **box.env, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    if port:
        own = box.layout.etc / f"slurm.{name}.conf"
        own.write_text(re.sub(r"\bSlurmdPort=\d+", f"SlurmdPort={port}", box.layout.slurm_conf.read_text()))
        env["SLURM_CONF"] = str(own)
    shape = f"CPUs=1 CoresPerSocket=1 RealMemory=1000 {SHAPE} Feature=dynamic State=DRAIN"
    words = ["-Z", "--conf", shape] if way == "dynamic" else []
    child = subprocess.Popen(
        ["slurmd", "-D", "-N", name, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
    )
    try:
        yield child
    finally:
        end(child)


def end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    child.wait()


def submit(box: Sandbox, partition: str, *options: str) -> str:
    """Submit a held job of a second."""
    words = ["sbatch", "--parsable", "-H", "-p", partition, "-n1", "--mem=100", "-o/dev/null", *options]
    done = box.run([*words, "--wrap=sleep 1"])
    if done.returncode:
        sys.exit(f"dynamic_nodes: {done.stderr.strip()}")
    return done.stdout.strip()


def state(box: Sandbox, job: str) -> str:
    return box.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]).stdout.strip()


def node(box: Sandbox, name: str) -> frozenset[str]:
    """Return Slurm's words for the state of a node; none where there is no such node."""
    match = re.search(r"\bState=(\S+)", box.run(["scontrol", "-a", "-o", "show", "node", name]).stdout)
    return frozenset(match[1].split("+")) if match else frozenset()


def is_open(words: frozenset[str]) -> bool:
    return "IDLE" in words and not words & {"DRAIN", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_UP"}


def at_rest(words: frozenset[str]) -> bool:
    return "POWERED_DOWN" in words and not words & {"POWER_DOWN", "POWERING_DOWN"}


def tell(box: Sandbox, *words: str) -> None:
    """Tell Slurm. Its answer is not looked at: in a partition without a usable node it refuses what it does."""
    box.run(["scontrol", *words])


def until(fact: Callable[[], bool]) -> bool:
    """Return when the fact is true, or after a time, which of the two."""
    deadline_s = time.monotonic() + LATE_S
    while not fact():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def need(fact: Callable[[], bool], what: str) -> None:
    if not until(fact):
        sys.exit(f"dynamic_nodes: after {LATE_S:g} s it is not so that {what}")


def middle(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):10.2f}" if known else f"{'-':>10}"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


if __name__ == "__main__":
    main()
