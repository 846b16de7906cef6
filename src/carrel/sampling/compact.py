"""At the end of a job: the segment becomes tables, and ``job.json`` and ``summary.json`` say what they hold.

Done by a process of its own, as the job's user and at the lowest priority: what writes Parquet takes more memory than
all of carreld, and a user who plays tricks with links in their own directory then fools nobody but themselves.

The segment is removed last. Killed at any instruction, the next call begins anew and finds all it needs.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import subprocess  # a child that outlives no one: its end is awaited by its caller
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, TypeVar

import msgspec

from carrel import __version__, process
from carrel.errors import CarrelError
from carrel.model.sample import JobFile, JobSummary, NodeSummary, Note, SeriesFile, View
from carrel.sampling.folder import RUN_FILE, JobFolder, of_stem
from carrel.sampling.spool import Spool, kept, live
from carrel.sampling.tables import Survey, Value

NOTES_MAX = 1000
"""So many in ``job.json``; a job that was degraded a million times says so once."""
_ZSTD_TIMEOUT_S = 3600.0
_LOCK_TIMEOUT_S = 10.0
_LOCK_RETRY_S = 0.02
_PRIORITY = 19
_NOBODY = 65534

_S = TypeVar("_S", JobFile, JobSummary)


def spawn(
    folder: JobFolder, stem: str, formats: Sequence[str], *, spool: Spool | None = None
) -> "subprocess.Popen[bytes]":
    """Start the work for one node and view. The caller awaits it; its last line on stderr says what went wrong.

    What sinks have yet to take, as ``spool`` says, is kept for them, out of the sight of who reads samples.
    """
    words = [sys.executable, "-m", "carrel.sampling.compact", str(folder.descriptor), stem]
    words += ["--uid", str(folder.uid), *formats]
    words += ["--keep"] if spool is not None and spool.holds(folder, stem) else []
    return subprocess.Popen(  # its descriptor of the directory must be inherited, which carrel.process never does
        words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(folder.descriptor,)
    )


def compact(stem: str, formats: Sequence[str], *, keep: bool = False) -> None:
    """Work on the segment of this name in the current directory; where there is none, all is done.

    Args:
        stem: What its files are called, less their ends.
        formats: Of the tables.
        keep: Hide the segment for the sinks instead of removing it.

    Raises:
        CarrelError: it is no segment, or what it becomes cannot be written.
    """
    segment = Path(live(stem))
    if not segment.exists():
        return
    node, view = of_stem(stem)
    survey = Survey(segment, node=node, view=view)
    files: list[str] = []
    if survey.rows:
        wanted = list(formats)
        if "parquet" in wanted and not _have_pyarrow():
            survey.notes.append(
                _note("no Parquet was written: pyarrow is not installed; see: pip install carrel[parquet]")
            )
            wanted = ["csv"]
        if "csv" in wanted:
            files += _csv(survey, stem)
        if "parquet" in wanted:
            files += _parquet().write(survey, stem)
    with _locked():
        _describe(survey, files, node=node, view=view)
        _sync(Path())
        if keep:
            segment.rename(kept(stem))
        else:
            segment.unlink()


def _parquet() -> ModuleType:
    """Only who wants Parquet pays Arrow's 60 MB."""
    return importlib.import_module("carrel.sampling.parquet")


