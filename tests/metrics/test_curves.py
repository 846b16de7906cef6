"""From recorded numbers to curves: rates, units, gaps, and few points that do not lie."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import chart
from carrel.core import curves
from carrel.core.curves import Chart, Curve, Measure, Recording, Series
from carrel.errors import CarrelError, NotFoundError
from carrel.model.sample import Column
from carrel.sampling import recorded
from carrel.testing import samples

OWNER: dict[str, Any] = {"uid": os.geteuid(), "gid": os.getegid()}
CPU = Column("job.cpu_ns", "ns", "counter")
MEMORY = Column("job.memory_used_bytes", "bytes")


def recording(
    column: Column,
    values: Sequence[float],
    *,
    node: str = "c1",
    times_s: Sequence[float] | None = None,
    gaps: tuple[tuple[int, int], ...] = (),
    cpus: int = 4,
) -> Recording:
    times = array("q", [round(at * 1e6) for at in (times_s or range(len(values)))])
    series = {column.name: Series(column=column, times_us=times, values=array("d", values))}
    return Recording(
        node=node,
        view="host",
        first_us=times[0],
        last_us=times[-1],
        series=series,
        names={column.name: column},
        gaps=gaps,
        cpus=cpus,
    )


def curve(column: Column, values: Sequence[float], *, points: int = 1000, **more: Any) -> Curve:
    made = curves.charts([recording(column, values, **more)], [Measure("x", "x", (column.name,))], points=points)
    return made[0].curves[0]


def test_a_counter_is_shown_as_its_rate_and_a_gauge_as_it_is() -> None:
    assert curve(CPU, [0, 2e9, 4e9]).values == (2.0, 2.0, 2.0)
    assert curve(MEMORY, [1, 5, 3]).values == (1, 5, 3)


def test_a_counter_that_began_anew_shows_no_negative_rate() -> None:
    assert curve(CPU, [0, 2e9, 4e9, 1e9, 3e9]).values == (2.0, 2.0, 2.0, 2.0)


def test_of_many_points_a_gauge_keeps_its_peak_and_a_counter_its_total() -> None:
    spiky = [1.0] * 5000
    spiky[1234] = 99.0
    kept = curve(MEMORY, spiky, points=100)
    assert len(kept.times_s) <= 101
    assert kept.peak == 99
    busy = curve(CPU, [at * 1e9 for at in range(5000)], points=100)
    assert len(busy.values) <= 102
    assert set(busy.values) == {1.0}


@pytest.mark.parametrize(("unit", "factor"), [("bytes", 1), ("KiB", 1024), ("pages", 4096), ("mW", 1e-3), ("count", 1)])
def test_a_gauge_keeps_its_peak_in_whatever_unit_it_was_recorded(unit: str, factor: float) -> None:
    for values in ([7000.0, 9000.0, 8000.0], [9000.0, 7000.0, 8000.0], [7000.0, 8000.0, 9000.0]):
        assert curve(Column("some.gauge", unit), values, points=1).peak == pytest.approx(9000 * factor)


def test_a_forced_sample_right_after_another_does_not_look_like_a_burst() -> None:
    found = curve(CPU, [0, 1e9, 1.01e9, 2e9, 3e9], times_s=[0, 1, 1.001, 2, 3])
    assert found.peak == pytest.approx(1.0, rel=0.02)


def test_where_samples_are_missing_the_curve_is_broken() -> None:
    found = curve(MEMORY, [1, 1, 9, 9], times_s=[0, 1, 61, 62], gaps=((1_000_000, 61_000_000),))
    assert found.values == (1, 1, None, 9, 9)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (Column("meminfo.MemFree", "KiB"), ("B", 1024.0)),
        (Column("vmstat.nr_dirty", "pages"), ("B", 4096.0)),
        (Column("cpu.user", "ticks", "counter"), ("CPUs", 0.01)),
        (Column("job.cpu_some_us", "us", "counter"), ("%", 1e-4)),
        (Column("disk.sda.busy_ms", "ms", "counter"), ("%", 0.1)),
        (Column("disk.sda.read_sectors", "sectors", "counter"), ("B/s", 512.0)),
        (Column("job.throttled_ns", "ns", "counter"), ("%", 1e-7)),
        (Column("gpu.0.energy_mj", "mJ", "counter"), ("W", 1e-3)),
        (Column("gpu.0.power_mw", "mW"), ("W", 1e-3)),
        (Column("vmstat.pgfault", "count", "counter"), ("/s", 1.0)),
        (Column("loadavg.load1", ""), ("", 1.0)),
    ],
)
def test_units_are_those_that_people_read(column: Column, shown: tuple[str, float]) -> None:
    assert curves.shown_unit(column, recording(column, [0])) == shown


def test_a_limit_is_shown_where_all_nodes_have_the_same() -> None:
    same = [recording(CPU, [0, 1e9], node=node) for node in ("c1", "c2")]
    assert curves.charts(same, [curves.MEASURES["cpu"]], points=9)[0].ceiling == 4
    other = [*same, recording(CPU, [0, 1e9], node="c3", cpus=8)]
    assert curves.charts(other, [curves.MEASURES["cpu"]], points=9)[0].ceiling is None


def test_more_nodes_than_can_be_told_apart_become_the_most_the_median_and_the_least() -> None:
    many = [recording(MEMORY, [at * 1.0] * 10, node=f"c{at}") for at in range(1, 12)]
    (whole,) = curves.charts(many, [curves.MEASURES["memory"]], points=50)
    assert [one.label for one in whole.curves[:3]] == ["c1", "c2", "c3"]
    few = curves.gathered(whole, curves=6, points=50)
    assert [(one.label, set(one.values)) for one in few.curves] == [
        ("most of 11", {11.0}),
        ("median", {6.0}),
        ("least", {1.0}),
    ]
    assert all(whole.from_s <= at_s <= whole.to_s for one in few.curves for at_s in one.times_s)
    assert curves.gathered(whole, curves=11, points=50) is whole


def test_metrics_are_asked_for_by_word_name_or_pattern() -> None:
    names = ["job.cpu_ns", "processes.cpu_ns", "net.eth0.rx_bytes", "net.eth1.rx_bytes"]
    assert [one.name for one in curves.chosen([], names, job="7")] == ["cpu"]
    assert curves.wanted(curves.chosen(["cpu"], names, job="7"), names) == {"job.cpu_ns"}
    found = curves.chosen(["net.*.rx_bytes", "cpu"], names, job="7")
    assert [one.name for one in found] == ["net.eth0.rx_bytes", "net.eth1.rx_bytes", "cpu"]
    with pytest.raises(NotFoundError, match=r"no metric 'job.cpu_n'; did you mean job.cpu_ns\? see: .* plot 7 --list"):
        curves.chosen(["job.cpu_n"], names, job="7")
    with pytest.raises(NotFoundError, match="25 metrics are too many"):
        curves.chosen(["*"], [f"a.{at}" for at in range(25)], job="7")


@pytest.mark.parametrize("formats", [(), ("csv",), ("parquet",)], ids=["running", "csv", "parquet"])
def test_what_is_drawn_is_the_same_before_and_after_the_end(tmp_path: Path, formats: tuple[str, ...]) -> None:
    metrics = samples.steady(cpus=3) | {Column("job.steady_bytes", "bytes"): lambda _: 5}
    path = samples.record(tmp_path, samples.job(), metrics, formats=formats, **OWNER)
    wanted = {"job.cpu_ns", "job.memory_used_bytes", "job.steady_bytes", "processes.read_bytes"}
    found = recorded.read(path, lambda names: wanted & names)
    assert found.complete == bool(formats)
    (one,) = found.recordings
    assert one.series.keys() == wanted
    assert (one.cpus, one.memory_limit_bytes) == (4, samples.GIB)
    assert list(one.series["job.cpu_ns"].values)[:3] == [0, 3e9, 6e9]
    assert len(one.series["job.memory_used_bytes"].times_us) == 61
    # What never changed is in no table, and still a level line; a counter that rested is a counter.
    assert list(one.series["job.steady_bytes"].values) == [5, 5]
    assert one.series["processes.read_bytes"].column.kind == "counter"


def test_a_table_that_was_edited_is_named(tmp_path: Path) -> None:
    path = samples.record(tmp_path, samples.job(), samples.steady(), formats=("csv",), **OWNER)
    (table,) = path.glob("samples.*")
    table.unlink()
    with pytest.raises(CarrelError, match="samples of node c1 are missing"):
        recorded.read(path, lambda names: names)
    table.write_bytes(b"not zstd")
    with pytest.raises(CarrelError):
        recorded.read(path, lambda names: names)


CHART = Chart(
    name="cpu",
    title="CPUs busy",
    unit="CPUs",
    from_s=0,
    to_s=60,
    ceiling=4,
    curves=(
        Curve(label="c1", times_s=(0, 30, 60), values=(0, 4, 4)),
        Curve(label="c2", times_s=(0, 60), values=(1, 1)),
    ),
)


def lines(**more: Any) -> list[str]:
    settings = {"width": 40, "height": 5, "colour": True, **more}
    return [line.plain.rstrip() for line in chart.drawn(CHART, **settings)]


def test_a_chart_has_its_title_its_limit_and_its_axes() -> None:
    assert lines() == [
        "CPUs busy of 4   ━━ c1: peak 4, last 4",
        "          ━━ c2: peak 1, last 1",
        "      4 ┤╌╌╌╌╌╌╌╌╌╌╌╌⢀⡠⠒⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉",
        "        │         ⢀⠤⠊⠁",
        "      2 ┤      ⣀⠔⠊⠁",
        "        │⠤⠤⠤⣤⠴⠮⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤",
        "      0 ┤⡠⠔⠉",
        "        └┬──────────────┬──────────────┬",
        "         0           30.0 s     1:00 min",
    ]


def test_without_colour_each_curve_has_a_chart_of_its_own_and_without_unicode_stars() -> None:
    plain = lines(colour=False, unicode=False)
    assert [line for line in plain if line.startswith("CPUs")] == [
        "CPUs busy of 4   c1: peak 4, last 4",
        "CPUs busy of 4   c2: peak 1, last 1",
    ]
    assert all(line.isascii() for line in plain)
    assert any("*****" in line for line in plain)


def test_a_curve_of_nothing_is_one_line() -> None:
    flat = Chart(
        name="r", title="read", unit="B/s", from_s=0, to_s=9, curves=(Curve(label="c1", times_s=(0, 9), values=(0, 0)),)
    )
    assert [line.plain for line in chart.drawn(flat, width=40, height=5, colour=True)] == ["read   c1: none"]
