"""The sampler: real processes with known behaviour, in real control groups where there is root."""

import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from carrel.config import Metrics
from carrel.daemons import sampler_thread
from carrel.errors import CarrelError, NotFoundError, RefusedError
from carrel.model.job import Job, JobKey
from carrel.model.sample import Column, NodeSummary, Note, Schema
from carrel.sampling import cgroup, loop
from carrel.sampling.blocks import Block, Layout
from carrel.sampling.loop import Sampler
from carrel.sampling.segment import RowRead, open_reader
from carrel.sampling.tables import Survey

T = TypeVar("T")
V1 = Path("/sys/fs/cgroup")
CONTROLLERS = ("memory", "cpuacct", "freezer", "blkio")


def run(job_id: int = 7, restart: int = 0) -> JobKey:
    return JobKey(cluster="k", job_id=job_id, submit_s=100, restart=restart)


def job(job_id: int = 7, **changes: object) -> Job:
    key = run(job_id)
    made = Job(key=key, state="running", user="ann", uid=os.geteuid(), gid=os.getegid(), cpus=2)
    return msgspec.structs.replace(made, **changes)


def got(answer: "Future[T]") -> T:
    return answer.result(timeout=60)


def wait_for(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.005)  # the fact is in another thread or process


def wait_for_samples(sampler: Sampler, count: int) -> None:
    enough = sampler.status().samples + count
    wait_for(lambda: sampler.status().samples >= enough)


@pytest.fixture
def settings(tmp_path: Path) -> Metrics:
    return Metrics(root=str(tmp_path / "m"), period_s=0.1)


@pytest.fixture
def sampler(settings: Metrics) -> Iterator[Sampler]:
    with running(Sampler(settings, "c1")) as one:
        yield one


@contextlib.contextmanager
def running(sampler: Sampler) -> Iterator[Sampler]:
    thread = threading.Thread(target=sampler.run)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.stop()
        thread.join(timeout=30)
    assert not thread.is_alive()


def segment(settings: Metrics, job_id: int = 7) -> Path:
    return Path(settings.root) / "ann" / str(job_id) / "samples.c1.seg"


def notes(path: Path) -> list[Note]:
    with open_reader(path) as reader:
        return [entry for entry in reader.entries() if isinstance(entry, Note)]


def times_us(path: Path) -> list[int]:
    with open_reader(path) as reader:
        return [entry.time_us for entry in reader.entries() if isinstance(entry, RowRead)]


def summed(settings: Metrics, job_id: int = 7) -> NodeSummary:
    found = Survey(segment(settings, job_id), node="c1", view="host").summary
    assert found is not None
    return found


def ended(sampler: Sampler, key: JobKey) -> NodeSummary:
    folder = got(sampler.remove(key))
    found = Survey(folder.path / "samples.c1.seg", node="c1", view="host").summary
    folder.close()
    assert found is not None
    return found


def test_even_the_shortest_job_has_a_first_and_a_last_sample(sampler: Sampler, settings: Metrics) -> None:
    got(sampler.add(job(), interval_s=60))
    got(sampler.remove(run())).close()
    assert len(times_us(segment(settings))) == 2
    assert [note.what for note in notes(segment(settings))] == ["start", "end"]


def test_samples_fall_on_multiples_of_the_interval(sampler: Sampler, settings: Metrics) -> None:
    got(sampler.add(job()))
    wait_for(lambda: sampler.status().samples >= 8)
    got(sampler.remove(run())).close()
    for now_us in times_us(segment(settings))[1:-1]:
        # A busy machine may be late, but never early, and then the sample that was missed is skipped, not moved.
        assert now_us % 100_000 < 99_000


def test_the_interval_of_a_running_job_can_be_changed_without_a_gap(sampler: Sampler, settings: Metrics) -> None:
    got(sampler.add(job(), interval_s=3600))
    assert len(times_us(segment(settings))) == 1
    got(sampler.interval(run(), 0.05))
    wait_for(lambda: len(times_us(segment(settings))) >= 4)
    got(sampler.interval(run(), 3600))
    got(sampler.remove(run())).close()
    said = [note.text for note in notes(segment(settings)) if note.what == "interval"]
    assert said == ["sampled every 0.05 s from now on", "sampled every 3600 s from now on"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.001, 1e9, float("nan")])