def _have_pyarrow() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def _note(text: str) -> Note:
    return Note(time_us=time.time_ns() // 1000, what="failed", text=text)


def _csv(survey: Survey, stem: str) -> list[str]:
    names = [column.name for column in survey.varying]
    samples = _csv_file(f"{stem}.csv", ["time_s", *names], survey.table())
    if not survey.processes:
        return [samples]
    header = ["time_s", "program", *(column.name for column in survey.process_columns())]
    rows = ((time_us, [_quoted(program), *values]) for time_us, program, values in survey.process_table())
    return [samples, _csv_file(f"{stem.replace('samples', 'processes', 1)}.csv", header, rows)]


def _csv_file(name: str, header: Iterable[str], rows: Iterable[tuple[int, Sequence[Value | str | None]]]) -> str:
    draft = Path(f".{name}.draft")
    with draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(",".join(header) + "\n")
        for time_us, values in rows:
            cells = ("" if value is None else str(value) for value in values)
            file.write(f"{time_us // 10**6}.{time_us % 10**6:06d},{','.join(cells)}\n")
        _written(file)
    if shutil.which("zstd") is None:
        draft.rename(name)
        return name
    packed = Path(f".{name}.zst.draft")
    process.run(["zstd", "-q", "-f", "-10", "-o", packed, draft], timeout_s=_ZSTD_TIMEOUT_S)
    _sync(packed)
    packed.rename(f"{name}.zst")
    draft.unlink()
    return f"{name}.zst"


def _quoted(text: str) -> str:
    """A program may be called anything, also a formula; what steers a terminal or a reader of CSV goes."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return '"' + plain.replace('"', '""') + '"'


def _describe(survey: Survey, files: list[str], *, node: str, view: View) -> None:
    """Put this node's part into the two files; those of other nodes stay."""
    job = survey.usage.job
    if job is None:
        raise CarrelError(f"{survey.path}: it does not say whose job it is; was its beginning cut off?")
    others = [path for path in Path().glob("samples.*.seg") if path.name != survey.path.name]
    before = _read(Path("job.json"), JobFile)
    if view == "guest" and before is not None:
        job = before.job  # a guest has less than its job
    ended = survey.usage.ended
    series = [one for one in (before.series if before else ()) if (one.node, one.view) != (node, view)]
    series.append(
        SeriesFile(
            node=node,
            view=view,
            files=tuple(files),
            rows=survey.rows,
            complete=ended,
            version=__version__,
            kernel=os.uname().release,
            constants={name: value for name, (_, value) in survey.constants.items()},
            units=survey.units | {name: column.unit for name, (column, _) in survey.constants.items()},
            counters=survey.counters,
            sources=survey.sources,
            cost_us=next((note.cost_us for note in reversed(survey.notes) if note.cost_us), {}),
            notes=tuple(msgspec.structs.replace(note, job=None, cost_us={}) for note in survey.notes[:NOTES_MAX]),
            clock_ticks_per_s=os.sysconf("SC_CLK_TCK"),
            page_bytes=os.sysconf("SC_PAGE_SIZE"),
        )
    )
    series.sort(key=lambda one: (one.node, one.view))
    _replace(Path("job.json"), JobFile(run=str(job.key), job=job, series=tuple(series)))
    summary = _read(Path("summary.json"), JobSummary)
    nodes: list[NodeSummary] = [n for n in (summary.nodes if summary else ()) if (n.node, n.view) != (node, view)]
    nodes += [survey.summary] if survey.summary else []
    nodes.sort(key=lambda one: (one.node, one.view))
    complete = not others and all(one.complete for one in series)
    _replace(Path("summary.json"), JobSummary(run=str(job.key), job=job, nodes=tuple(nodes), complete=complete))


def _read(path: Path, kind: type[_S]) -> _S | None:
    """Return what another node wrote; what its owner has made unreadable is written anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _replace(path: Path, value: JobFile | JobSummary) -> None:
    draft = Path(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
        _written(file)
    draft.rename(path)


def _written(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Keep the other nodes of this job from writing the same two files; one that hangs is not waited for."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    with Path(RUN_FILE).open("rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(_LOCK_RETRY_S)
        yield


def _group_of(uid: int) -> int:
    """Return the user's own group: that of the directory may be one that reads all samples."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return _NOBODY


def main() -> None:
    """Work on one segment as its owner."""
    parser = argparse.ArgumentParser(description="Turn a segment into tables.")
    parser.add_argument("directory", type=int, help="descriptor of the job's directory")
    parser.add_argument("stem")
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("formats", nargs="+", choices=["csv", "parquet"])
    arguments = parser.parse_args()
    os.fchdir(arguments.directory)
    if os.geteuid() == 0 and arguments.uid != 0:
        if "parquet" in arguments.formats and _have_pyarrow():
            _parquet()  # while this installation can be read: that user may not be allowed to
        os.setgroups([])
        os.setgid(_group_of(arguments.uid))
        os.setuid(arguments.uid)
    os.umask(0o027)
    os.nice(_PRIORITY)
    try:
        compact(arguments.stem, arguments.formats, keep=arguments.keep)
    except (CarrelError, OSError) as error:
        sys.exit(f"{arguments.stem}: {error}")


if __name__ == "__main__":
    main()
