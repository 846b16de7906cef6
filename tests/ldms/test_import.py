"""LDMS's CSV: read by its header, and made into the files of a job."""

import os
from pathlib import Path

import pytest

from carrel.config import Metrics
from carrel.daemons import ldms_import
from carrel.errors import CarrelError, NotFoundError
from carrel.ldms.csvfile import read, set_of
from carrel.model.job import Job, JobKey
from carrel.sampling import reading

HEADER = "#Time,Time_usec,ProducerName,component_id,job_id,app_id,"
LOAD = f"""{HEADER}load1min,runnable
1795247729.500471,500471,ann-101-c1,101,0,0,3.9399999999999999,10
1795247730.001330,1330,ann-101-c1,101,0,0,4,4
"""
MEMORY = f"""{HEADER}MemFree,Active(anon)
1795247729.500300,500300,ann-101-c1,101,0,0,18446744073709551615,7
1795247730.001000,1000,ann-101-c1,101,0,0,12,7
"""
CPUS = """#Time,Time_usec,component_id,job_id,app_id,cpu_list.name,cpu_list.user,ctxt
1795247729.500642,500642,101,0,0,cpu,30,99
1795247729.500642,500642,101,0,0,cpu0,10,99
1795247729.500642,500642,101,0,0,cpu1,20,99
"""


def job(number: int = 101) -> Job:
    key = JobKey(cluster="alpha", job_id=number, submit_s=1)
    return Job(key=key, state="ended", user="ann", uid=os.geteuid(), gid=os.getegid())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    where = tmp_path / "store" / "ann" / "101" / "c1"
    where.mkdir(parents=True)
    for name, text in (("loadavg", LOAD), ("meminfo", MEMORY), ("procstat2_78935b2", CPUS)):
        (where / name).write_text(text)
    return tmp_path / "store"


def test_a_row_has_the_time_the_producer_and_the_values_of_its_header(store: Path) -> None:
    first, _ = read(store / "ann/101/c1/meminfo")
    assert (first.time_us, first.set, first.producer, first.component) == (
        1795247729500300,
        "meminfo",
        "ann-101-c1",
        101,
    )
    assert first.values == {"MemFree": 2**64 - 1, "Active(anon)": 7}


def test_records_of_a_list_are_told_apart_by_their_names(store: Path) -> None:
    rows = list(read(store / "ann/101/c1/procstat2_78935b2"))
    assert [row.values for row in rows] == [
        {"cpu.user": 30, "ctxt": 99},
        {"cpu0.user": 10, "ctxt": 99},
        {"cpu1.user": 20, "ctxt": 99},
    ]


def test_a_set_is_named_without_its_digest() -> None:
    assert [set_of(Path(name)) for name in ("dstat", "dstat_d61917b", "mt-slurm", "my_samples")] == [
        "dstat",
        "dstat",
        "mt-slurm",
        "my_samples",
    ]


def test_a_header_in_the_middle_after_a_restart_of_the_aggregator_holds_from_there(tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    path.write_text(LOAD + f"{HEADER}load5min\n1795247731.0,0,ann-101-c1,101,0,0,2.5\n")
    assert [row.values for row in read(path)][-1] == {"load5min": 2.5}


def test_a_last_row_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    path.write_text(LOAD[:-3])
    assert len(list(read(path))) == 1


def test_what_is_no_file_of_ldms_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CarrelError, match="does not begin with #Time; was it written by LDMS's store_csv"):
        list(read(path))


def test_a_job_becomes_files_that_are_read_as_any_other(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    root = tmp_path / "metrics"
    files = ldms_import.nodes_of(store, job())["c1"]
    _, samples = ldms_import.load(job(), files, root, node="c1", formats=Metrics().formats)
    assert samples == 2
    frame = reading.frame(reading.find(root, 101), constants=True)
    assert list(frame["meminfo.MemFree"]) == [2**64 - 1, 12]
    assert list(frame["loadavg.load1min"]) == [3.94, 4.0]
    assert frame["procstat2.cpu1.user"][0] == 20
    assert frame["meminfo.Active(anon)"][1] == 7


def test_rows_of_other_jobs_in_the_same_file_are_left_out(store: Path, tmp_path: Path) -> None:
    path = store / "loadavg"
    path.write_text(LOAD + LOAD.replace("ann-101", "bob-102").replace(",101,", ",102,").partition("\n")[2])
    _, samples = ldms_import.load(job(), [path], tmp_path / "metrics", node="c1", formats=["csv"])
    assert samples == 2
    with pytest.raises(NotFoundError, match="no rows of job 9 of ann on c1 in 1 files"):
        ldms_import.load(job(9), [path], tmp_path / "metrics", node="c1", formats=["csv"])


def test_files_of_the_proof_of_concept_tell_the_job_by_its_component(tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    path.write_text(LOAD.replace("ann-101-c1", "ann-c1"))
    _, samples = ldms_import.load(job(), [path], tmp_path / "metrics", node="c1", formats=["csv"])
    assert samples == 2


def test_an_import_replaces_nothing(store: Path, tmp_path: Path) -> None:
    files = ldms_import.nodes_of(store, job())["c1"]
    ldms_import.load(job(), files, tmp_path / "metrics", node="c1", formats=["csv"])
    with pytest.raises(CarrelError, match=r"there are samples of c1 already; remove samples.c1.\* to import others"):
        ldms_import.load(job(), files, tmp_path / "metrics", node="c1", formats=["csv"])
