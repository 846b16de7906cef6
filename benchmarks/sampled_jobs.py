"""Measure what sampling costs: carreld's CPU time with one job, and whether jobs are any slower with it.

Usage: python benchmarks/sampled_jobs.py [--repeat 5] [--seconds 20] [--jobs 60] [--only carreld|jobs] [--against SRC]

``jobs`` runs arrays of short jobs in two sandboxes, one of which samples, in turn. ``carreld`` reads what each thread
of it takes; with ``--against`` (the ``src`` of another checkout) in turn with that one's. Nothing is asserted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from carrel.sandbox.cluster import Sandbox

ARRAY_MAX = "MaxArraySize=2000\nMaxJobCount=5000"
SETTLE_S = 15.0
"""A job's first seconds are sampled more densely."""


def wait_until_empty(box: Sandbox) -> None:
    while box.run(["squeue", "-h"]).stdout.strip():
        time.sleep(0.05)  # the fact is in another process


def took_s(box: Sandbox, count: int, command: str) -> float:
    """Return the time from the submission of so many jobs to the end of all of them."""
    began_s = time.monotonic()
    done = box.run(["sbatch", "-Q", f"--array=1-{count}", "--mem=10", "-o", os.devnull, "--wrap", command])
    if done.returncode:
        sys.exit(f"sampled_jobs: {done.stderr.strip()}")
    wait_until_empty(box)
    return time.monotonic() - began_s


def jobs(repeat: int, count: int) -> None:
    """The same jobs with and without sampling."""
    conf = {on: f"[metrics]\nenabled = {on}\n" for on in ("false", "true")}
    with (
        Sandbox(nodes=3, extra_conf=ARRAY_MAX, carrel_conf=conf["false"]) as without,
        Sandbox(nodes=3, extra_conf=ARRAY_MAX, carrel_conf=conf["true"]) as sampled,
    ):
        for command in ("true", "sleep 0.5"):
            seen: dict[str, list[float]] = {"not sampled": [], "sampled": []}
            ratios = []
            for turn in range(repeat + 1):
                pair = [
                    (name, took_s(box, count, command))
                    for name, box in (("not sampled", without), ("sampled", sampled))[:: 1 if turn % 2 else -1]
                ]
                if turn:  # the first one warms up
                    for name, value in pair:
                        seen[name].append(value)
                    ratios.append(dict(pair)["sampled"] / dict(pair)["not sampled"])
            for name, values in seen.items():
                row(f"{count} jobs of '{command}', submission to last end, {name}", values, "s")
            row("  sampled over not sampled, pairwise", ratios, "")


def row(what: str, values: list[float], unit: str) -> None:
    spread = f"{min(values):.4g} … {max(values):.4g}" if len(values) > 1 else ""
    print(f"{what:<72} {statistics.median(values):>9.4g} {unit:<4} {spread} n={len(values)}", flush=True)


def carreld(repeat: int, seconds: float, against: str) -> None:
    """What carreld takes at rest and with one job that sleeps, of this checkout and of the other one."""
    trees = {"this": os.environ.get("PYTHONPATH", ""), **({"the other": against} if against else {})}
    seen: dict[str, list[list[float]]] = {name: [] for name in trees}
    for _ in range(repeat):
        for name, path in trees.items():
            words = [sys.executable, __file__, "--seconds", str(seconds), "--once"]
            out = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
            seen[name].append([float(word) for word in out.stdout.split()])
    what = ("at rest, all threads", "with a job, all threads", "  its event loop", "  its sampler and sync")
    for at, about in enumerate(what):
        for name, runs in seen.items():
            row(f"carreld of {name}, {about}", [run[at] for run in runs], "%")
    for name, runs in seen.items():
        row(f"carreld of {name}, wake-ups with a job", [run[-1] for run in runs], "/s")


def once(seconds: float) -> None:
    """Print percentages of a core: at rest; with a job, its first thread, its others; and wake-ups a second."""
    with Sandbox(nodes=1) as box:
        pid = box.pid(f"carreld@{box.nodes[0]}")
        time.sleep(SETTLE_S)
        rest = over(pid, seconds)
        box.run(["sbatch", "-Q", "-o", os.devnull, "--wrap", "sleep 600"])
        time.sleep(SETTLE_S)
        busy = over(pid, seconds)
        print(rest[0] + rest[1], busy[0] + busy[1], *busy)


def over(pid: int, seconds: float) -> tuple[float, float, float]:
    """Return what a process's first and its other threads take of a core, in per cent, and its wake-ups a second."""
    first, began_s = threads(pid), time.monotonic()
    time.sleep(seconds)  # what is measured is this very time
    last, took = threads(pid), time.monotonic() - began_s
    used = {tid: (ns - first.get(tid, (0, 0))[0], runs - first.get(tid, (0, 0))[1]) for tid, (ns, runs) in last.items()}
    others = sum(ns for tid, (ns, _) in used.items() if tid != pid)
    return used[pid][0] / took / 1e7, others / took / 1e7, sum(runs for _, runs in used.values()) / took


def threads(pid: int) -> dict[int, tuple[int, int]]:
    """Return of each thread the CPU time in ns, and how often it was given a CPU."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        ran, _, runs = path.joinpath("schedstat").read_text().split()
        found[int(path.name)] = int(ran), int(runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--seconds", type=float, default=20, help="length of one measurement of carreld")
    parser.add_argument("--jobs", type=int, default=60, help="jobs of one array")
    parser.add_argument("--only", choices=["carreld", "jobs"], help="one part only")
    parser.add_argument("--against", default="", help="src of another checkout, to be measured in turn")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        once(arguments.seconds)
        return
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    if arguments.only in (None, "carreld"):
        carreld(arguments.repeat, arguments.seconds, arguments.against)
    if arguments.only in (None, "jobs"):
        jobs(arguments.repeat, arguments.jobs)


if __name__ == "__main__":
    main()
