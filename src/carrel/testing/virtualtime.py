"""An event loop whose clock leaps, so that an hour of waiting takes no longer than what is done in it."""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock leaps to the next timer; what goes to a thread elsewhere is done at once."""

    def __init__(self) -> None:
        """Begin at 0 s."""
        self.now_s = 0.0
        super().__init__(_Leap(self))

    def time(self) -> float:
        return self.now_s

    def run_in_executor(  # type: ignore[override]  # the base returns the same future under another type
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        del executor
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # it is raised where the future is awaited
            done.set_exception(error)
        return done


class _Leap(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and nothing will ever come"
        self._loop.now_s += max(timeout, 0.0)
        return []
