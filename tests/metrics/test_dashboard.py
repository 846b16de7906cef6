"""The Grafana dashboard asks Prometheus for nothing that the sink does not offer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.model.sample import Column
from carrel.sampling import cgroup, gpu, processes

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "etc" / "grafana" / "carrel-jobs.json").read_text()
)
WORDS = re.compile(r"\b(carrel_[a-z0-9_]+)|__name__=~\"([^\"]+)\"")
LABEL = re.compile(r"(\w+)\s*=~?\s*\"")


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def columns() -> Iterator[Column]:
    v1 = dict.fromkeys(("memory", "cpuacct", "cpu", "blkio", "pids"), "/x")
    for _, found, _ in cgroup._wanted(cgroup.JobGroups(v1=v1, unified="/x")):
        yield from (Column(f"job.{one.name}", one.unit, one.kind) for one in found)
    yield Column("job.memory_used_bytes", "bytes")
    yield from (Column(f"processes.{one.name}", one.unit, one.kind) for one in processes._SUM)
    yield from (Column(f"gpu.0.{one.name}", one.unit, one.kind) for one in gpu.COLUMNS)


@pytest.fixture(scope="module")
def offered() -> set[str]:
    """All that the sink names, of jobs by its own rule, of itself from a real answer."""
    prometheus = pytest.importorskip("carrel.sinks.prometheus", reason="the sink is not installed: carrel[prometheus]")
    jobs = {prometheus.exposed(one.name, one) + ("_total" if one.kind == "counter" else "") for one in columns()}

    class Status:
        sinks = ()

    own = {
        family.name + ("_total" if family.type == "counter" else "") for family in prometheus.Offer(Status).collect()
    }
    return jobs | own | {"carrel_sample_timestamp_seconds"}


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_metric_that_is_asked_for_is_offered(expression: str, offered: set[str]) -> None:
    asked = WORDS.findall(expression)
    assert asked
    for name, pattern in asked:
        if name:
            assert name in offered or pattern
        else:
            assert [one for one in offered if re.fullmatch(pattern, one)]


def test_a_series_is_chosen_by_labels_that_it_has() -> None:
    prometheus = pytest.importorskip("carrel.sinks.prometheus", reason="the sink is not installed: carrel[prometheus]")
    asked = {label for expression in expressions() for label in LABEL.findall(expression)}
    assert asked - {"__name__"} <= set(prometheus.LABELS)


def test_counters_are_asked_for_as_rates_and_panels_do_not_overlap() -> None:
    for expression in expressions():
        for counter in re.findall(r"carrel_\w+_total", expression):
            assert f"rate({counter}" in expression
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
