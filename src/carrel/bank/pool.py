"""The connections of a store: one that writes, under a lock, and as many as there are readers at once."""

import threading
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """A connection, as far as a pool needs it."""

    def close(self) -> None: ...


_C = TypeVar("_C", bound=Closable)


class Pool(ABC, Generic[_C]):
    """Keeps the connections of one store. Nothing is connected before it is used."""

    def __init__(self) -> None:
        """Have none yet."""
        self._lock = threading.Lock()
        self._idle: list[_C] = []
        self._writer: _C | None = None
        self._closed = False

    @abstractmethod
    def _connect(self) -> _C: ...

    def _take(self) -> _C:
        """Return a connection to read with; give it back with ``_give``."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def _give(self, connection: _C) -> None:
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        """Close what nobody reads with now; the others close when they are given back."""
        with self._lock:
            self._closed = True
            for connection in [*self._idle, *([self._writer] if self._writer else [])]:
                connection.close()
            self._idle.clear()
            self._writer = None
