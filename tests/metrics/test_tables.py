"""From the segment to tables: nothing is lost, nothing is told twice, and any node may be the last."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import carrel
from carrel.cli import main
from carrel.config import Metrics
from carrel.errors import CarrelError, NotFoundError
from carrel.model.job import Job, JobKey
from carrel.model.sample import Column, JobFile, JobSummary, Note, Schema
from carrel.sampling import compact, reading
from carrel.sampling.blocks import Layout, Reading
from carrel.sampling.folder import JobFolder, stem
from carrel.sampling.prune import prune
from carrel.sampling.segment import SegmentWriter
from carrel.testing.sandbox import let_enter

RUN = JobKey(cluster="k", job_id=7, submit_s=100)
JOB = Job(key=RUN, state="running", user="ann", uid=os.geteuid(), gid=os.getegid(), cpus=2, name='=1+1"\n')
COLUMNS = (Column("cpu_ns", "ns", "counter"), Column("steady", "bytes"), Column("huge", "count"))
TIMES_US = [1_795_000_000_000_001 + n * 1_000_000 for n in range(5)]


def folder(root: Path, run: JobKey = RUN) -> JobFolder:
    return JobFolder.make(root, run, user="ann", uid=os.geteuid(), gid=os.getegid())


def sampled(root: Path, node: str = "c1", *, ended: bool = True, run: JobKey = RUN, rows: int = 5) -> JobFolder:
    """Write a segment as the sampler does, with a restart of the sampler in the middle."""
    where = folder(root, run)
    for part in ((0, 3), (3, rows)):
        writer = SegmentWriter(where.create(f"{stem(node, 'host')}.seg"), name="s")
        job = msgspec.structs.replace(JOB, key=run)
        writer.note(Note(time_us=TIMES_US[part[0]], what="start", text="", job=job))
        layout = Layout(Schema(set="job", columns=COLUMNS, source="somewhere"))
        load = Layout(Schema(set="loadavg", columns=(Column("load1", ""),), source="/proc/loadavg", floating=True))
        one = Layout(Schema(set="process", columns=(Column("pid", "count"),), source="", instance="5", label='a,"b'))
        for at in range(*part):
            own = Reading([layout.block((at * 10**9, 4096, 2**63 + at)), one.block((5,))])
            shared = Reading([load.block((at / 4,))] if at % 2 == 0 else [])
            writer.row(TIMES_US[at], (shared, own))
        if ended and part[1] == rows:
            writer.note(Note(time_us=TIMES_US[rows - 1], what="end", text="", cost_us={"job": 20.0}))
        writer.close()
    return where


def compacted(where: JobFolder, formats: Sequence[str], node: str = "c1") -> None:
    with contextlib.chdir(where.path):
        compact.compact(stem(node, "host"), formats)


def spawned(where: JobFolder, stem: str, formats: Sequence[str]) -> tuple[int, str]:
    child = compact.spawn(where, stem, formats)
    _, error = child.communicate(timeout=60)
    return child.returncode, error.decode()


@pytest.mark.parametrize("formats", [["csv"], ["parquet"]])
def test_a_frame_has_every_number_in_whatever_it_is_kept(tmp_path: Path, formats: list[str]) -> None:
    where = sampled(tmp_path)
    before = carrel.load(7, root=tmp_path)
    compacted(where, formats)
    after = carrel.load(7, root=tmp_path)
    assert (
        list(after.columns)
        == list(before.columns)
        == ["time", "node", "view", "job.cpu_ns", "job.huge", "loadavg.load1"]
    )
    assert after["job.huge"].tolist() == [2**63 + n for n in range(5)]
    assert after["loadavg.load1"].isna().tolist() == [False, True, False, True, False]
    assert [moment.value // 1000 for moment in after["time"]] == TIMES_US
    assert after.attrs["units"]["job.cpu_ns"] == "ns"
    for name in after.columns:
        assert after[name].fillna(0).tolist() == before[name].fillna(0).tolist()
    where.close()


def test_what_never_changed_is_told_once(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    compacted(where, ["csv"])
    about = msgspec.json.decode((where.path / "job.json").read_bytes(), type=JobFile)
    (series,) = about.series
    assert series.constants == {"job.steady": 4096}
    assert series.units["job.steady"] == "bytes"
    assert (series.rows, series.complete, series.cost_us) == (5, True, {"job": 20.0})
    assert "job.steady" in carrel.load(7, root=tmp_path, constants=True).columns
    where.close()


def test_the_segment_goes_when_all_else_is_there_and_the_files_are_the_users(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    assert spawned(where, "samples.c1", ["csv", "parquet"]) == (0, "")
    end = ".csv.zst" if shutil.which("zstd") else ".csv"
    tables = {f"{table}.c1{kind}" for table in ("samples", "processes") for kind in (end, ".parquet")}
    assert {path.name for path in where.path.iterdir()} == {".run", "job.json", "summary.json", *tables}
    for path in where.path.iterdir():
        assert path.stat().st_mode & 0o007 == 0
    where.close()


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    compacted(where, ["csv"])
    before = {path.name: path.read_bytes() for path in where.path.iterdir()}
    compacted(where, ["csv"])
    assert {path.name: path.read_bytes() for path in where.path.iterdir()} == before
    where.close()


def test_killed_before_the_segment_went_the_next_call_does_it_all(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    (where.path / ".samples.c1.csv.draft").write_text("half")
    (where.path / "samples.c1.csv.zst").write_bytes(b"of an earlier call")
    compacted(where, ["csv"])
    assert not [path for path in where.path.iterdir() if path.name.endswith(".draft")]
    assert len(carrel.load(7, root=tmp_path)) == 5
    where.close()


def test_each_node_adds_its_part_and_the_last_one_completes_the_job(tmp_path: Path) -> None:
    folders = [sampled(tmp_path, node) for node in ("c1", "c2", "c3")]
    for done, (where, node) in enumerate(zip(folders, ("c2", "c1", "c3"), strict=True)):
        compacted(where, ["csv"], node)
        found = msgspec.json.decode((where.path / "summary.json").read_bytes(), type=JobSummary)
        assert found.complete == (done == 2)
        whole = reading.summary(where.path)
        assert [one.node for one in whole.nodes] == ["c1", "c2", "c3"]
        assert whole.complete == (done == 2)
    assert carrel.load(7, root=tmp_path)["node"].tolist() == ["c1", "c2", "c3"] * 5
    for where in folders:
        where.close()


def test_nodes_that_end_at_once_do_not_lose_each_others_part(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(4)]
    folders = [sampled(tmp_path, node) for node in names]
    children = [compact.spawn(where, stem(node, "host"), ["csv"]) for where, node in zip(folders, names, strict=True)]
    for child in children:
        child.communicate(timeout=60)
    found = reading.summary(folders[0].path)
    assert [one.node for one in found.nodes] == names
    assert found.complete
    for where in folders:
        where.close()


def test_without_arrow_parquet_becomes_csv_and_job_json_says_so(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    script = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pyarrow' else real(name, *a)\n"
        "from carrel.sampling import compact; compact.compact('samples.c1', ['parquet'])"
    )
    subprocess.run([sys.executable, "-c", script], cwd=where.path, check=True)
    about = msgspec.json.decode((where.path / "job.json").read_bytes(), type=JobFile)
    assert about.series[0].files[0].startswith("samples.c1.csv")
    assert "pyarrow is not installed" in about.series[0].notes[-1].text
    where.close()


def test_a_job_that_runs_is_read_up_to_its_last_whole_sample(tmp_path: Path) -> None:
    where = sampled(tmp_path, ended=False)
    path = where.path / "samples.c1.seg"
    path.write_bytes(path.read_bytes()[:-3])
    assert len(carrel.load(7, root=tmp_path)) == 4
    found = reading.summary(where.path)
    assert (found.nodes[0].samples, found.complete) == (4, False)
    where.close()


def test_the_latest_run_of_a_job_is_the_one_that_is_meant(tmp_path: Path) -> None:
    again = msgspec.structs.replace(RUN, restart=1)
    for run in (RUN, again):
        sampled(tmp_path, run=run).close()
    assert reading.find(tmp_path, 7).name == "7.100.1"
    assert reading.find(tmp_path, 7, user="ann").name == "7.100.1"
    with pytest.raises(NotFoundError, match="no samples of job 7 below"):
        reading.find(tmp_path, 7, user="bob")


def test_the_name_of_a_job_or_program_cannot_break_a_table(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    compacted(where, ["csv", "parquet"])
    import pandas as pd  # noqa: PLC0415

    for path in where.path.glob("processes.c1.csv*"):
        text = subprocess.run(["zstd", "-dcqf", path], capture_output=True, check=True, text=True).stdout
        assert text.splitlines()[1].split(",", 1)[1] == '"a,""b",5'
    assert pd.read_parquet(where.path / "processes.c1.parquet")["program"].unique().tolist() == ['a,"b']
    where.close()


def test_damage_is_told_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    where = sampled(tmp_path)
    compacted(where, ["csv"])
    (where.path / "summary.json").write_text("{")
    with pytest.raises(CarrelError, match=r"summary\.json: .*it can be removed"):
        reading.summary(where.path)
    where.close()


@pytest.mark.root
def test_the_tables_are_written_as_the_user_who_may_hold_the_directory_closed(tmp_path: Path) -> None:
    let_enter(tmp_path)
    where = JobFolder.make(tmp_path / "m", RUN, user="ann", uid=4242, gid=4243)
    writer = SegmentWriter(where.create("samples.c1.seg"), name="s")
    writer.note(Note(time_us=1, what="start", text="", job=JOB))
    layout = Layout(Schema(set="job", columns=COLUMNS, source=""))
    writer.row(TIMES_US[0], (None, Reading([layout.block((1, 2, 3))])))
    writer.close()
    victim = tmp_path / "victim"
    victim.write_text("root's")
    (where.path / "job.json").symlink_to(victim)
    (where.path / ".summary.json.draft").symlink_to(victim)
    status, error = spawned(where, "samples.c1", ["csv"])
    assert victim.read_text() == "root's"
    assert status != 0
    assert "Permission denied" in error
    (where.path / ".summary.json.draft").unlink()
    assert spawned(where, "samples.c1", ["csv"]) == (0, "")
    assert {path.stat().st_uid for path in where.path.iterdir()} == {4242}
    assert victim.read_text() == "root's"
    where.close()


def test_old_jobs_go_and_those_that_run_stay(tmp_path: Path) -> None:
    done = sampled(tmp_path)
    compacted(done, ["csv"])
    runs = sampled(tmp_path, run=JobKey(cluster="k", job_id=8, submit_s=1), ended=False)
    later_s = done.path.stat().st_mtime + 91 * 86400
    settings = Metrics(root=str(tmp_path))
    assert prune(settings, now_s=later_s - 2 * 86400) == ()
    assert prune(settings, now_s=later_s) == (done.path,)
    assert prune(settings, now_s=later_s) == ()
    assert runs.path.exists()
    done.close()
    runs.close()


def test_the_command_prints_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "carrel.toml"
    conf.write_text(f'[metrics]\nroot = "{tmp_path}/m"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(conf))
    assert main.run(["job", "report", "7"]) == 3
    where = sampled(tmp_path / "m")
    assert main.run(["job", "report", "7"]) == 0
    assert "so far" in capsys.readouterr().out
    compacted(where, ["csv"])
    assert main.run(["job", "report", "7", "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out)
    assert (found["cpu_s"], found["complete"], found["elapsed_s"]) == (4.0, True, 4.0)
    where.close()
