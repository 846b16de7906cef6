#!/usr/bin/env python3
"""Guests that are Slurm nodes: how long from submission to the first task, and a burst beyond the hosts' capacity.

Usage: guest_nodes.py [JOBS [BURST]]; 5 jobs of each kind of clone and a burst of 30 by default. Prints, of each kind,
the median of every phase; of the burst its length, launches per minute, the most guests at once, and the CPU time of
carrelctld. Needs root; templates are made first.
"""

import os
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

import msgspec

from carrel.hosts.table import HostTable
from carrel.sandbox.cluster import Sandbox

OPTIONS = ("--guest=debian12", "--guest-per=node", "--mem=320", "--chdir=/tmp", "--output=/dev/null")
HOSTS = 3
PHASES = (
    ("submit", "guest-placed"),
    ("guest-placed", "guest-starting"),
    ("guest-starting", "guest-ready"),
    ("guest-ready", "job-released"),
    ("job-released", "task-entered"),
    ("guest-placed", "task-entered"),
    ("submit", "task-entered"),
)
ENDS = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"}
PERIOD_S = 0.1


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    burst = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    with Sandbox(nodes=1, hosts=HOSTS) as box:
        one(box, "instant")  # makes the template, if there is none
        for kind in ("instant", "linked", "full"):
            runs = [one(box, kind) for _ in range(jobs)]
            print(f"{kind}, {jobs} jobs one after another, median s:")
            for first, last in PHASES:
                print(f"  {first:>14} -> {last:<14} {statistics.median(run[last] - run[first] for run in runs):6.2f}")
        many(box, burst)


def one(box: Sandbox, kind: str) -> dict[str, float]:
    """Run one job to its end; return when each thing happened first, in seconds since the epoch."""
    at_s = time.time()
    job_id = submit(box, "true", f"--guest-clone={kind}")
    wait(box, [job_id])
    times = {"submit": at_s}
    for line in box.run(["carrel", "job", "events", str(job_id), "--json"]).stdout.splitlines():
        event = msgspec.json.decode(line)
        times.setdefault(event["what"], datetime.fromisoformat(event["time"]).timestamp())
    return times


def many(box: Sandbox, burst: int) -> None:
    """Submit more jobs at once than the hosts carry guests."""
    controller, slurm = box.pid("carrelctld"), box.pid("slurmctld")
    cpu_s, began_s = cpu_seconds(controller), time.monotonic()
    ids = [submit(box, "sleep 1", "--guest-clone=instant") for _ in range(burst)]
    most = wait(box, ids)
    took_s = time.monotonic() - began_s
    states = sorted({state(box, job_id) for job_id in ids})
    print(f"burst of {burst} jobs of 1 s on {HOSTS} hosts for {4 * HOSTS} guests: {took_s:.1f} s, all {states}")
    print(f"  {60 * burst / took_s:.0f} launches per minute, at most {most} guests at once")
    print(f"  carrelctld: {cpu_seconds(controller) - cpu_s:.1f} s of CPU")
    if slurm != box.pid("slurmctld"):
        sys.exit("guest_nodes: slurmctld was restarted meanwhile")


def submit(box: Sandbox, script: str, *options: str) -> int:
    return int(box.run(["sbatch", "--parsable", *OPTIONS, *options, "--wrap", script]).stdout)


def state(box: Sandbox, job_id: int) -> str:
    return box.run(["squeue", "-h", "-t", "all", "-o", "%T", "-j", str(job_id)]).stdout.strip()


def wait(box: Sandbox, ids: list[int]) -> int:
    """Return when all have ended, and how many guests had room at once."""
    most, table = 0, HostTable(box.layout.hosts_table)
    while True:
        most = max(most, len(table.places()))
        lines = box.run(["squeue", "-h", "-t", "all", "-o", "%A %T"]).stdout.splitlines()
        words = dict(line.split() for line in lines)
        if all(words.get(str(job_id), "COMPLETED") in ENDS for job_id in ids):
            return most
        time.sleep(PERIOD_S)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
