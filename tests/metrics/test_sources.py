"""What is read of the kernel: the right numbers under the right names."""

import os
from pathlib import Path

import pytest

from carrel.sampling import cgroup, node, processes
from carrel.sampling.blocks import Block


def named(block: Block) -> dict[str, float]:
    schema = block.layout.schema
    return dict(zip((c.name for c in schema.columns), block.layout.packing.unpack(block.packed), strict=True))


def test_every_source_of_this_kernel_gives_as_many_numbers_as_names() -> None:
    found = {source.name: source for source in node.sources()}
    assert {"meminfo", "vmstat", "loadavg", "cpu", "net", "interrupts"} <= found.keys()
    for source in found.values():
        (block,) = source.read()
        names = block.layout.schema.names
        assert len(set(names)) == len(names) == len(named(block))
        source.close()


def test_the_nodes_numbers_are_those_that_others_read() -> None:
    found = {source.name: named(source.read()[0]) for source in node.sources()}
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert found["meminfo"]["MemTotal"] == int(lines["MemTotal"].split()[0])
    cpus = sum(line.startswith("cpu") for line in Path("/proc/stat").read_text().splitlines()) - 1
    assert sum(name.endswith(".idle") for name in found["cpu"]) == cpus
    assert found["loadavg"]["threads"] >= 1
    assert "lo.rx_bytes" in found["net"]


def test_a_source_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text("0.50 1.00 2.00 3/400 4242\n")
    (source,) = node.sources(tmp_path)
    assert named(source.read()[0]) == {
        "load1": 0.5, "load5": 1.0, "load15": 2.0, "runnable": 3.0, "threads": 400.0, "last_pid": 4242.0,
    }  # fmt: skip
    source.close()


def test_a_disk_that_comes_gets_its_columns(tmp_path: Path) -> None:
    line = "   8  {n}  sd{n} 1 2 3 4 5 6 7 8 9 10 11 0 0 0 0 0 0\n"
    loop = "   7  0  loop0 9 9 9 9 9 9 9 9 9 9 9 0 0 0 0 0 0\n"
    path = tmp_path / "diskstats"
    path.write_text(loop + line.format(n=0))
    (source,) = node.sources(tmp_path)
    assert named(source.read()[0])["sd0.written_sectors"] == 7
    with path.open("a") as file:
        file.write(line.format(n=1))
    assert [name for name in named(source.read()[0]) if name.endswith(".reads")] == ["sd0.reads", "sd1.reads"]
    source.close()


def test_interrupts_are_summed_over_the_cpus_of_a_large_node(tmp_path: Path) -> None:
    cpus = 512
    head = "".join(f" {f'CPU{n}':>10}" for n in range(cpus))
    rows = [
        " 24:" + " 2".rjust(11) * cpus + "  PCI-MSIX-0000:00:01.0   0-edge      nvme0q1",
        "LOC:" + " 3".rjust(11) * cpus + "   Local timer interrupts",
        "ERR:          5",
    ]
    (tmp_path / "interrupts").write_text("\n".join([head, *rows]) + "\n")
    (source,) = node.sources(tmp_path)
    assert named(source.read()[0]) == {"24-nvme0q1": 2 * cpus, "LOC": 3 * cpus, "ERR": 5}
    source.close()


MOUNTS = """\
cgroup /cg/memory cgroup rw,memory 0 0
cgroup /cg/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /cg/freezer cgroup rw,freezer 0 0
cgroup2 /cg/unified cgroup2 rw 0 0
"""


