"""Measure what other samplers cost on this machine beside ours, and what reading a job's samples takes.

Usage: python benchmarks/other_samplers.py [--repeat 3] [--seconds 20] [--only others|reading]

``others`` takes them in turn, each once a second: ours, psutil, node_exporter and ldmsd with the six plug-ins of the
proof of concept, where they are installed. They do not read the same: node_exporter has about a thousand lines, psutil
some hundred values, ours all values of the node and a job's. ``reading`` asks one hour of one job for one series, and a
thousand jobs for their peak of memory. Nothing is asserted: figures are for reading.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import sampler

from carrel.ldms.plan import PLUGINS
from carrel.model.job import JobKey
from carrel.model.sample import JobSummary
from carrel.sampling import compact, reading, recorded
from carrel.sampling.folder import JobFolder

JOBS = 1000
ROWS = 3600
SERIES = "meminfo.MemFree"
"""It differs in each row, so it is read from the table and not from what never changed."""
TICKS = os.sysconf("SC_CLK_TCK")

PSUTIL = """
import os, sys, time
import psutil
seconds, process = float(sys.argv[1]), psutil.Process()
count, cpu = 0, time.process_time()
while count < seconds:
    time.sleep(1 - time.time() % 1)
    psutil.virtual_memory(), psutil.swap_memory(), psutil.cpu_times(percpu=True), psutil.cpu_stats(), os.getloadavg()
    psutil.disk_io_counters(perdisk=True), psutil.net_io_counters(pernic=True)
    process.as_dict(["cpu_times", "memory_info", "num_threads", "io_counters"])
    count += 1
rss = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
print((time.process_time() - cpu) / count * 1e6, rss / 1024)
"""

Cost = tuple[float, float]
"""CPU time of a sample in microseconds, and what is resident in MB."""


def ours(seconds: float) -> Cost:
    import msgspec  # noqa: PLC0415  # as the child does

    with tempfile.TemporaryDirectory() as root, sampler.groups(1) as pids:
        job = msgspec.json.encode(sampler.job(0)).decode()
        words = [sys.executable, "-c", sampler.PACED, root, "1.0", str(seconds), "5.0", job, str(pids[0])]
        used, rss, _ = map(float, subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    return used, rss


def psutil(seconds: float) -> Cost | None:
    if importlib.util.find_spec("psutil") is None:
        return None
    done = subprocess.run(
        [sys.executable, "-c", PSUTIL, str(seconds)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    return float(done[0]), float(done[1])


def node_exporter(seconds: float) -> Cost | None:
    program = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
    if program is None:
        return None
    address = f"127.0.0.1:{_port()}"

    def scrape() -> None:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            answer.read()

    return _of_a_daemon([program, f"--web.listen-address={address}"], scrape, seconds)


def ldmsd(seconds: float) -> Cost | None:
    program = shutil.which("ldmsd")
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "sampler.conf"
        file.write_text(
            "".join(
                f"load name={name}\nconfig name={name} producer=bench instance=bench/{name} {more}\n"
                f"start name={name} interval=1s offset=0\n"
                for name, more in PLUGINS.items()
            )
        )
        words = [program, "-x", f"sock:{_port()}:127.0.0.1", "-c", str(file), "-l", f"{where}/log"]
        return _of_a_daemon(words, lambda: None, seconds)


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _of_a_daemon(words: Sequence[str], ask: Callable[[], None], seconds: float) -> Cost:
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 10
        while True:
            try:
                time.sleep(1)  # what it does at its start is no sample
                ask()
                break
            except OSError:
                if time.monotonic() > deadline_s or child.poll() is not None:
                    raise
        before, count = _cpu_s(child.pid), 0
        while count < seconds:
            time.sleep(1 - time.time() % 1)
            ask()
            count += 1
        used_s = _cpu_s(child.pid) - before
        status = Path(f"/proc/{child.pid}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    finally:
        child.kill()
        child.wait()
    return used_s / count * 1e6, rss / 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def others(figures: sampler.Figures, repeat: int, seconds: float) -> None:
    seen: dict[str, list[Cost]] = {}
    kinds = {"ours, with a job": ours, "psutil": psutil, "node_exporter": node_exporter, "ldmsd, six plug-ins": ldmsd}
    for _ in range(repeat):
        for name, measure in kinds.items():
            if (cost := measure(seconds)) is not None:
                seen.setdefault(name, []).append(cost)
    for name in kinds:
        if name not in seen:
            print(f"{name}: not installed")
            continue
        figures.row(f"{name}: a sample, paced at 1 Hz", [cost for cost, _ in seen[name]], "us")
        figures.row(f"{name}: resident", [rss for _, rss in seen[name]], "MB")


def reads(figures: sampler.Figures, repeat: int, _seconds: float) -> None:
    for kind in ("parquet", "csv"):
        with tempfile.TemporaryDirectory() as root, sampler.groups(1) as pids:
            _read(figures, repeat, sampler._fast_forward(Path(root), ROWS, pids[0]), kind)  # noqa: SLF001


def _read(figures: sampler.Figures, repeat: int, made: Path, kind: str) -> None:
    run = JobKey(cluster="bench", job_id=0, submit_s=1)
    opened = JobFolder.make(made.parent.parent, run, user="bench", uid=os.geteuid(), gid=os.getegid())
    compact.spawn(opened, "samples.bench", [kind]).communicate()
    opened.close()
    figures.row(f"one series of {ROWS} rows, {kind}", [_ms(lambda: _series(made)) for _ in range(repeat)], "ms")
    for number in range(1, JOBS):
        shutil.copytree(made, made.with_name(str(number)))
    folders = [made.with_name(str(number)) for number in range(JOBS)]
    summaries = [_ms(lambda: max(map(_peak, folders))) for _ in range(repeat)]
    figures.row(f"peak of memory over {JOBS} jobs, by their summaries", summaries, "ms")


def _series(folder: Path) -> None:
    (found,) = recorded.read(folder, lambda _: {SERIES}).recordings
    assert len(found.series[SERIES].times_us) == ROWS


def _peak(folder: Path) -> int:
    known = reading.decoded(folder / "summary.json", JobSummary)
    return max(node.memory_peak_bytes or 0 for node in known.nodes) if known else 0


def _ms(deed: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    deed()
    return (time.perf_counter() - began_s) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--seconds", type=float, default=20, help="length of one measurement")
    parser.add_argument("--only", choices=["others", "reading"], help="one part only")
    arguments = parser.parse_args()
    kernel, python = platform.release(), platform.python_version()
    print(f"{os.cpu_count()} CPUs, Linux {kernel}, Python {python}, load {os.getloadavg()[0]:.1f}")
    for name, part in {"others": others, "reading": reads}.items():
        if arguments.only in (None, name):
            part(sampler.Figures(), arguments.repeat, arguments.seconds)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
