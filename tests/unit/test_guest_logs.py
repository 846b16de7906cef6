"""Logs of guests that were nodes: they outlive the guest, and nobody's slip loses or leaks them."""

import os
import stat
import subprocess  # a process to be killed
import sys
from pathlib import Path

import msgspec
import pytest

from carrel.config import GuestLogs as Settings
from carrel.daemons.guestlogs import GuestLog, GuestLogs, LogOf
from carrel.errors import CarrelError
from carrel.testing import DriverContract

OF = LogOf(user="ada", uid=os.getuid(), run="7.1731000000.0", guest="vm1")


@pytest.fixture
def logs(tmp_path: Path) -> GuestLogs:
    return GuestLogs(Settings(dir=str(tmp_path / "logs"), file_bytes_max=100, keep_days=1.0, user_bytes_max=10_000))


def test_a_spawn_log_has_a_time_and_a_sentence_a_line_whatever_the_sentence_holds(logs: GuestLogs) -> None:
    logs.say(OF, "clone of debian12 on esx-1 failed: no space", now_s=0.5)
    logs.say(OF, "a job's name: \x1b[2J\n'\"; rm -rf /", now_s=1.0)
    assert logs.path(OF, "spawn.log").read_text().splitlines() == [
        "1970-01-01T00:00:00.500+00:00 clone of debian12 on esx-1 failed: no space",
        "1970-01-01T00:00:01.000+00:00 a job's name: \\x1b[2J\\n'\"; rm -rf /",
    ]


def test_of_each_phase_the_first_time_counts_and_they_come_in_their_order(logs: GuestLogs) -> None:
    logs.mark(OF, "destroyed", now_s=9.0)
    logs.mark(OF, "clone_start", now_s=1.0)
    logs.mark(OF, "clone_start", now_s=5.0)
    assert list(logs.timings(OF).items()) == [("clone_start", 1.0), ("destroyed", 9.0)]
    assert GuestLogs(logs._settings).timings(OF) == logs.timings(OF), "another process reads something else"


def test_a_line_that_a_power_cut_tore_is_none_and_the_next_is_read(logs: GuestLogs) -> None:
    logs.mark(OF, "clone_start", now_s=1.0)
    path = logs.path(OF, "timings")
    path.chmod(0o600)
    path.write_text("clone_start 1.000\nclone_e\nregistered 3.000\n")
    assert dict(logs.timings(OF)) == {"clone_start": 1.0, "registered": 3.0}


def test_the_end_of_a_log_is_kept_and_a_later_one_takes_its_place(logs: GuestLogs, tmp_path: Path) -> None:
    source = tmp_path / "slurmd.log"
    source.write_bytes(b"x" * 500 + b"the end")
    logs.keep(OF, "slurmd", source)
    kept = logs.path(OF, "slurmd.log").read_bytes()
    assert len(kept) == 100
    assert kept.endswith(b"xthe end")
    logs.keep(OF, "slurmd", b"from elsewhere")
    logs.keep(OF, "slurmd", tmp_path / "absent")
    assert logs.path(OF, "slurmd.log").read_bytes() == b"from elsewhere"


def test_a_link_in_place_of_a_log_is_not_followed(logs: GuestLogs, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    link = tmp_path / "console.log"
    link.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        logs.keep(OF, "console", link)
    assert not logs.path(OF, "console.log").exists()


def test_a_log_is_its_users_to_read_and_nobody_elses(logs: GuestLogs) -> None:
    logs.say(OF, "hello")
    facts = logs.path(OF, "spawn.log").stat()
    assert facts.st_uid == OF.uid
    assert stat.S_IMODE(facts.st_mode) == (0o400 if os.geteuid() == 0 else 0o600)


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(logs: GuestLogs, name: str) -> None:
    for of in (
        LogOf(user=name, uid=0, run="7", guest="g"),
        LogOf(user="u", uid=0, run=name, guest="g"),
        LogOf(user="u", uid=0, run="7", guest=name),
    ):
        with pytest.raises(CarrelError, match="no name for a log's file"):
            logs.say(of, "hello")


def test_old_logs_go_and_young_ones_stay(logs: GuestLogs) -> None:
    old, young = (LogOf(user="ada", uid=OF.uid, run=run, guest="vm1") for run in ("1.1.0", "2.2.0"))
    for of in (old, young):
        logs.say(of, "hello")
    day_s = 86400.0
    os.utime(logs.path(old, "spawn.log"), (1.0, 1.0))
    now_s = logs.path(young, "spawn.log").stat().st_mtime
    assert [path.name for path in logs.prune(now_s=now_s)] == ["1.1.0"]
    assert logs.path(young, "spawn.log").exists()
    assert [path.name for path in logs.prune(now_s=now_s + 2 * day_s)] == ["2.2.0"]
    logs.say(young, "and goes on")
    assert logs.path(young, "spawn.log").read_text().endswith("and goes on\n")


def test_a_guest_names_its_log() -> None:
    spec = DriverContract().spec("4711.1.0")
    assert LogOf.guest_of(spec) == LogOf(user="contract", uid=spec.uid, run="4711.1731000000.0", guest="4711.1.0")


def test_a_log_that_cannot_be_written_costs_no_guest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    log = GuestLog(GuestLogs(Settings(dir=str(tmp_path / "file" / "below"))), OF)
    log.say("hello")
    log.mark("clone_start")
    log.keep("console", tmp_path / "file")
    assert [record.message[:34] for record in caplog.records] == ["a log of guest vm1 is not written:"] * 3


def test_a_guests_log_is_the_same_for_each_that_follows_it(logs: GuestLogs) -> None:
    for now_s in (1.0, 2.0):
        log = GuestLog(logs, OF)
        log.mark("registered", now_s=now_s)
        log.mark("registered", now_s=now_s + 10)
    assert logs.timings(OF) == {"registered": 1.0}


def test_whoever_ends_a_guest_can_say_where_its_logs_are_and_a_user_without_any_costs_no_guest(
    logs: GuestLogs, tmp_path: Path
) -> None:
    assert GuestLog(logs, OF).kept_on("h1") == f"; its logs are in {tmp_path}/logs/ada/7.1731000000.0 on h1"
    assert GuestLog(logs, msgspec.structs.replace(OF, user="../ada")).kept_on("h1") == ""


_WRITER = """
import itertools, sys
from carrel.config import GuestLogs as Settings
from carrel.daemons.guestlogs import GuestLogs, LogOf
logs = GuestLogs(Settings(dir=sys.argv[1]))
of = LogOf(user="ada", uid=-1, run="7", guest="vm1")
for number in itertools.count():
    logs.say(of, f"line {number} " + "x" * 500)
    logs.keep(of, "slurmd", b"whole " * 1000)
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_lines_and_whole_files(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout
    for _ in range(20):
        writer.stdout.readline()
    writer.kill()
    writer.wait()
    writer.stdout.close()
    of = LogOf(user="ada", uid=-1, run="7", guest="vm1")
    logs = GuestLogs(Settings(dir=str(tmp_path)))
    lines = logs.path(of, "spawn.log").read_text().splitlines()
    assert len(lines) >= 20
    assert all(line.endswith("x" * 500) and f" line {number} " in line for number, line in enumerate(lines))
    assert logs.path(of, "slurmd.log").read_bytes() == b"whole " * 1000
