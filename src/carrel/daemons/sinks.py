"""The process that brings samples to the sinks of a site, one for each node: heavy libraries stay out of carreld.

Each sink has a thread, so that one that is slow or down keeps nobody else waiting. Killed at any instruction, the next
process goes on: what sinks have is in ``marks/``, what they have yet to take in ``entries/``, both in the node's spool.
"""

import contextlib
import fcntl
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

import msgspec

from carrel import config
from carrel.daemons.outlet import Outlet
from carrel.errors import CarrelError, NotFoundError
from carrel.model.shipping import ShippingStatus
from carrel.ports import LoadedSink, Sink, SinkContext
from carrel.sampling.spool import Spool

LOOK_S = 1.0
STOP_TIMEOUT_S = 5.0

_LOG = logging.getLogger("carrel-sinks")


def directory(settings: config.Config, node: str) -> Path:
    """Return where a node keeps what its sinks have yet to take, and how far they are."""
    return settings.node.path(node) / "spool"


def load_status(settings: config.Config, node: str) -> ShippingStatus | None:
    """Return how the sinks were doing a moment ago; None: no process has ever fed them."""
    try:
        return msgspec.json.decode((directory(settings, node) / "status.json").read_bytes(), type=ShippingStatus)
    except (OSError, msgspec.MsgspecError):
        return None


def make_sink(name: str, context: SinkContext) -> Sink:
    """Return the sink of this name.

    Raises:
        NotFoundError: none of this name is installed.
        CarrelError: it does not load, or its settings are wrong.
    """
    points = entry_points(group="carrel.sinks")
    if name not in points.names:
        raise NotFoundError(f"no sink '{name}' is installed (metrics.sinks); known: {', '.join(sorted(points.names))}")
    try:
        loaded: type[LoadedSink] = points[name].load()
    except (ImportError, AttributeError) as error:
        raise CarrelError(f"sink '{name}' does not load: {error}; see: pip install carrel[{name}]") from error
    sink: Sink = loaded.from_context(context)  # type: ignore[assignment]  # it is both protocols
    return sink


class Shipping:
    """All sinks of one node."""

    def __init__(self, settings: config.Config, node: str) -> None:
        """Take the node's spool.

        Raises:
            CarrelError: another process feeds the sinks of this node.
        """
        self._node = node
        self._directory = directory(settings, node)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _locked(self._directory / "lock")
        self._root = Path(settings.metrics.root)
        self._spool = Spool(self._directory)
        context = SinkContext(config=settings, node=node, status=self.status)
        self._outlets = [
            Outlet(name, _maker(name, context), Spool(self._directory), settings.metrics)
            for name in dict.fromkeys(settings.metrics.sinks)
        ]
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Work until stopped. A sink that does not answer in time is left where it is: its rows come again."""
        threads = [threading.Thread(target=one.run, name=one.name, daemon=True) for one in self._outlets]
        for thread in threads:
            thread.start()
        while not self._stopping.wait(LOOK_S):
            self.tidy()
            if not self._outlets and not self._spool.entries():
                return  # what sinks of earlier settings left is gone
        for one in self._outlets:
            one.stop()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        self.tidy()

    def tidy(self) -> None:
        """Remove what all sinks are through with, and tell how they are doing."""
        marks = [one.through() for one in self._outlets]
        for name, entry in self._spool.entries().items():
            if all(name in through for through in marks) and (marks or not self._grows(entry.directory, entry.stem)):
                with contextlib.suppress(OSError):  # cannot be told now: the next look tries again
                    self._spool.remove(name, self._root)
        with contextlib.suppress(OSError):  # a full disk is told by what suffers from it
            draft = self._directory / ".status.json.draft"
            draft.write_bytes(msgspec.json.encode(self.status()))
            draft.rename(self._directory / "status.json")

    def _grows(self, directory: str, stem: str) -> bool:
        return (self._root / directory / f"{stem}.seg").exists()

    def status(self) -> ShippingStatus:
        """Return how the sinks are doing."""
        sinks = tuple(one.status() for one in self._outlets)
        return ShippingStatus(node=self._node, pid=os.getpid(), time_s=time.time(), sinks=sinks)


def _maker(name: str, context: SinkContext) -> Callable[[], Sink]:
    return partial(make_sink, name, context)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise CarrelError(f"{path}: another process feeds the sinks of this node; is carreld running?") from error
    return descriptor


def main(node: str) -> None:
    """Feed the sinks of a node until a signal ends it.

    Raises:
        CarrelError: another process does so, or the configuration is wrong.
    """
    settings = config.load()
    logging.basicConfig(format="carrel-sinks: %(message)s", stream=sys.stderr)
    limit = settings.metrics.sinks_memory_max_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    shipping = Shipping(settings, node)

    def stop(_number: int, _frame: FrameType | None) -> None:
        shipping.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    shipping.run()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except CarrelError as error:
        sys.exit(f"carrel-sinks: {error}")
