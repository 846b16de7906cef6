"""Measure Carrel against plain Slurm on this machine, paired in one run, and print what was seen.

Usage: make bench [ARGS="--repeat 5 --only launch"]

Every figure is a median of ``--repeat`` measurements (5 or more for the record), the pairs taken in turn, so that
what else the machine does falls on both. Nothing is asserted: figures are for reading.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import clones

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import allocation

IMAGE = "debian12"
STREAM_BYTES = 256 * 2**20
JOBS = 300
GUESTS = 8
SHARED = "PartitionName=shared Nodes=ALL OverSubscribe=FORCE:8"


class Figures:
    """Prints rows as they come."""

    def row(self, what: str, values: Sequence[float], unit: str, note: str = "") -> float:
        """Print the median and the spread of ``values``; return the median."""
        middle = statistics.median(values)
        spread = f"{min(values):.4g} … {max(values):.4g}" if len(values) > 1 else ""
        print(f"{what:<58} {middle:>10.4g} {unit:<7} {spread:<20} n={len(values)} {note}", flush=True)
        return middle


def timed_ms(box: Sandbox, words: Sequence[str]) -> float:
    """Return how long a command took, in ms. A command that fails has no time worth printing."""
    begun_s = time.monotonic()
    done = box.run(words, timeout_s=600)
    took_ms = (time.monotonic() - begun_s) * 1000
    if done.returncode:
        sys.exit(f"bench: {' '.join(words)} exited with {done.returncode}: {done.stderr.strip()}")
    return took_ms


def launch(box: Sandbox, figures: Figures, repeat: int) -> None:
    """From ``srun`` to the end of its first command, bare and in each kind of clone, in turn."""
    kinds = {
        "srun true, bare": ["srun", "true"],
        "srun true, instant clone": ["srun", f"--guest={IMAGE}", "--guest-clone=instant", "true"],
        "srun true, linked clone": ["srun", f"--guest={IMAGE}", "--guest-clone=linked", "true"],
        "srun true, full clone": ["srun", f"--guest={IMAGE}", "--guest-clone=full", "true"],
    }
    seen: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeat):
        for name, words in kinds.items():
            seen[name].append(timed_ms(box, words))
    middles = {name: figures.row(name, values, "ms") for name, values in seen.items()}
    bare = middles["srun true, bare"]
    for name, middle in middles.items():
        if middle != bare:
            figures.row(f"  {name}, over bare", [middle - bare], "ms")


def entering(box: Sandbox, figures: Figures, repeat: int) -> None:
    """A second task into a guest that runs, against a second bare step in an allocation."""
    timed = "a=$(date +%s%N); srun true; b=$(date +%s%N); echo $(( (b - a) / 1000 ))"
    script = f"for i in $(seq {repeat + 1}); do {timed}; done"
    for name, options in (("bare", []), ("in its running guest", [f"--guest={IMAGE}"])):
        done = box.run(["salloc", "--quiet", *options, "bash", "-c", script], timeout_s=600)
        values = [int(line) / 1000 for line in done.stdout.split()][1:]  # the first one starts the guest
        figures.row(f"step srun true in an allocation, {name}", values, "ms")


def stream(box: Sandbox, figures: Figures, repeat: int) -> None:
    """Standard output of one task through srun, bare and from a guest."""
    words = ["dd", "if=/dev/zero", "bs=64K", f"count={STREAM_BYTES // 65536}", "status=none"]
    kinds: dict[str, list[str]] = {"bare": [], "from a guest": [f"--guest={IMAGE}"]}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with allocation(box, "-N1", "-n1", "--mem=1024") as job_id:
        srun = ["srun", f"--jobid={job_id}", "--overlap"]
        box.run([*srun, *kinds["from a guest"], "true"], timeout_s=600)  # starts the guest, which no rate shall hold
        for _ in range(max(1, repeat // 2)):
            for name, options in kinds.items():
                with Path(os.devnull).open("wb") as nowhere:
                    rates[name].append(_rate(box, [*srun, *options, *words], nowhere.fileno()))
    bare, guest = (figures.row(f"stdout through srun, {name}", values, "MB/s") for name, values in rates.items())
    figures.row("  ratio", [guest / bare], "")


def _rate(box: Sandbox, words: Sequence[str], out: int) -> float:
    import subprocess  # noqa: PLC0415  # its own output goes nowhere, which Sandbox.run does not offer

    begun_s = time.monotonic()
    subprocess.run(words, stdout=out, env={**os.environ, **box.env}, check=True)
    return STREAM_BYTES / 1e6 / (time.monotonic() - begun_s)


def daemon(box: Sandbox, figures: Figures, repeat: int) -> None:
    """Cost of carreld itself: idle, and with eight guests."""
    pid = box.pid(f"carreld@{box.nodes[0]}")
    figures.row("carreld, idle: resident", [_resident_mb(pid)], "MB")
    figures.row("carreld, idle: CPU", [_cpu_percent(pid, seconds=5 * repeat)], "%")
    one = ["sbatch", "--parsable", "-p", "shared", "-w", box.nodes[0], "--mem=320", f"--guest={IMAGE}"]
    jobs = [box.run([*one, "-o", os.devnull, "--wrap", "sleep 600"]) for _ in range(GUESTS)]
    ids = [job.stdout.strip() for job in jobs]
    wait_for(lambda: box.run(["carrel", "guest", "list", "--json"]).stdout.count('"ready"') >= len(ids))
    figures.row(f"carreld, {len(ids)} guests: resident", [_resident_mb(pid)], "MB")
    figures.row(f"carreld, {len(ids)} guests: CPU", [_cpu_percent(pid, seconds=5 * repeat)], "%")
    box.run(["scancel", *ids])


def throughput(figures: Figures, repeat: int) -> None:
    """Jobs without a guest: submit and completion rate with Carrel loaded and without, in turn."""
    submit: dict[bool, list[float]] = {False: [], True: []}
    complete: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(max(1, repeat // 2)):
        for loaded in (False, True):
            with Sandbox(nodes=3, guests=loaded) as box:
                rates = _batch_rates(box)
                submit[loaded].append(rates[0])
                complete[loaded].append(rates[1])
    for name, seen in (("submitted", submit), ("completed", complete)):
        without = figures.row(f"{JOBS} jobs without a guest {name}, Carrel not loaded", seen[False], "jobs/s")
        with_it = figures.row(f"{JOBS} jobs without a guest {name}, Carrel loaded", seen[True], "jobs/s")
        figures.row("  ratio", [with_it / without], "")


def _batch_rates(box: Sandbox) -> tuple[float, float]:
    script = f"for i in $(seq {JOBS}); do sbatch -Q --mem=10 -o /dev/null --wrap true; done"
    begun_s = time.monotonic()
    box.run(["bash", "-c", script], timeout_s=600)
    submitted_s = time.monotonic()
    wait_for(lambda: not box.run(["squeue", "-h"]).stdout.strip())
    return JOBS / (submitted_s - begun_s), JOBS / (time.monotonic() - begun_s)


def wait_for(fact: Callable[[], bool], *, timeout_s: float = 300.0) -> None:
    """Wait until something is so."""
    deadline_s = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > deadline_s:
            sys.exit("bench: waited too long")
        time.sleep(0.05)  # the fact is in another process


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _cpu_percent(pid: int, *, seconds: float) -> float:
    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(seconds)  # what is measured is this very time
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each kind")
    parser.add_argument(
        "--only", choices=["launch", "clones", "entering", "stream", "daemon", "throughput"], help="one part only"
    )
    arguments = parser.parse_args()
    figures = Figures()
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}; guests emulated (TCG)")
    parts = {"launch": launch, "entering": entering, "stream": stream, "daemon": daemon}
    chosen = {name: part for name, part in parts.items() if arguments.only in (None, name)}
    if chosen:
        with Sandbox(nodes=3, extra_conf=SHARED) as box:
            box.run(["carrel", "image", "warm", IMAGE, "--memory", "512"], timeout_s=600)
            box.run(["srun", f"--guest={IMAGE}", "true"], timeout_s=600)  # the page cache is warm for all
            for part in chosen.values():
                part(box, figures, arguments.repeat)
    if arguments.only in (None, "clones"):
        clones.measure(figures.row, arguments.repeat)
    if arguments.only in (None, "throughput"):
        throughput(figures, arguments.repeat)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
