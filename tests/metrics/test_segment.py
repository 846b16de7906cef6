"""Segments: whole up to the last frame, whatever happens to the writer."""

import contextlib
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.errors import CarrelError
from carrel.model.sample import Column, Note, Schema
from carrel.sampling.blocks import Layout, Reading, spread, squeezed
from carrel.sampling.segment import KEY_EVERY, RowRead, SegmentReader, SegmentWriter, open_reader

ROWS = st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), min_size=1, max_size=20)


def layout(*names: str, floating: bool = False) -> Layout:
    return Layout(Schema(set="s", columns=tuple(Column(n, "count") for n in names), source="test", floating=floating))


def opened(path: Path) -> SegmentWriter:
    return SegmentWriter(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), name=str(path))


def written(path: Path, rows: Sequence[Sequence[float]], *, shape: Layout | None = None) -> None:
    writer = opened(path)
    shape = shape or layout(*"abc"[: len(rows[0])])
    for at, row in enumerate(rows):
        writer.row(1000 + at, (Reading([shape.block(row)]), None))
    writer.close()


def values(path: Path) -> list[tuple[float, ...]]:
    with open_reader(path) as reader:
        return rows_of(reader)


def row_list(path: Path) -> list[RowRead]:
    with open_reader(path) as reader:
        return [entry for entry in reader.entries() if isinstance(entry, RowRead)]


def rows_of(reader: SegmentReader) -> list[tuple[float, ...]]:
    rows = [entry for entry in reader.entries() if isinstance(entry, RowRead)]
    return [block.layout.packing.unpack(block.packed) for row in rows for block in row.blocks]


