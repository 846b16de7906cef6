"""Samples as Parquet. Imported by the short-lived process that writes them, and by nobody else: it brings Arrow."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from carrel.sampling.tables import Survey, Value, Varying

ROWS_PER_GROUP = 4096
METADATA_KEY = b"carrel"
_TIME = pa.timestamp("us", tz="UTC")


def write(survey: Survey, stem: str) -> list[str]:
    """Write the tables of a segment into the current directory and return their names."""
    fields = [pa.field("time", _TIME, nullable=False), *(pa.field(c.name, _type(c)) for c in survey.varying)]
    about = {
        "job": survey.usage.job,
        "units": survey.units,
        "constants": {name: value for name, (_, value) in survey.constants.items()},
    }
    metadata = {METADATA_KEY: msgspec.json.encode(about)}
    rows = ((time_us, *values) for time_us, values in survey.table())
    files = [_file(f"{stem}.parquet", pa.schema(fields, metadata=metadata), rows)]
    if survey.processes:
        names = [column.name for column in survey.process_columns()]
        fields = [pa.field("time", _TIME, nullable=False), pa.field("program", pa.string())]
        fields += [pa.field(name, pa.uint64()) for name in names]
        readings = ((time_us, program, *values) for time_us, program, values in survey.process_table())
        files.append(_file(f"{stem.replace('samples', 'processes', 1)}.parquet", pa.schema(fields), readings))
    return files


def _type(column: Varying) -> Any:
    if column.floating:
        return pa.float64()
    return pa.uint64() if column.unsigned else pa.int64()


def _file(name: str, schema: Any, rows: Iterable[Sequence[Value | str | None]]) -> str:
    draft = Path(f".{name}.draft")
    whole = {field.name for field in schema if pa.types.is_integer(field.type) or field.name == "time"}
    encodings = dict.fromkeys(whole, "DELTA_BINARY_PACKED")
    encodings |= {field.name: "BYTE_STREAM_SPLIT" for field in schema if pa.types.is_floating(field.type)}
    # A column costs about 190 bytes before its first value; statistics and dictionaries are a third of that.
    with pq.ParquetWriter(
        draft,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding=encodings,
        write_statistics=["time"],
        store_schema=False,
    ) as writer:
        for group in _groups(rows):
            arrays = [pa.array(values, field.type) for values, field in zip(group, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.rename(name)
    return name


def _groups(rows: Iterable[Sequence[Value | str | None]]) -> Iterator[Iterable[tuple[Value | str | None, ...]]]:
    group: list[Sequence[Value | str | None]] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_PER_GROUP:
            yield zip(*group, strict=True)
            group = []
    if group:
        yield zip(*group, strict=True)
