"""A fuse: the power goes before or after the n-th call that changes the world, and with it the process."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any


class PowerCut(BaseException):
    """The process is gone; what it had written stays. Not an ``Exception``: nothing may catch it as an error."""


class Fuse:
    """Counts calls through all the things it guards.

    Args:
        calls: How many calls pass before it blows; None: it never does.
        late: Whether the call it blows on was done.
    """

    def __init__(self, calls: int | None, *, late: bool = False) -> None:
        """Set the fuse."""
        self._left = calls
        self._late = late

    @property
    def blown(self) -> bool:
        return self._left is not None and self._left < 0

    def __call__(self, thing: Any, writes: Iterable[str]) -> Any:
        """Return ``thing`` with its methods ``writes`` guarded; the others pass."""
        return _Guarded(thing, frozenset(writes), self)

    def _blows(self) -> bool:
        """Whether this call is the one; a process that is gone makes no further call."""
        assert not self.blown, "a call after the power was cut"
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    @staticmethod
    def _cut(blows: bool) -> None:
        if blows:
            raise PowerCut

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, counted."""

        async def guarded_async(*args: Any, **kwargs: Any) -> Any:
            blows = self._blows()
            if blows and not self._late:
                raise PowerCut
            try:
                return await call(*args, **kwargs)
            finally:
                # Also when the call was refused: nobody is left to read the refusal.
                self._cut(blows)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            blows = self._blows()
            if blows and not self._late:
                raise PowerCut
            try:
                return call(*args, **kwargs)
            finally:
                self._cut(blows)

        return guarded_async if inspect.iscoroutinefunction(call) else guarded


class _Guarded:
    def __init__(self, thing: Any, writes: frozenset[str], fuse: Fuse) -> None:
        self._thing = thing
        self._writes = writes
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        return self._fuse.guard(found) if name in self._writes else found
