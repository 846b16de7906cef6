"""How far something is that takes long: one live line on a terminal, a line for each phase elsewhere."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Yield what tells the next phase; it goes to stderr. SIGTERM cleans up as Ctrl-C does."""
    console = Console(stderr=True)
    began = time.monotonic()
    phases = [""]

    def line() -> str:
        return f"{name}: {phases[-1]} ({time.monotonic() - began:.0f} s)"

    with _ended_like_interrupted():
        if not console.is_terminal:
            yield lambda phase: print(f"{name}: {phase}", file=sys.stderr, flush=True)
            return
        # What is printed meanwhile goes above the line; but what a program reads must not go to the terminal with it.
        spinner = Spinner("dots", text=_Elapsed(line))
        with Live(spinner, console=console, transient=True, redirect_stdout=sys.stdout.isatty()):
            yield phases.append


class _Elapsed:
    """A line that is computed anew at each refresh."""

    def __init__(self, line: Callable[[], str]) -> None:
        self._line = line

    def __rich__(self) -> str:
        return self._line()


@contextlib.contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Clean up on SIGTERM as on Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