@pytest.mark.parametrize(
    ("line", "unified"),
    [
        ("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0", "/system.slice/slurmstepd.scope/job_7"),
        ("0::/system.slice/n1_slurmstepd.scope/job_7/step_batch/slurm", "/system.slice/n1_slurmstepd.scope/job_7"),
        ("0::/system.slice/slurmstepd.scope/s5K1ABC/step_extern/user", "/system.slice/slurmstepd.scope/s5K1ABC"),
        ("0::/user.slice/session-1.scope", ""),
        ("0::/system.slice/slurmd.service", ""),
        ("0::/step_0", ""),
        ("0::/", ""),
    ],
)
def test_in_version_2_the_jobs_group_is_above_the_step_whatever_it_is_called(
    tmp_path: Path, line: str, unified: str
) -> None:
    groups = cgroup.of_process(7, proc=proc(tmp_path, line))
    assert groups.unified == (f"/cg/unified{unified}" if unified else "")
    assert groups.any == bool(unified)


def test_in_version_1_each_controller_has_its_own_directory(tmp_path: Path) -> None:
    lines = "4:memory:/slurm/uid_5/job_7/step_0/task_0\n2:cpu,cpuacct:/\n6:freezer:/slurm_n1/uid_5/job_7/step_0\n0::/"
    groups = cgroup.of_process(7, proc=proc(tmp_path, lines))
    assert groups.v1 == {"memory": "/cg/memory/slurm/uid_5/job_7", "freezer": "/cg/freezer/slurm_n1/uid_5/job_7"}
    assert groups.processes == "/cg/memory/slurm/uid_5/job_7"


def test_a_guest_that_is_a_node_is_counted_with_what_belongs_to_it_and_only_under_its_own_name(tmp_path: Path) -> None:
    where = proc(tmp_path, "4:memory:/slurm_v1/carrel\n6:freezer:/\n0::/slurm_v2/carrel")
    assert cgroup.of_guest_node(7, "v1", proc=where) == cgroup.JobGroups(v1={"memory": "/cg/memory/slurm_v1"})
    assert not cgroup.of_guest_node(7, "v", proc=where).any


def proc(tmp_path: Path, lines: str) -> Path:
    (tmp_path / "7").mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "7" / "cgroup").write_text(lines + "\n")
    (tmp_path / "self" / "mounts").write_text(MOUNTS)
    return tmp_path


V2 = {
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_throttled 0\nthrottled_usec 7\n",
    "memory.stat": "anon 100\nfile 60\nshmem 30\nfile_mapped 5\npgfault 9\npgmajfault 1\n",
    "memory.current": "190\n",
    "memory.peak": "400\n",
    "memory.max": "max\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n",
    "pids.current": "4\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2\n8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=11\nfull avg10=0 avg60=0 avg300=0 total=12\n",
}


def test_version_2_has_the_names_and_units_of_version_1(tmp_path: Path) -> None:
    for name, text in V2.items():
        (tmp_path / name).write_text(text)
    source = cgroup.GroupSource(cgroup.JobGroups(unified=str(tmp_path)))
    found = named(source.read()[0])
    assert found == {
        "cpu_ns": 1_500_000, "cpu_user_ns": 1_000_000, "cpu_system_ns": 500_000, "throttled_ns": 7000,
        "memory_anon_bytes": 100, "memory_cache_bytes": 60, "memory_shmem_bytes": 30, "memory_mapped_bytes": 5,
        "page_faults": 9, "page_faults_major": 1, "memory_bytes": 190, "memory_peak_bytes": 400,
        "memory_limit_bytes": 0, "oom_kills": 1, "tasks": 4, "device_read_bytes": 11, "device_write_bytes": 22,
        "device_read_count": 4, "device_write_count": 6, "cpu_some_us": 11, "cpu_full_us": 12,
        "memory_used_bytes": 130,
    }  # fmt: skip
    source.close()


def test_what_a_kernel_does_not_count_is_absent(tmp_path: Path) -> None:
    (tmp_path / "pids.current").write_text("4\n")
    source = cgroup.GroupSource(cgroup.JobGroups(unified=str(tmp_path)))
    assert named(source.read()[0]) == {"tasks": 4}
    source.close()


