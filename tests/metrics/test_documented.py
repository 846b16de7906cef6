"""docs/reference/metrics.md names every metric and every setting."""

import re
from pathlib import Path

import msgspec
import pytest

from carrel.config import Metrics
from carrel.model.sample import Column
from carrel.sampling import cgroup, gpu, node, processes

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md").read_text()
WORDS = set(re.findall(r"[A-Za-z0-9_.]+", PAGE))


def job_columns() -> set[Column]:
    v1 = dict.fromkeys(("memory", "cpuacct", "cpu", "blkio", "pids"), "/x")
    wanted = cgroup._wanted(cgroup.JobGroups(v1=v1, unified="/x"))
    return {column for _, columns, _ in wanted for column in columns}


def name_of(column: Column) -> str:
    return column.name


@pytest.mark.parametrize("column", sorted(job_columns(), key=repr), ids=name_of)
def test_a_metric_of_the_job_has_its_row_with_its_unit(column: Column) -> None:
    (row,) = [line for line in PAGE.splitlines() if re.match(rf"\| .*`job\.{column.name}`", line)]
    assert f"| {column.unit} | {column.kind} |" in row


def test_every_metric_of_processes_is_named() -> None:
    assert {f"processes.{column.name}" for column in processes._SUM} <= WORDS
    assert {column.name for column in processes._PROCESS} <= WORDS


def test_every_metric_of_gpus_is_named_with_its_unit() -> None:
    for column in gpu.COLUMNS:
        (row,) = [line for line in PAGE.splitlines() if f"`gpu.<n>.{column.name}`" in line]
        assert f"| {column.unit} | {column.kind} |" in row


def test_every_set_of_the_node_is_named() -> None:
    found = node.sources()
    assert {source.name for source in found} <= WORDS
    for source in found:
        source.close()


def test_every_setting_is_named() -> None:
    assert {field.name for field in msgspec.structs.fields(Metrics)} <= WORDS
