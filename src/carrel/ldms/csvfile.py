"""LDMS's CSV, as store_csv writes it: the header says what there is, and may come again in the middle of a file."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from carrel.errors import CarrelError

_TIME = "Time"
_ABOUT = frozenset({"Time_usec", "ProducerName", "component_id", "job_id", "app_id"})
_NAMED = ".name"
"""A column that ends so names the record of a list that this row is: one of procstat2's CPUs."""


class LdmsRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one set held at one moment."""

    time_us: int
    set: str
    producer: str
    """Empty in sets that were decomposed."""
    component: int
    values: dict[str, int | float]


def set_of(path: Path) -> str:
    """Return the set that a file holds; a decomposed one has a digest after its name.

    >>> set_of(Path("procstat2_78935b2")), set_of(Path("meminfo"))
    ('procstat2', 'meminfo')
    """
    stem, _, digest = path.name.rpartition("_")
    return stem if len(digest) == 7 and all(letter in "0123456789abcdef" for letter in digest) else path.name


def read(path: Path) -> Iterator[LdmsRow]:
    """Yield the rows of a file. A last one that is cut off is left out.

    Raises:
        CarrelError: it has no header of LDMS.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header: list[str] = []
        cells: list[str] | None = None  # of an empty file: its first set has not come yet
        for cells in csv.reader(_whole_lines(file)):
            if cells and cells[0].startswith("#"):
                header = [cells[0].removeprefix("#"), *cells[1:]]
                if header[0] != _TIME:
                    break
            elif header and len(cells) == len(header):
                yield _row(set_of(path), header, cells)
        if cells is not None and header[:1] != [_TIME]:
            raise CarrelError(f"{path}: it does not begin with #Time; was it written by LDMS's store_csv?")


def _whole_lines(file: TextIO) -> Iterator[str]:
    return (line for line in file if line.endswith("\n"))


def _row(name: str, header: list[str], cells: list[str]) -> LdmsRow:
    about = dict(zip(header, cells, strict=True))
    record = next((f"{about[column]}." for column in header if column.endswith(_NAMED)), "")
    values: dict[str, int | float] = {}
    for column, cell in about.items():
        if column == _TIME or column in _ABOUT or column.endswith(_NAMED):
            continue
        number = _number(cell)
        if number is not None:
            # Of a list, each record has its own; what stands beside the list is the same in all of them.
            prefix, _, field = column.rpartition(".")
            values[f"{record}{field}" if record and prefix else column] = number
    seconds, _, fraction = about[_TIME].partition(".")
    return LdmsRow(
        time_us=int(seconds) * 10**6 + int(fraction[:6].ljust(6, "0")),
        set=name,
        producer=about.get("ProducerName", ""),
        component=int(about.get("component_id") or 0),
        values=values,
    )


def _number(cell: str) -> int | float | None:
    try:
        return int(cell)
    except ValueError:
        pass
    try:
        return float(cell)
    except ValueError:
        return None