@given(rows=ROWS)
def test_every_number_of_64_bits_comes_back(
    rows: list[tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("segment") / "s.seg"
    written(path, rows)
    assert values(path) == rows


@given(st.binary(max_size=300) | st.lists(st.sampled_from([0, 0, 0, 0, 7]), max_size=300).map(bytes))
def test_what_is_squeezed_comes_back(data: bytes) -> None:
    assert spread(squeezed(data), len(data)) == data


@given(st.binary(max_size=40), st.integers(0, 300))
def test_what_was_never_squeezed_is_refused_or_has_the_length_asked_for(data: bytes, length: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(spread(data, length)) == length


def test_fractions_come_back(tmp_path: Path) -> None:
    written(tmp_path / "s", [(0.25, 1e300)], shape=layout("a", "b", floating=True))
    assert values(tmp_path / "s") == [(0.25, 1e300)]


def test_what_is_no_unsigned_number_becomes_the_nearest_that_is(tmp_path: Path) -> None:
    written(tmp_path / "s", [(-1, 2**70)])
    assert values(tmp_path / "s") == [(0, 2**64 - 1)]


@given(rows=ROWS, cut=st.floats(0, 1))
def test_cut_anywhere_the_rows_before_the_cut_are_there_and_a_new_writer_goes_on(
    rows: list[tuple[int, ...]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("segment") / "s.seg"
    written(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    left = values(path)
    assert left == rows[: len(left)]
    written(path, [(1, 2, 3)])
    assert values(path) == [*left, (1, 2, 3)]


def test_a_cut_in_the_last_frame_costs_the_last_row_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    rows = [(n, n * n, 7) for n in range(50)]
    written(path, rows)
    path.write_bytes(path.read_bytes()[:-1])
    assert values(path) == rows[:-1]


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 100, bytes(range(64))], ids=["zeros", "ones", "some"])
def test_what_a_power_cut_leaves_behind_the_last_row_is_no_row(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "s"
    written(path, [(1, 2, 3)])
    with path.open("ab") as file:
        file.write(tail)
    assert values(path) == [(1, 2, 3)]
    writer = opened(path)
    assert writer.bytes_cut == len(tail)
    writer.close()


def test_the_last_time_is_known_to_the_next_writer(tmp_path: Path) -> None:
    written(tmp_path / "s", [(1, 2, 3), (4, 5, 6)])
    writer = opened(tmp_path / "s")
    assert (writer.rows, writer.last_us) == (2, 1001)
    writer.close()


def test_readings_that_two_jobs_share_are_right_in_both(tmp_path: Path) -> None:
    shape = layout("a")
    readings = [Reading([shape.block((n * 1000,))]) for n in range(10)]
    every, second = opened(tmp_path / "every"), opened(tmp_path / "second")
    for at, reading in enumerate(readings):
        every.row(at, (reading, None))
        if at % 2:
            second.row(at, (reading, None))
    every.close()
    second.close()
    assert values(tmp_path / "every") == [(n * 1000,) for n in range(10)]
    assert values(tmp_path / "second") == [(n * 1000,) for n in range(10) if n % 2]


def test_a_source_that_is_read_now_and_then_is_right_each_time(tmp_path: Path) -> None:
    fast, slow = layout("fast"), layout("slow")
    writer = opened(tmp_path / "s")
    for at in range(9):
        blocks = [fast.block((at,))] + ([slow.block((at * 7,))] if at % 3 == 0 else [])
        writer.row(at, (Reading(blocks), None))
    writer.close()
    blocks_of = {row.seq: row.blocks for row in row_list(tmp_path / "s")}
    found = {
        seq: int.from_bytes(block.packed, "little")
        for seq, blocks in blocks_of.items()
        for block in blocks
        if block.layout.schema == slow.schema
    }
    assert found == {0: 0, 3: 21, 6: 42}


def test_a_reading_that_did_not_change_is_not_stored_again(tmp_path: Path) -> None:
    shape, own = layout("shared"), layout("own")
    shared = Reading([shape.block((5,))])
    writer = opened(tmp_path / "s")
    for at in range(3):
        writer.row(at, (shared, Reading([own.block((at,))])))
    writer.close()
    assert values(tmp_path / "s") == [(5,), (0,), (1,), (2,)]


def test_rows_are_right_across_those_that_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    rows = [(n,) for n in range(KEY_EVERY + 5)]
    written(path, rows, shape=layout("a"))
    assert values(path) == rows


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    shape = layout("a")
    writer = opened(tmp_path / "s")
    writer.row(1, (Reading([shape.block((1,))]), None))
    with open_reader(tmp_path / "s") as reader:
        assert rows_of(reader) == [(1,)]
        writer.row(2, (Reading([shape.block((2,))]), None))
        assert rows_of(reader) == [(2,)]
    writer.close()


def test_notes_stand_between_the_rows(tmp_path: Path) -> None:
    writer = opened(tmp_path / "s")
    writer.note(Note(time_us=1, what="clock", text="set"))
    writer.close()
    with open_reader(tmp_path / "s") as reader:
        assert list(reader.entries()) == [Note(time_us=1, what="clock", text="set")]


def test_another_programs_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(CarrelError, match="not a file of samples"):
        opened(path)
    assert path.read_bytes() == b"#!/bin/sh\n"


def test_a_frame_of_a_later_version_is_passed_over() -> None:
    body = b"Zfuture"
    data = b"CARREL1\n" + struct.pack("<II", len(body), zlib.crc32(body)) + body
    reader = SegmentReader(io.BytesIO(data), name="x")
    assert list(reader.entries()) == []
    assert reader.end == len(data)


def test_on_a_full_disk_nothing_is_half_written_and_the_next_row_is_right(tmp_path: Path) -> None:
    path = tmp_path / "s"
    shape = layout(*"abcdefgh")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = opened(path)
    stored = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        for at in range(40):
            row = [int.from_bytes(os.urandom(8), "little") for _ in range(8)]
            try:
                writer.row(at, (Reading([shape.block(row)]), None))
                stored.append(tuple(row))
            except OSError:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        writer.close()
    assert len(stored) == 39
    assert values(path) == stored


WRITER = """
import os, sys
from carrel.model.sample import Column, Schema
from carrel.sampling.blocks import Layout, Reading, spread, squeezed
from carrel.sampling.segment import SegmentWriter
writer = SegmentWriter(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), name="s")
shape = Layout(Schema(set="s", columns=(Column("n", "count"), Column("m", "count")), source=""))
while True:
    n = writer.rows
    writer.row(n, (Reading([shape.block((n, n * n))]), None))
    os.write(1, b"%d\\n" % n)
"""


def test_killed_at_any_moment_no_row_that_was_written_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "s"
    told = 0
    for lines in (1, 20, 300):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(lines):
                child.stdout.readline()
            child.kill()
            seen = child.stdout.read().split(b"\n")
        told = max([told, *(int(line) for line in seen[:-1] if line)])
        rows = values(path)
        assert rows == [(n, n * n) for n in range(len(rows))]
        assert len(rows) > told
