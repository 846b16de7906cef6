"""One sink and how far it is: what the spool holds goes to it in order, again and again until it has taken it.

Rows are written first and remembered second, so a kill at any instruction brings some rows twice and loses none. What a
sink refuses for ever, and what waits beyond the cap, is dropped, oldest first, and counted.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from carrel.config import Metrics
from carrel.errors import CarrelError, RefusedError
from carrel.model.sample import Batch
from carrel.model.shipping import Mark, Marks, SinkStatus, SpoolEntry, Why
from carrel.ports import Sink
from carrel.sampling.series import Series
from carrel.sampling.spool import Spool, replace

BATCH_ROWS = 60
"""At most so many of one series, so that the first one does not keep the others waiting."""
OPEN_MAX = 256
"""Series open at once; the oldest ones, of a sink that was down for long."""
RETRY_MAX_S = 30.0

_LOG = logging.getLogger("carrel-sinks")


class _Pending(msgspec.Struct, frozen=True):
    """A batch that was read and not yet taken."""

    name: str
    batch: Batch
    mark: Mark


class Outlet:
    """Feeds one sink. All but ``stop``, ``status`` and ``through`` belong to the thread that is in ``run``."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Sink],
        spool: Spool,
        settings: Metrics,
        *,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Remember what an earlier one of this name did; nothing is opened yet.

        Args:
            name: The sink's.
            make: Makes the sink, whenever there is none.
            spool: What there is to take; this outlet alone uses the object.
            settings: The cap, and where samples are.
            now_us: The clock by which rows grow old.
        """
        self.name = name
        self._make = make
        self._sink: Sink | None = None
        self._spool = spool
        self._settings = settings
        self._root = Path(settings.root)
        self._now_us = now_us
        self._path = spool.directory / "marks" / f"{name}.json"
        self._series: dict[str, Series] = {}
        self._sizes: dict[str, int] = {}
        """Of segments that are not open."""
        self._pending: list[_Pending] = []
        self._more = False
        """There was more than went into one call."""
        self._error = ""
        self._failures = 0
        self._failing_since_s = 0.0
        self._waiting = (0, 0.0)
        self._unseen: OSError | None = None
        self._stopping = threading.Event()
        known = self._load()
        self._marks = dict(known.marks)
        self._written = known.rows_written
        self._dropped: Counter[Why] = Counter(known.rows_dropped)
        self._lost = known.series_lost

    def _load(self) -> Marks:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Marks)
        except (OSError, msgspec.MsgspecError):
            return Marks()  # all rows come once more

    def run(self) -> None:
        """Feed the sink until stopped."""
        while not self._stopping.is_set():
            self._stopping.wait(self.turn())
        self.close()

    def stop(self) -> None:
        """End ``run``, once the sink has answered."""
        self._stopping.set()

    def close(self) -> None:
        self._forget_series()
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def turn(self) -> float:
        """Bring what there is; return after how many seconds to look again."""
        self._unseen = None
        try:
            self._look()
            self._keep_the_cap()
            self._open_sink()
            while self._gather():
                self._write()
                if not self._more or self._stopping.is_set():
                    break
                self._look()
                self._keep_the_cap()
            if self._unseen is not None:
                raise self._unseen  # noqa: TRY301  # all others were served first
        except Exception as error:  # noqa: BLE001  # also a stranger's sink must not end the others
            self._fail(error)
        else:
            self._error, self._failures = "", 0
        self._measure()
        pace_s = self._sink.period_s if self._sink else 1.0
        return min(max(pace_s, 0.1) * 2.0**self._failures, RETRY_MAX_S) if self._failures else pace_s

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            self._failing_since_s = time.time()
        if str(error) != self._error:
            _LOG.warning("%s: %s", self.name, error, exc_info=not isinstance(error, CarrelError | OSError))
        self._error = str(error) or repr(error)
        self._failures = min(self._failures + 1, 16)

    def _open_sink(self) -> None:
        if self._sink is None:
            self._sink = self._make()
            self._forget_series()  # they know which metrics it wants
            self._look()

    def _forget_series(self) -> None:
        for series in self._series.values():
            series.close()
        self._series = {}
        # What was read is read again; what was only said of a series that is gone is not.
        self._pending = [one for one in self._pending if one.batch.ended and not one.batch.rows]

    def _look(self) -> None:
        """Open what is new, forget what is gone."""
        entries = self._spool.entries()
        for name in self._series.keys() - entries.keys():
            self._series.pop(name).close()
        self._marks = {name: mark for name, mark in self._marks.items() if name in entries}
        waiting = {name: entry for name, entry in entries.items() if not self._mark(name).final}
        self._sizes = {name: size for name, size in self._sizes.items() if name in waiting}
        for name, entry in waiting.items():
            if name in self._series:
                self._series[name].entry = entry  # more may be known of its job now
            elif len(self._series) < OPEN_MAX:
                self._open(name, entry)
            elif name not in self._sizes:
                self._sizes[name] = _size(self._root / entry.directory, entry.stem)

    def _mark(self, name: str) -> Mark:
        return self._marks.get(name, Mark())

    def _open(self, name: str, entry: SpoolEntry) -> None:
        metrics = self._sink.metrics if self._sink else ()
        try:
            self._series[name] = Series(self._root, entry, self._mark(name), metrics=metrics)
        except (FileNotFoundError, CarrelError) as error:
            self._lose(name, entry, error)
        except OSError as error:
            self._unseen = error  # nobody can tell; it comes again
        else:
            self._sizes.pop(name, None)

    def _lose(self, name: str, entry: SpoolEntry, error: Exception) -> None:
        """Give a series up, and have the sink forget it too."""
        _LOG.warning("%s: %s is lost: %s", self.name, name, error)
        self._lost += 1
        if name in self._series:
            self._series.pop(name).close()
        before = self._mark(name)
        self._marks[name] = mark = Mark(rows=before.rows, notes=before.notes, final=True)
        batch = Batch(job=entry.job, node=entry.node, view=entry.view, ended=True)
        self._pending.append(_Pending(name, batch, mark))

    def _gather(self) -> bool:
        """Read on where nothing waits to be written; return whether there is something to write."""
        if self._pending:
            self._more = True
            return True
        self._more = False
        room = self._sink.rows_max if self._sink else 0
        for name, series in list(self._series.items()):
            if room <= 0:
                break
            try:
                batch = series.take(min(BATCH_ROWS, room))
                self._more = self._more or series.next_us() is not None
            except CarrelError as error:
                self._lose(name, series.entry, error)
                continue
            if batch.rows or batch.notes or batch.ended:
                self._pending.append(_Pending(name, batch, series.mark))
                room -= len(batch.rows)
            self._series[name] = self._series.pop(name)  # the others come first the next time
            if batch.ended:
                self._series.pop(name).close()
        self._more = self._more or room <= 0
        return bool(self._pending)

    def _write(self) -> None:
        sink = self._sink
        if sink is None:
            return
        try:
            sink.write([one.batch for one in self._pending])
        except RefusedError as error:
            if len(self._pending) > 1:
                self._write_singly(sink)
                return
            self._drop(self._pending, "refused", error)
        except CarrelError:
            raise
        except Exception:
            self._sink = None  # it is not what it was: the next turn makes another one
            sink.close()
            raise
        else:
            self._took(self._pending)
        self._pending = []
        self._save()

    def _write_singly(self, sink: Sink) -> None:
        """Find out which one is refused."""
        while self._pending:
            try:
                sink.write([self._pending[0].batch])
            except RefusedError as error:
                self._drop(self._pending[:1], "refused", error)
            else:
                self._took(self._pending[:1])
            self._pending = self._pending[1:]
        self._save()

    def _took(self, done: list[_Pending]) -> None:
        for one in done:
            self._marks[one.name] = one.mark
            self._written += len(one.batch.rows)

    def _drop(self, those: list[_Pending], why: Why, error: Exception | None = None) -> None:
        rows = sum(len(one.batch.rows) for one in those)
        for one in those:
            self._marks[one.name] = one.mark
        if rows:
            self._dropped[why] += rows
        if error is not None:
            _LOG.warning("%s: %d rows were refused: %s", self.name, rows, error)

    def _save(self) -> None:
        """Remember what the sink has; where that fails, it gets some rows twice after a restart."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        marks = Marks(
            marks=self._marks,
            rows_written=self._written,
            rows_dropped=dict(self._dropped),
            series_lost=self._lost,
        )
        replace(self._path, msgspec.json.encode(marks))

    def _keep_the_cap(self) -> None:
        """Drop what has waited too long, then the oldest of what is too much."""
        before = self._dropped.total()
        horizon_us = self._now_us() - round(self._settings.spool_age_max_s * 1e6)
        old = [one for one in self._pending if one.batch.rows and one.batch.rows[-1].time_us < horizon_us]
        self._drop(old, "age")
        self._pending = [one for one in self._pending if one not in old]
        for name, series in list(self._series.items()):
            while name in self._series and self._discard(name, series, "age", before_us=horizon_us):
                pass
        while self._waiting_bytes() > self._settings.spool_bytes_max:
            self._drop(self._pending, "bytes")
            self._pending = []
            name = min(self._series, key=lambda one: _age(self._series[one]), default="")
            if not name or not self._discard(name, self._series[name], "bytes"):
                break
        if self._dropped.total() != before:
            self._save()

    def _discard(self, name: str, series: Series, why: Why, *, before_us: int | None = None) -> bool:
        """Drop some rows of a series; return whether there were any."""
        if any(one.name == name for one in self._pending):
            return False  # older ones of it wait to be written
        before = series.mark
        try:
            dropped = series.discard(BATCH_ROWS, before_us=before_us)
        except CarrelError as error:
            self._lose(name, series.entry, error)
            return True
        if dropped:
            self._dropped[why] += dropped
        self._marks[name] = series.mark
        if series.mark.final:
            self._series.pop(name).close()
            self._look()  # another one may take its place
        return series.mark != before

    def _waiting_bytes(self) -> int:
        return sum(series.waiting_bytes() for series in self._series.values()) + sum(self._sizes.values())

    def _measure(self) -> None:
        oldest = [one.batch.rows[0].time_us for one in self._pending if one.batch.rows]
        self._waiting = self._waiting_bytes(), min(oldest, default=0) / 1e6

    def through(self) -> set[str]:
        """Return the entries of which this sink needs nothing more, also after a restart."""
        return {name for name, mark in self._marks.copy().items() if mark.final}

    def status(self) -> SinkStatus:
        """Return how the sink is doing."""
        return SinkStatus(
            name=self.name,
            error=self._error,
            failing_since_s=self._failing_since_s if self._error else 0.0,
            rows_written=self._written,
            rows_dropped=dict(self._dropped),
            series_lost=self._lost,
            waiting_bytes=self._waiting[0],
            waiting_since_s=self._waiting[1],
            series=len(self._series) + len(self._sizes),
        )


def _age(series: Series) -> int:
    try:
        return series.next_us() or 2**63
    except CarrelError:
        return 0  # discarding it finds that out


def _size(directory: Path, stem: str) -> int:
    for name in (f"{stem}.seg", f".{stem}.seg"):
        try:
            return (directory / name).lstat().st_size
        except OSError:
            continue
    return 0
