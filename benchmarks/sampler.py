"""Measure what sampling costs on this machine, and print what was seen.

Usage: python benchmarks/sampler.py [--repeat 3] [--seconds 20] [--only paced|pieces|size] [--against SRC]

With ``--against`` (the ``src`` of another checkout) each paced measurement is taken in turn with that one's.

A paced sample costs two to three times that of a tight loop, since caches are cold when the thread wakes: only paced
figures are costs, the others tell parts from each other. Nothing is asserted: figures are for reading.
"""

import argparse
import contextlib
import os
import platform
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from carrel.config import Metrics
from carrel.model.job import Job, JobKey
from carrel.sampling import cgroup, node, processes
from carrel.sampling.blocks import Reading
from carrel.sampling.folder import JobFolder
from carrel.sampling.loop import Sampler
from carrel.sampling.segment import RowRead, open_reader

V1 = Path("/sys/fs/cgroup")
AGAINST: list[str] = []
"""``src`` of another checkout, to be measured in turn."""
CONTROLLERS = ("memory", "cpuacct", "freezer", "blkio")


class Figures:
    """Prints rows as they come."""

    def row(self, what: str, values: Sequence[float], unit: str, note: str = "") -> float:
        """Print the median and the spread of ``values``; return the median."""
        middle = statistics.median(values)
        spread = f"{min(values):.4g} … {max(values):.4g}" if len(values) > 1 else ""
        print(f"{what:<58} {middle:>10.4g} {unit:<7} {spread:<20} n={len(values)} {note}", flush=True)
        return middle


def job(number: int) -> Job:
    key = JobKey(cluster="bench", job_id=number, submit_s=1)
    return Job(key=key, state="running", user="bench", uid=os.geteuid(), gid=os.getegid(), cpus=1)


