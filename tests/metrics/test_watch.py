"""Watching a job: rows as they come, on a terminal and as lines, until all that began has ended."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import atend, main
from carrel.cli.watch import moment
from carrel.config import Guests
from carrel.model.sample import Column, Note, Schema
from carrel.sampling.blocks import Layout, Reading
from carrel.sampling.follow import Follower
from carrel.sampling.segment import SegmentWriter
from carrel.testing import samples
from carrel.testing.terminal import Terminal

OWNER: dict[str, Any] = {"uid": os.geteuid(), "gid": os.getegid()}
GPUS = {
    Column("gpu.0.busy_percent", "percent"): lambda _: 100.0,
    Column("gpu.1.busy_percent", "percent"): lambda _: 20.0,
    Column("gpu.0.memory_used_bytes", "bytes"): lambda _: 3.0 * samples.GIB,
    Column("gpu.1.memory_used_bytes", "bytes"): lambda _: 1.0 * samples.GIB,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "carrel.toml").write_text(f'[metrics]\nroot = "{tmp_path}/m"\n[slurm]\nbin_dir = "{tmp_path}"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "carrel.toml"))
    return tmp_path / "m"


def running(root: Path, *nodes: str, **known: Any) -> Path:
    where = root
    for node in nodes:
        where = samples.record(root, samples.job(name="solve", **known), samples.steady() | GPUS, node=node, **OWNER)
    return where


def end(where: Path, node: str) -> None:
    """Say the last word, as the sampler does."""
    path = where / f"samples.{node}.seg"
    writer = SegmentWriter(os.open(path, os.O_RDWR | os.O_APPEND), name=str(path))
    writer.note(Note(time_us=samples.BEGAN_US, what="end", text=""))
    writer.close()


def test_what_a_job_does_now_is_told_in_figures(root: Path) -> None:
    follower = Follower(running(root, "c1"))
    (tail,) = follower.poll()
    found = moment(tail)
    assert found is not None
    assert (found.node, found.cpus_busy, found.memory_bytes) == ("c1", 3.0, samples.GIB // 2)
    assert (found.read_bytes_per_s, found.written_bytes_per_s) == (0, 2**20)
    assert (found.gpu_percent, found.gpu_memory_bytes) == (60, 4 * samples.GIB)
    assert follower.poll() == []
    follower.close()


def test_rows_that_come_later_are_read_on_from_there(root: Path) -> None:
    where = running(root, "c1")
    follower = Follower(where)
    follower.poll()
    path = where / "samples.c1.seg"
    writer = SegmentWriter(os.open(path, os.O_RDWR | os.O_APPEND), name=str(path))
    layout = Layout(Schema(set="job", columns=(Column("cpu_ns", "ns", "counter"),), source=""))
    writer.row(samples.BEGAN_US + 62_000_000, (None, Reading([layout.block((182 * 10**9,))])))
    (tail,) = follower.poll()
    found = moment(tail)
    assert found is not None
    assert found.cpus_busy == pytest.approx(1.0)  # 2 s of CPU time in 2 s
    samples.record(root, samples.job(), samples.steady(), node="c2", **OWNER)
    assert [tail.node for tail in follower.poll()] == ["c2"]
    assert not follower.over
    writer.close()
    follower.close()


def test_it_is_over_when_every_node_has_said_so_or_become_a_table(root: Path) -> None:
    where = running(root, "c1", "c2")
    follower = Follower(where)
    follower.poll()
    end(where, "c1")
    follower.poll()
    assert not follower.over
    (where / "samples.c2.seg").unlink()
    assert follower.over
    follower.close()


def test_lines_are_for_programs_and_for_pipes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = running(root, "c1", "c2")
    for node in ("c1", "c2"):
        end(where, node)
    assert main.run(["job", "watch", "7", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["node"], one["cpus_busy"]) for one in found] == [("c1", 3.0), ("c2", 3.0)]
    assert main.run(["job", "watch", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("c1  CPUs 3  memory 512M  read 0B/s  written 1M/s  GPU 60%")


def test_a_look_too_often_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(root, "c1")
    assert main.run(["job", "watch", "7", "--every", "0"]) == 2
    assert capsys.readouterr().err == "carrel: --every=0: must be 0.1 seconds or more\n"


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_it_is_a_table_that_ends_with_the_job(root: Path, columns: int) -> None:
    where = running(root, "c10", "c2")
    words = [sys.executable, "-m", "carrel.cli.main", "job", "watch", "7", "--every", "0.1"]
    with Terminal(words, rows=24, columns=columns, env={"TERM": "xterm-256color"}) as screen:
        screen.wait_for(r"1:00 min of 1:00 h")
        for node in ("c2", "c10"):
            screen.wait_for(node, timeout_s=30)
            assert "…" not in screen.wait_for(r"3 of 4.*512M of 1G.*1M/s.*60%.*4G.*silent", timeout_s=30)
        for node in ("c2", "c10"):
            end(where, node)
        screen.wait_for(r"job 7 has ended; see: carrel job report 7", timeout_s=30)
        assert screen.status() == 0


def test_a_report_is_appended_to_a_plain_file_alone(root: Path, tmp_path: Path) -> None:
    words = atend.text(running(root, "c1"), Guests())
    assert "---- what this job used (--carrel-report) ----\njob 7 solve: " in words
    file = tmp_path / "out"
    file.write_text("mine\n")
    atend.append(file, words)
    assert file.read_text() == "mine\n" + words
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads it: it is not waited for
        atend.append(tmp_path / "pipe", words)
    atend.append(Path("/dev/null"), words)
    with pytest.raises(FileNotFoundError):
        atend.append(tmp_path / "gone", words)
    assert not (tmp_path / "gone").exists()
