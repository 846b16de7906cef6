"""What people are told of sinks: by ``carrel node show`` and ``carrel node check``."""

from carrel.cli import doctor
from carrel.cli import node as command
from carrel.model.shipping import SinkStatus

WELL = SinkStatus(name="csv", rows_written=86400)
DOWN = SinkStatus(
    name="kafka",
    error="kafka at k1:9092: timed out\x1b[2J",
    rows_written=10,
    rows_dropped={"bytes": 120, "refused": 2},
    series_lost=1,
    waiting_bytes=3 * 2**20,
)


def test_a_sink_that_is_well_is_one_line() -> None:
    assert list(command._sinks([WELL])) == [("sink csv", "86400 rows taken")]
    (check,) = doctor._sink("c1", WELL)
    assert (check.ok, check.what) == (True, "node c1: sink csv has taken 86400 rows")


def test_what_waits_and_what_was_dropped_is_shown_with_the_reason() -> None:
    shown = dict(command._sinks([DOWN]))
    assert shown["sink kafka"] == "10 rows taken, 3M wait"
    assert shown["dropped"] == "120 (bytes), 2 (refused) rows; 1 series were removed by their owners"


def test_a_sink_that_takes_nothing_is_a_problem_and_so_is_every_dropped_row() -> None:
    failing, dropping = doctor._sink("c1", DOWN)
    assert not failing.ok
    assert failing.what.startswith("node c1: sink kafka takes nothing: kafka at k1:9092: timed out")
    assert "\x1b" not in failing.what
    assert dropping.what == (
        "node c1: 122 rows were dropped and never reach sink kafka (bytes 120, refused 2); "
        "1 jobs' samples were removed by their owners"
    )