def test_an_interval_out_of_bounds_is_refused(sampler: Sampler, seconds: float) -> None:
    got(sampler.add(job()))
    with pytest.raises(RefusedError, match="cannot be sampled every"):
        got(sampler.interval(run(), seconds))


def test_a_job_that_is_not_sampled_is_not_found(sampler: Sampler) -> None:
    answers: list[Future[Any]] = [
        sampler.interval(run(), 1.0),
        sampler.remove(run()),
        sampler.attach(run(), os.getpid()),
    ]
    for answer in answers:
        with pytest.raises(NotFoundError, match="is not being sampled on c1"):
            got(answer)


def test_a_second_call_changes_nothing(sampler: Sampler, settings: Metrics) -> None:
    first = got(sampler.add(job()))
    assert got(sampler.add(job())) == first
    assert sampler.runs() == (run(),)
    assert [note.what for note in notes(segment(settings))] == ["start"]


def test_a_directory_that_is_not_the_users_fails_that_job_alone(sampler: Sampler, settings: Metrics) -> None:
    where = Path(settings.root) / "ann"
    where.mkdir(parents=True)
    (where / "7").symlink_to("/etc")
    with pytest.raises(CarrelError, match="symbolic link"):
        got(sampler.add(job()))
    got(sampler.add(job(8)))
    assert sampler.status().failures == {"command": 1}
    assert "symbolic link" in sampler.status().last_failure