def test_counters_go_on_where_an_earlier_group_of_the_job_ended(tmp_path: Path) -> None:
    for name, text in V2.items():
        (tmp_path / name).write_text(text)
    groups = cgroup.JobGroups(unified=str(tmp_path))
    first = cgroup.GroupSource(groups)
    first.read()
    second = cgroup.GroupSource(groups, carried=first.totals())
    found = named(second.read()[0])
    assert (found["cpu_ns"], found["oom_kills"], found["memory_bytes"]) == (3_000_000, 2, 190)
    first.close()
    second.close()


def stat_line(pid: int, parent: int, *, user: int = 0, reaped: int = 0, name: str = "a) (b") -> str:
    fields = ["S", parent, 1, 1, 0, -1, 0, 0, 0, 2, 0, user, 0, reaped, 0, 20, 0, 3, 0, 5, 4096, 6, 2**64 - 1]
    return f"{pid} ({name}) " + " ".join(map(str, [*fields, *[0] * 27]))


class Processes:
    """A /proc with processes that the test makes, and a control group that lists them."""

    def __init__(self, where: Path) -> None:
        self.where = where
        (where / "group").mkdir()
        self.members: set[int] = set()
        self.source = processes.ProcessSource(str(where / "group"), period_s=0, proc=where)

    def put(self, pid: int, parent: int, *, user: int = 0, reaped: int = 0, written: int = 0) -> None:
        directory = self.where / str(pid)
        directory.mkdir(exist_ok=True)
        (directory / "stat").write_text(stat_line(pid, parent, user=user, reaped=reaped))
        names = ("rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes")
        (directory / "io").write_text("".join(f"{n}: {written if n == 'write_bytes' else 0}\n" for n in names))
        self.members.add(pid)

    def end(self, pid: int) -> None:
        self.members.remove(pid)

    def sums(self) -> dict[str, float]:
        (self.where / "group" / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in self.members))
        return named(self.source.read()[0])


TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")


def test_a_process_whose_name_holds_a_parenthesis_is_read_right(tmp_path: Path) -> None:
    made = Processes(tmp_path)
    made.put(10, 1, user=4, written=100)
    assert made.sums()["cpu_ns"] == 4 * TICK_NS
    block = made.source.read()[1]
    assert block.layout.schema.label == "a) (b"
    assert named(block)["written_bytes"] == 100
    made.source.close()


def test_what_a_reaped_child_used_is_counted_once_with_its_parent(tmp_path: Path) -> None:
    made = Processes(tmp_path)
    made.put(10, 1, user=1)
    made.put(11, 10, user=5)
    assert made.sums()["cpu_ns"] == 6 * TICK_NS
    made.end(11)
    made.put(10, 1, user=1, reaped=5)
    assert made.sums()["cpu_ns"] == 6 * TICK_NS
    made.source.close()


def test_what_an_orphan_used_is_kept_when_it_is_gone(tmp_path: Path) -> None:
    made = Processes(tmp_path)
    made.put(10, 1, user=1)
    made.put(11, 1, user=5, written=64)
    made.sums()
    made.end(11)
    found = made.sums()
    assert (found["cpu_ns"], found["written_bytes"], found["processes"]) == (6 * TICK_NS, 64, 1)
    made.end(10)
    assert made.sums()["cpu_ns"] == 6 * TICK_NS
    made.source.close()


def test_a_sum_never_falls_while_a_child_waits_to_be_reaped(tmp_path: Path) -> None:
    made = Processes(tmp_path)
    made.put(10, 1, user=1)
    made.put(11, 10, user=5)
    made.sums()
    made.end(11)
    assert made.sums()["cpu_ns"] == 6 * TICK_NS
    made.source.close()


def test_of_too_many_processes_the_sum_says_how_many_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROCESSES_MAX", 3)
    made = Processes(tmp_path)
    for pid in range(10, 15):
        made.put(pid, 1)
    found = made.sums()
    assert (found["processes"], found["processes_read"]) == (5, 3)
    made.source.close()