@contextlib.contextmanager
def groups(count: int) -> Iterator[list[int]]:
    """Make ``count`` jobs with groups as Slurm makes them, each with one process that sleeps; yield these."""
    top = f"carrelbench_{secrets.token_hex(4)}"
    have = [V1 / name for name in CONTROLLERS if os.access(V1 / name / "cgroup.procs", os.W_OK)]
    children = []
    try:
        for number in range(count):
            child = subprocess.Popen(["sleep", "3600"])
            children.append(child)
            for controller in have:
                step = controller / top / f"job_{number}" / "step_0"
                step.mkdir(parents=True)
                (step / "cgroup.procs").write_text(str(child.pid))
        yield [child.pid for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
        for controller in have:
            for path in [*sorted((controller / top).rglob("*/"), reverse=True), controller / top]:
                path.rmdir()


PACED = """
import os, resource, sys, threading, time
import msgspec
from carrel.config import Metrics
from carrel.model.job import Job
from carrel.sampling.loop import Sampler
root, period, seconds, sync = sys.argv[1], *map(float, sys.argv[2:5])
sampler = Sampler(Metrics(root=root, period_s=period, sync_period_s=sync), "bench")
thread = threading.Thread(target=sampler.run)
thread.start()
for pid, job in zip(map(int, sys.argv[6::2]), sys.argv[5::2]):
    sampler.add(msgspec.json.decode(job, type=Job), pid=pid).result()
time.sleep(12)  # beyond the dense start
before, cpu = sampler.status().samples, time.process_time()
time.sleep(seconds)
used, taken = time.process_time() - cpu, sampler.status().samples - before
rss = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
sampler.stop()
thread.join()
print(used / taken * 1e6, rss / 1024, sum(sampler.status().cost_us.values()))
"""


BARE = """
import os, sys, threading, time
wake, period, seconds = threading.Condition(), float(sys.argv[1]), float(sys.argv[2])
opened = [os.open(path, os.O_RDONLY) for path in sys.argv[3:]]
cpu, count = time.process_time(), 0
while count < seconds / period:
    with wake:
        wake.wait(period - time.time() % period)
    for descriptor in opened:
        os.pread(descriptor, 1 << 16, 0)
    count += 1
print((time.process_time() - cpu) / count * 1e6)
"""


def bare(figures: Figures, repeat: int, seconds: float) -> None:
    """What no sampler in Python gets below: waking up, and reading the same files without looking into them."""
    files = [f"/proc/{name}" for name in ("meminfo", "vmstat", "loadavg", "stat", "diskstats", "net/dev")]
    files += [str(path) for path in sorted(Path("/proc/pressure").glob("*"))]
    for what, paths in (("waking up alone, 1 Hz", []), ("waking up and bare reads of the node's files, 1 Hz", files)):
        words = [sys.executable, "-c", BARE, "1.0", str(seconds), *paths]
        outs = [subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(repeat)]
        figures.row(what, [float(out) for out in outs], "us")


def paced(figures: Figures, repeat: int, seconds: float) -> None:
    """The whole process: the node's values and jobs, at 1 Hz and at 10 Hz."""
    import msgspec  # noqa: PLC0415  # as the child does

    kinds = {
        "1 Hz, 1 job": (1.0, 1, 1.0),
        "1 Hz, 1 job, synced never": (1.0, 1, 1e6),
        "1 Hz, 8 jobs": (1.0, 8, 1.0),
        "10 Hz, 1 job": (0.1, 1, 1.0),
    }
    bare(figures, repeat, seconds)
    trees = {"": os.environ.get("PYTHONPATH", ""), **({", the other": AGAINST[0]} if AGAINST else {})}
    seen: dict[tuple[str, str], list[list[float]]] = {(name, tree): [] for name in kinds for tree in trees}
    jitter: dict[tuple[str, str], list[float]] = {which: [] for which in seen}
    for _ in range(repeat):
        for (name, tree), runs in seen.items():
            period, jobs, sync = kinds[name]
            with groups(jobs) as pids, tempfile.TemporaryDirectory() as root:
                told = [w for n, pid in enumerate(pids) for w in (msgspec.json.encode(job(n)).decode(), str(pid))]
                words = [sys.executable, "-c", PACED, root, str(period), str(seconds), str(sync), *told]
                env = {**os.environ, "PYTHONPATH": trees[tree]}
                out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout
                runs.append([float(word) for word in out.split()])
                jitter[name, tree] += late_ms(Path(root) / "bench" / "0" / "samples.bench.seg", period)
    for (name, tree), runs in seen.items():
        period, jobs, _ = kinds[name]
        cost = figures.row(f"{name}{tree}: CPU per sample, whole process", [one[0] for one in runs], "us")
        figures.row("  of a core", [cost / period / 1e4], "%")
        figures.row("  resident", [one[1] for one in runs], "MB")
        late = sorted(jitter[name, tree])
        figures.row("  late, median", [statistics.median(late)], "ms", f"p99 {late[int(len(late) * 0.99)]:.3g} ms")


def late_ms(path: Path, period_s: float) -> list[float]:
    """Return how late each sample was, from when it should have been."""
    with open_reader(path) as reader:
        times = [row.time_us for row in reader.entries() if isinstance(row, RowRead)][1:]
    return [time_us % round(period_s * 1e6) / 1000 for time_us in times]


def us_each(deed: Callable[[], object], count: int = 300) -> float:
    """Return the CPU time of one of many calls in a row."""
    began_ns = time.thread_time_ns()
    for _ in range(count):
        deed()
    return (time.thread_time_ns() - began_ns) / count / 1000


def pieces(figures: Figures, repeat: int, _seconds: float) -> None:
    """Each source in a tight loop, and what is done with what it gave."""
    sources = node.sources()
    values = 0
    for source in sources:
        columns = len(source.read()[0].layout.schema.columns)
        values += columns
        note = f"{columns} values" + (f", each {source.period_s:g} s" if source.period_s else "")
        figures.row(f"read {source.name}", [us_each(source.read) for _ in range(repeat)], "us", note)
    fast = [source for source in sources if not source.period_s]
    readings = [Reading([block for source in fast for block in source.read()]) for _ in range(2 * 300)]
    pairs = iter(list(zip(readings[::2], readings[1::2], strict=True)))
    figures.row("difference to the last and compression", [us_each(lambda: _delta(next(pairs)))], "us")
    print(f"{values} values of the node")
    with groups(1) as pids:
        found = cgroup.of_process(pids[0])
        if found.any:
            group = cgroup.GroupSource(found)
            figures.row("read a job's groups", [us_each(group.read) for _ in range(repeat)], "us")
            group.close()
    for count in (1, 33):
        children = [subprocess.Popen(["sleep", "3600"]) for _ in range(count)]
        with tempfile.TemporaryDirectory() as where:
            (Path(where) / "cgroup.procs").write_text("\n".join(str(child.pid) for child in children))
            many = processes.ProcessSource(where, period_s=0)
            figures.row(f"read {count} processes", [us_each(many.read, 100) for _ in range(repeat)], "us")
            many.close()
        for child in children:
            child.kill()
            child.wait()


def _delta(pair: tuple[Reading, Reading]) -> bytes:
    return pair[1].delta(pair[0])


def size(figures: Figures, _repeat: int, _seconds: float) -> None:
    """Bytes per value of a job of a minute and of an hour at 1 Hz.

    Time is made to pass faster, so a row differs from the last one less than it would: read these as lower bounds.
    """
    for rows in (60, 3600):
        with tempfile.TemporaryDirectory() as root, groups(1) as pids:
            folder = _fast_forward(Path(root), rows, pids[0])
            segment = folder / "samples.bench.seg"
            count = rows * sum(len(source.read()[0].layout.schema.columns) for source in node.sources())
            figures.row(f"{rows} rows, segment: bytes per value", [segment.stat().st_size / count], "B")
            run = JobKey(cluster="bench", job_id=0, submit_s=1)
            for kind in ("csv", "parquet"):
                shutil.copy(segment, folder / "kept")
                began = time.monotonic()
                opened = JobFolder.make(Path(root), run, user="bench", uid=os.geteuid(), gid=os.getegid())
                from carrel.sampling import compact  # noqa: PLC0415  # its child is what is measured

                child = compact.spawn(opened, "samples.bench", [kind])
                _, error = child.communicate()
                opened.close()
                if child.returncode:
                    print(f"  {kind}: {error.decode().strip()}")
                for path in folder.glob(f"samples.bench.{kind}*"):
                    figures.row(f"{rows} rows, {path.name}", [path.stat().st_size / count], "B")
                figures.row("  made in", [time.monotonic() - began], "s")
                (folder / "kept").rename(segment)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    figures.row("resident, most of any such child", [most], "MB")


def _fast_forward(root: Path, rows: int, pid: int) -> Path:
    """Take so many samples, one soon after the other."""
    settings = Metrics(root=str(root), period_s=0.05, budget_cores=1.0, sync_period_s=1e6)
    sampler = Sampler(settings, "bench")
    thread = threading.Thread(target=sampler.run)
    thread.start()
    folder = sampler.add(job(0), pid=pid).result()
    sampler.stop()
    thread.join()
    sampler = Sampler(settings, "bench")
    made = sampler._add(job(0), pid, 3600.0)  # noqa: SLF001  # no thread: its samples are taken here, in a row
    sampled = list(sampler._jobs.values())  # noqa: SLF001
    for _ in range(rows - 2):
        sampler._sample(sampled, forced=False)  # noqa: SLF001
        time.sleep(0.002)
    assert made == folder
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--seconds", type=float, default=20, help="length of one paced measurement")
    parser.add_argument("--only", choices=["paced", "pieces", "size"], help="one part only")
    parser.add_argument("--against", help="src of another checkout, whose paced samples are taken in turn")
    arguments = parser.parse_args()
    AGAINST.extend([arguments.against] if arguments.against else [])
    kernel, python = platform.release(), platform.python_version()
    print(f"{os.cpu_count()} CPUs, Linux {kernel}, Python {python}, load {os.getloadavg()[0]:.1f}")
    parts = {"pieces": pieces, "paced": paced, "size": size}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part(Figures(), arguments.repeat, arguments.seconds)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
