"""Brings segments to the disk in a thread of its own: a disk may take seconds, and the samples are due meanwhile."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from carrel.sampling.segment import SegmentWriter


class Syncer:
    """Calls ``sync`` on all segments that it was given, and closes them."""

    def __init__(self, *, period_s: float, failed: Callable[[str, OSError], None]) -> None:
        """Keep what is needed; ``run`` does the work.

        Args:
            period_s: Time between two rounds.
            failed: Told of what the disk refused.
        """
        self._period_s = period_s
        self._failed = failed
        self._lock = threading.Lock()
        self._writers: set[SegmentWriter] = set()
        self._closing: list[tuple[SegmentWriter, Future[None]]] = []
        self._wake = threading.Event()
        self._stopped = False

    def watch(self, writer: SegmentWriter) -> None:
        with self._lock:
            self._writers.add(writer)

    def close(self, writer: SegmentWriter) -> "Future[None]":
        """Sync and close one soon; only then is its descriptor free, so nobody else may write or close it."""
        done: Future[None] = Future()
        with self._lock:
            self._writers.discard(writer)
            self._closing.append((writer, done))
        self._wake.set()
        return done

    def stop(self) -> None:
        """End ``run`` after one more round, that closes all."""
        with self._lock:
            self._closing += [(writer, Future()) for writer in self._writers]
            self._writers.clear()
            self._stopped = True
        self._wake.set()

    def run(self) -> None:
        """Work until stopped."""
        while True:
            self._wake.wait(self._period_s)
            self._wake.clear()
            with self._lock:
                writers, closing, stopped = list(self._writers), self._closing, self._stopped
                self._closing = []
            for writer in writers:
                self._sync(writer)
            for writer, done in closing:
                self._sync(writer)
                writer.close()
                done.set_result(None)
            if stopped:
                return

    def _sync(self, writer: SegmentWriter) -> None:
        try:
            writer.sync()
        except OSError as error:
            self._failed(writer.name, error)