def test_a_sampler_without_a_job_is_awake_all_the_same(settings: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop._WAIT_MAX_S < sampler_thread.STUCK_S, "each idle node would be told to have a sampler that hangs"
    monkeypatch.setattr(loop, "_WAIT_MAX_S", 0.01)
    with running(Sampler(settings, "c1")) as sampler:
        wait_for(lambda: sampler.status().awake_s > 0)
        first_s = sampler.status().awake_s
        wait_for(lambda: sampler.status().awake_s > first_s)


def test_what_is_known_later_is_kept(sampler: Sampler, settings: Metrics) -> None:
    got(sampler.add(job()))
    got(sampler.describe(job(name="solve", account="physics", time_limit_s=60)))
    got(sampler.remove(run())).close()
    known = Survey(segment(settings), node="c1", view="host").usage.job
    assert known is not None
    assert (known.name, known.account, known.time_limit_s) == ("solve", "physics", 60)


def test_one_more_sample_can_be_had_at_any_moment(settings: Metrics) -> None:
    rare = msgspec.structs.replace(settings, period_s=3600.0)
    with running(Sampler(rare, "c1")) as one:
        got(one.add(job()))
        got(one.sample(run()))
        assert len(times_us(segment(rare))) == 2
        with pytest.raises(NotFoundError):
            got(one.sample(JobKey(cluster="k", job_id=99, submit_s=1)))


def test_a_job_sampled_to_its_end_is_not_begun_again(sampler: Sampler, settings: Metrics) -> None:
    got(sampler.add(job()))
    got(sampler.remove(run())).close()
    segment(settings).rename(segment(settings).with_suffix(".parquet"))
    with pytest.raises(CarrelError, match="has been sampled to its end"):
        got(sampler.add(job()))


def test_a_new_sampler_goes_on_where_the_last_one_stopped(settings: Metrics) -> None:
    for _ in range(2):
        sampler = Sampler(settings, "c1")
        with running(sampler) as one:
            got(one.add(job()))
    found = notes(segment(settings))
    assert [note.what for note in found] == ["start", "gap", "start"]
    assert found[1].from_us in times_us(segment(settings))


class Dear:
    """A source that takes a known time of the CPU."""

    def __init__(self, name: str, cost_s: float) -> None:
        self.name = name
        self.period_s = 0.0
        self.cost_s = cost_s
        self._layout = Layout(Schema(set=name, columns=(Column("n", "count"),), source="test"))

    def read(self) -> list[Block]:
        until_ns = time.thread_time_ns() + int(self.cost_s * 1e9)
        while time.thread_time_ns() < until_ns:
            pass
        return [self._layout.block((1,))]

    def close(self) -> None:
        pass


def test_a_source_that_costs_too_much_is_read_less_often_and_the_files_say_so(
    settings: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GOVERN_EVERY", 2)
    monkeypatch.setattr(loop, "_SMOOTHING", 0.9)
    dear, cheap = Dear("dear", 0.02), Dear("cheap", 0.0)
    sampler = Sampler(msgspec.structs.replace(settings, budget_cores=0.05), "c1", sources=[dear, cheap])
    with running(sampler) as one:
        got(one.add(job(), interval_s=0.05))
        wait_for(lambda: one.status().stretched.get("dear", 1) >= 4)
        dear.cost_s = 0.0
        wait_for(lambda: "dear" not in one.status().stretched)
        got(one.remove(run())).close()
    said = [note for note in notes(segment(settings)) if note.what in {"degraded", "restored"}]
    assert said[0].what == "degraded"
    assert "dear is read at each 2. sample" in said[0].text
    assert said[-1].what == "restored"


def test_a_source_that_fails_is_counted_and_the_others_go_on(settings: Metrics) -> None:
    class Broken(Dear):
        def read(self) -> list[Block]:
            raise OSError(5, "broken")

    sampler = Sampler(settings, "c1", sources=[Broken("broken", 0), Dear("whole", 0)])
    with running(sampler) as one:
        got(one.add(job()))
        assert one.status().failures == {"broken": 1}
        got(one.remove(run())).close()
    with open_reader(segment(settings)) as reader:
        sets = [block.layout.schema.set for row in reader.entries() if isinstance(row, RowRead) for block in row.blocks]
    assert sets == ["whole", "whole"]


def test_near_its_cap_a_job_is_sampled_less_often_and_never_reaches_it(settings: Metrics) -> None:
    small = msgspec.structs.replace(settings, job_bytes_max=3000, period_min_s=0.01, budget_cores=1.0)
    with running(Sampler(small, "c1", sources=[Dear("cheap", 0)])) as one:
        got(one.add(job(), interval_s=0.01))
        wait_for(lambda: sum(note.what == "degraded" for note in notes(segment(settings))) >= 2)
        got(one.remove(run())).close()
    assert segment(settings).stat().st_size < 3000
    said = [note.text for note in notes(segment(settings)) if note.what == "degraded"]
    assert "sampled every 0.02 s from now on" in said[0]


def test_a_clock_that_is_set_is_told_and_sampling_goes_on(
    sampler: Sampler, settings: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    got(sampler.add(job()))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    got(sampler.describe(job()))  # wakes it
    wait_for_samples(sampler, 3)
    said = [note.text for note in notes(segment(settings)) if note.what == "clock"]
    assert len(said) == 1
    assert "-3600.0" in said[0] or "-3599.9" in said[0]


KILLED = """
import sys, time
from carrel.config import Metrics
from carrel.daemons import sampler_thread
from carrel.sampling.loop import Sampler
import threading, msgspec
from carrel.model.job import Job
sampler = Sampler(Metrics(root=sys.argv[1], period_s=0.05), "c1")
threading.Thread(target=sampler.run, daemon=True).start()
sampler.add(msgspec.json.decode(sys.argv[2], type=Job)).result()
while True:
    print(sampler.status().samples, flush=True)
    time.sleep(0.01)
"""


def test_a_sampler_killed_outright_loses_nothing_that_it_had_taken(settings: Metrics) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, settings.root, msgspec.json.encode(job())], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        taken = 0
        while taken < 5:
            taken = int(child.stdout.readline())
        child.kill()
    assert len(times_us(segment(settings))) >= taken


# ---- real control groups


class SlurmGroups:
    """The groups of a job, made and removed as slurmstepd does in version 1."""

    def __init__(self, job_id: int, top: str) -> None:
        self.jobs = [V1 / controller / top / "uid_0" / f"job_{job_id}" for controller in CONTROLLERS]
        self.children: list[subprocess.Popen[str]] = []
        self.make()

    def make(self) -> None:
        for path in self.jobs:
            (path / "step_0").mkdir(parents=True, exist_ok=True)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python script as a task; its first instruction runs in the groups."""
        procs = [str(path / "step_0" / "cgroup.procs") for path in self.jobs]
        joined = f"import os\nfor p in {procs!r}:\n    open(p, 'w').write('0')\n{script}"
        child = subprocess.Popen(
            [sys.executable, "-c", joined, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.children.append(child)
        return child

    def end(self) -> None:
        """Remove what can be removed, as when the last step of a job ends."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        for path in self.jobs:
            descriptor = os.open(V1 / path.relative_to(V1).parts[0], os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for directory in (path / "step_0", path, path.parent):
                try:
                    directory.rmdir()
                except OSError:
                    break
            os.close(descriptor)


@pytest.fixture
def groups() -> Iterator[Callable[[int], SlurmGroups]]:
    for controller in CONTROLLERS:
        if not (V1 / controller / "cgroup.procs").exists():
            pytest.skip(f"no cgroup v1 {controller} controller on this machine")
    top = f"carreltest_{secrets.token_hex(4)}"
    made: list[SlurmGroups] = []

    def make(job_id: int) -> SlurmGroups:
        made.append(SlurmGroups(job_id, top))
        return made[-1]

    yield make
    for one in made:
        one.end()
    left = [path for controller in CONTROLLERS for path in (V1 / controller / top).rglob("*/")]
    for controller in CONTROLLERS:
        for path in [*sorted((V1 / controller / top).rglob("*/"), reverse=True), V1 / controller / top]:
            path.rmdir()
    assert left == []


READY = "import sys, time\nprint('ready', flush=True); sys.stdin.readline()\n"
DONE = "print(time.process_time(), flush=True); sys.stdin.readline()\n"


def ready(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child.pid


def let(child: subprocess.Popen[str]) -> float:
    """Let it do its work; return the CPU time that it says it took."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return float(child.stdout.readline())


BURN = f"{READY}until = time.process_time() + float(sys.argv[1])\nwhile time.process_time() < until: pass\n{DONE}"
HOLD = f"""{READY}
import mmap
own = bytearray(b"x") * (int(sys.argv[1]) << 20)
shared = mmap.mmap(-1, int(sys.argv[2]) << 20)
for at in range(0, len(shared), 4096): shared[at] = 1
{DONE}"""
WRITE = f"""{READY}
with open(sys.argv[1], "wb") as file:
    for _ in range(int(sys.argv[2])): file.write(bytes(1 << 20))
    file.flush(); os.fsync(file.fileno())
{DONE}"""


@pytest.mark.root
def test_cpu_time_is_what_the_program_took(sampler: Sampler, groups: Callable[[int], SlurmGroups]) -> None:
    child = groups(7).start(BURN, "0.6")
    got(sampler.add(job(), pid=ready(child)))
    took_s = let(child)
    found = ended(sampler, run())
    assert found.cpu_s == pytest.approx(took_s, rel=0.05, abs=0.03)
    assert found.cpu_peak is not None
    # On a busy machine it has less than a CPU, and the moments in which a counter is read are not evenly apart.
    assert 0 < found.cpu_peak < 2


@pytest.mark.root
def test_memory_counts_what_is_shared_and_leaves_out_the_page_cache(
    sampler: Sampler, settings: Metrics, groups: Callable[[int], SlurmGroups]
) -> None:
    child = groups(7).start(HOLD, "120", "80")
    got(sampler.add(job(), pid=ready(child)))
    let(child)
    # The kernel may be two seconds late with what a group's memory is used for, though not with how much it is.
    wait_for(lambda: (summed(settings).memory_peak_bytes or 0) >= 200 * 2**20)
    found = ended(sampler, run())
    assert found.memory_peak_bytes is not None
    assert 200 <= found.memory_peak_bytes / 2**20 <= 200 * 1.05 + 12  # an interpreter is in it too
    assert found.memory_cached_peak_bytes is not None
    assert found.memory_cached_peak_bytes >= found.memory_peak_bytes


@pytest.mark.root
def test_what_is_written_is_counted_though_no_group_is_charged_for_it(
    sampler: Sampler, groups: Callable[[int], SlurmGroups], tmp_path: Path
) -> None:
    child = groups(7).start(WRITE, str(tmp_path / "file"), "40")
    got(sampler.add(job(), pid=ready(child)))
    let(child)
    found = ended(sampler, run())
    assert found.written_bytes is not None
    assert 40 * 2**20 <= found.written_bytes <= 42 * 2**20


@pytest.mark.root
def test_two_jobs_at_once_do_not_see_each_other(
    sampler: Sampler, settings: Metrics, groups: Callable[[int], SlurmGroups]
) -> None:
    burner, holder = groups(7).start(BURN, "0.4"), groups(8).start(HOLD, "100", "1")
    got(sampler.add(job(7), pid=ready(burner)))
    got(sampler.add(job(8), pid=ready(holder)))
    holding_s = let(holder)
    burning_s = let(burner)
    wait_for(lambda: (summed(settings, 8).memory_peak_bytes or 0) >= 100 * 2**20)
    first, second = ended(sampler, run(7)), ended(sampler, run(8))
    assert first.cpu_s == pytest.approx(burning_s, rel=0.05, abs=0.03)
    assert second.cpu_s == pytest.approx(holding_s, rel=0.05, abs=0.03)
    assert first.memory_peak_bytes is not None
    assert second.memory_peak_bytes is not None
    assert first.memory_peak_bytes < 20 * 2**20
    assert second.memory_peak_bytes > 100 * 2**20


@pytest.mark.root
def test_the_total_is_right_though_slurm_has_removed_its_groups_before_the_last_sample(
    sampler: Sampler, groups: Callable[[int], SlurmGroups]
) -> None:
    made = groups(7)
    child = made.start(BURN, "0.3")
    got(sampler.add(job(), pid=ready(child), interval_s=3600))
    took_s = let(child)
    made.end()
    found = ended(sampler, run())
    assert found.samples == 2
    assert found.cpu_s == pytest.approx(took_s, rel=0.05, abs=0.03)
    assert not any(path.exists() for path in made.jobs if "freezer" not in str(path)), "the last sample lets go of them"


@pytest.mark.root
def test_counters_go_on_over_groups_that_are_made_anew(
    sampler: Sampler, groups: Callable[[int], SlurmGroups], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "hold", lambda _: None)  # as where the hierarchy may not be written
    made = groups(7)
    took_s = 0.0
    for _ in range(2):
        made.make()
        child = made.start(BURN, "0.2")
        got(sampler.add(job(), pid=ready(child)))
        took_s += let(child)
        wait_for_samples(sampler, 2)
        made.end()
        wait_for_samples(sampler, 2)
    assert ended(sampler, run()).cpu_s == pytest.approx(took_s, rel=0.05, abs=0.06)


@pytest.mark.root
def test_on_a_full_disk_jobs_go_on_and_the_gap_is_told(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", mount], check=True)
    try:
        settings = Metrics(root=str(mount), period_s=0.05)
        with running(Sampler(settings, "c1")) as one:
            got(one.add(job()))
            filler = mount / "filler"
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while os.write(file.fileno(), bytes(4096)):
                    pass
            wait_for(lambda: one.status().failures.get("store", 0) >= 3)
            filler.unlink()
            wait_for_samples(one, 2)
            got(one.remove(run())).close()
        gap = next(note for note in notes(segment(settings)) if "could not be stored" in note.text)
        assert gap.what == "gap"
        assert gap.time_us - gap.from_us >= 100_000
    finally:
        subprocess.run(["umount", mount], check=True)


def test_without_groups_of_its_own_a_jobs_processes_are_counted(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "of_process", lambda _: cgroup.JobGroups())
    with subprocess.Popen(
        [sys.executable, "-c", BURN, "0.4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        got(sampler.add(job(), pid=ready(child)))
        took_s = let(child)
        found = ended(sampler, run())
        child.send_signal(signal.SIGKILL)
    assert found.cpu_s == pytest.approx(took_s, rel=0.05, abs=0.03)
    assert found.processes_peak == 1


def test_reading_the_node_needs_no_library_beyond_pythons_own() -> None:
    script = "import sys; from carrel.sampling import loop; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"pyarrow", "pandas", "numpy", "psutil", "asyncio", "confluent_kafka"}
