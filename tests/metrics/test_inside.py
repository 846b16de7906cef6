"""The inside of a guest as its agent tells it: a real carrel-agent on this machine, and one that lies."""

import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from carrel import paths
from carrel.sampling import inside
from carrel.sampling.inside import GuestFiles, GuestProcesses
from carrel.sampling.outside import GuestsOutside


def said(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


@pytest.fixture
def guest() -> Iterator[Callable[..., GuestFiles]]:
    """Make a guest that answers what a function makes of the names of files."""
    ours: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def make(answer: Callable[[list[str]], bytes], timeout_s: float = 60.0) -> GuestFiles:
        mine, its = socket.socketpair()
        ours.append(its)

        def serve() -> None:
            while head := its.recv(8, socket.MSG_WAITALL):
                body = its.recv(struct.unpack("<BBHI", head)[3], socket.MSG_WAITALL).decode()
                its.sendall(answer([word for word in body.split("\0") if word.startswith(("file=", "processes="))]))

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return GuestFiles(mine.detach(), timeout_s=timeout_s)

    yield make
    for sock in ours:
        sock.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(timeout=30)
    for sock in ours:
        sock.close()


MEMINFO = b"MemTotal:  100 kB\nMemFree:  50 kB\n"


def test_all_files_of_a_sample_come_in_one_exchange(guest: Callable[..., GuestFiles]) -> None:
    asked: list[list[str]] = []

    def answer(names: list[str]) -> bytes:
        asked.append(names)
        return said(said(*(b"" if name.startswith("processes=") else name.encode() for name in names)))

    files = guest(answer)
    first, _ = files.open(Path("/proc/a"))
    second, _ = files.open(Path("/proc/b"))
    asked.clear()
    for _ in range(2):
        assert (first(), second(), files.processes()) == (b"file=/proc/a", b"file=/proc/b", [])
    assert asked == [["file=/proc/a", "file=/proc/b", f"processes={inside.SESSIONS}"]] * 2
    files.close()


@pytest.mark.parametrize(
    "answer",
    [b"\xff\xff\xff\xff", said(b"\x10\0\0\0abc"), said(said(b"a", b"b", b"c")), b"\0\0"],
    ids=["endless", "short", "too many", "slow"],
)
def test_a_guest_that_lies_is_not_asked_again(guest: Callable[..., GuestFiles], answer: bytes) -> None:
    files = guest(lambda _: answer, 0.3)
    for _ in range(2):
        with pytest.raises(OSError, match=r"\w"):
            files.open(Path("/proc/meminfo"))
        assert files.gone
    files.close()


def test_a_file_that_changes_its_shape_again_and_again_is_given_up(guest: Callable[..., GuestFiles]) -> None:
    lines = [b"MemTotal: 100 kB\n"]

    def answer(names: list[str]) -> bytes:
        lines.append(b"Mem%d: 1 kB\n" % len(lines))
        files = [b"".join(lines) if name == "file=/proc/meminfo" else b"" for name in names if name[:5] == "file="]
        return said(b"".join(said(file) for file in files) + (said(b"") if len(names) > len(files) else b""))

    files = guest(answer)
    found = {source.name: source for source in inside.sources(files, slow_period_s=60.0)}
    counts = [len(found["meminfo"].read()) for _ in range(inside.SHAPES_MAX + 5)]
    assert counts[0] == 1
    assert counts[-1] == 0
    files.close()


def test_nonsense_in_a_file_is_a_failure_of_that_file_alone(guest: Callable[..., GuestFiles]) -> None:
    told = {"meminfo": MEMINFO, "vmstat": b"a 1\nb 2\n"}

    def answer(names: list[str]) -> bytes:
        files = [told.get(name.rpartition("/")[2], b"") for name in names if name[:5] == "file="]
        return said(b"".join(said(file) for file in files) + (said(b"") if len(names) > len(files) else b""))

    files = guest(answer)
    found = {source.name: source for source in inside.sources(files, slow_period_s=60.0)}
    told["meminfo"] = b"MemTotal: -1 kB nonsense\n\n: \n"
    told["vmstat"] = b"a 99999999999999999999999999\nb -5\n"
    files.forget()
    with pytest.raises(ValueError, match="meminfo of the guest"):
        found["meminfo"].read()
    (block,) = found["vmstat"].read()
    assert block.layout.packing.unpack(block.packed) == (2**64 - 1, 0)
    files.close()


def test_processes_of_a_guest_are_summed_as_those_of_a_node(guest: Callable[..., GuestFiles]) -> None:
    stat = b"42 (a (b) c) S 1 " + b" ".join(b"%d" % number for number in range(5, 53))
    io = b"rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 5\nwrite_bytes: 6\ncancelled_write_bytes: 7\n"
    files = guest(lambda _: said(said(said(stat, io, b"nonsense", b""))))
    whole, one = GuestProcesses(files, period_s=10.0).read()
    values = dict(zip(whole.layout.schema.names, whole.layout.packing.unpack(whole.packed), strict=True))
    assert (values["processes.processes"], values["processes.written_bytes"]) == (1, 6)
    assert (one.layout.schema.instance, one.layout.schema.label) == ("42", "a (b) c")
    files.close()


def test_a_real_agent_answers_what_this_kernel_says() -> None:
    agent = paths.libexec() / "carrel-agent"
    if not agent.exists():
        pytest.skip(f"{agent}: not built; see: make native")
    # Not pytest's own directory: the path of a unix socket is short.
    directory = Path(mkdtemp(prefix="ca", dir="/tmp"))
    where = directory / "agent"
    child = subprocess.Popen([agent, "--serve", where], stderr=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as stream:
            _connect(stream, where)
            name = b"carrel.m.test"
            stream.sendall(struct.pack("<BBHI", 14, 0, 0, len(name)) + name)
            files = GuestFiles(stream.detach(), timeout_s=30.0)
        found = {source.name: source for source in inside.sources(files, slow_period_s=60.0)}
        assert {"meminfo", "vmstat", "cpu", "disk", "net", "loadavg", "interrupts"} <= found.keys()
        (memory,) = found["meminfo"].read()
        total_kib = dict(zip(memory.layout.schema.names, memory.layout.packing.unpack(memory.packed), strict=True))
        assert f"MemTotal:       {total_kib['meminfo.MemTotal']:8} kB" in Path("/proc/meminfo").read_text()
        files.close()
    finally:
        child.kill()
        child.wait()
        shutil.rmtree(directory)


def _connect(stream: socket.socket, where: Path) -> None:
    for _ in range(1000):
        try:
            stream.connect(str(where))
        except OSError:
            threading.Event().wait(0.01)  # another process makes it
        else:
            return
    pytest.fail(f"nobody listens on {where}")


def test_the_cpus_of_a_guest_are_its_threads_of_that_name_and_their_sum_outlives_it(tmp_path: Path) -> None:
    for tid, (name, counted) in enumerate(
        {"CPU 0/KVM": "5 7 1", "CPU 1/KVM": "10 20 1", "worker": "100 100 1"}.items()
    ):
        thread = tmp_path / "7" / "task" / str(tid)
        thread.mkdir(parents=True)
        (thread / "comm").write_text(f"{name}\n")
        (thread / "schedstat").write_text(f"{counted}\n")
    (tmp_path / "7" / "task" / "0a").mkdir()  # as of a worker that ends just now
    guests = GuestsOutside(tmp_path)
    guests.add(7)
    guests.tell("a", {"read_bytes": 1, "written_bytes": 2, "reads": 3, "writes": 4})
    cpus, disk = guests.read()
    assert cpus.layout.packing.unpack(cpus.packed) == (2, 15, 27)
    assert disk.layout.packing.unpack(disk.packed) == (1, 2, 3, 4)
    for tid in range(2):
        (tmp_path / "7" / "task" / str(tid) / "schedstat").write_text("")  # as of a thread that is gone
    (cpus,) = guests.read()
    assert cpus.layout.packing.unpack(cpus.packed) == (0, 15, 27)
    guests.close()
