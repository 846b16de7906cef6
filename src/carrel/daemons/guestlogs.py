"""What is kept of a guest that was a Slurm node, for whoever asks later why it came late or not at all.

::

    <guests.logs.dir>/<user>/<run>/<guest>.spawn.log      a time and a sentence a line: what was tried, and what failed
                                   <guest>.timings        a word and a time of day a line
                                   <guest>.slurmd.log     the end of its slurmd's log
                                   <guest>.console.log    the end of its console

Whoever follows such a guest holds a ``GuestLog``: ``say`` whenever something is tried or fails, ``mark`` when a phase
is seen (also again: the first one counts), ``keep`` before the guest is destroyed; and has ``GuestLogs.prune`` run now
and then. Each may be called by any number of processes, and killed anywhere: a file is only ever appended to, or
appears whole by rename. Nothing is decided from these files; deleting them changes nothing.

Directories belong to the daemon, files to the job's user, who may read them and nothing else.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, Self, get_args

import msgspec

from carrel.config import GuestLogs as Settings
from carrel.config import Metrics
from carrel.errors import CarrelError
from carrel.model.guest import Guest, GuestSpec
from carrel.sampling.prune import prune

Phase = Literal["clone_start", "clone_end", "customised", "registered", "first_task", "destroyed"]
Tail = Literal["slurmd", "console"]

PHASES: tuple[Phase, ...] = get_args(Phase)
TEXT_MAX = 2000
"""Letters of one sentence: parts of it may be a job's name, or what a hypervisor said."""

PRUNE_PERIOD_S = 3600.0

_LOG = logging.getLogger(__name__)
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@$-]{0,200}")
_TIMING = re.compile(r"(\w+) (\d+\.\d{3})")
_TRIES = 3
"""How often a directory that ``prune`` removed in between is made again."""


class LogOf(msgspec.Struct, frozen=True, kw_only=True):
    """Which guest a log is of."""

    user: str
    uid: int
    run: str
    guest: str

    @classmethod
    def guest_of(cls, guest: Guest | GuestSpec) -> Self:
        return cls(user=guest.user, uid=guest.uid, run=str(guest.run or "unknown"), guest=guest.name)


class GuestLogs:
    """The logs below one directory, which is made when first written to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._root = Path(settings.dir)

    def say(self, of: LogOf, sentence: str, *, now_s: float | None = None) -> None:
        """Add a line to the spawn log; ``sentence`` stays one line, without terminal codes."""
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sentence[:TEXT_MAX])
        moment = datetime.fromtimestamp(time.time() if now_s is None else now_s, tz=UTC)
        self._append(of, "spawn.log", f"{moment.isoformat(timespec='milliseconds')} {text}\n")

    def mark(self, of: LogOf, phase: Phase, *, now_s: float | None = None) -> None:
        """Note when a phase was seen. A second time of the same phase changes nothing."""
        if phase not in self.timings(of):
            self._append(of, "timings", f"{phase} {time.time() if now_s is None else now_s:.3f}\n")

    def timings(self, of: LogOf) -> Mapping[Phase, float]:
        """Return the time of day of each phase that was seen, in the order of ``PHASES``."""
        found: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.path(of, "timings").read_text(errors="replace").splitlines():
                if match := _TIMING.fullmatch(line):  # a line torn by a power cut is none
                    found.setdefault(match[1], float(match[2]))
        return {phase: found[phase] for phase in PHASES if phase in found}

    def keep(self, of: LogOf, what: Tail, source: Path | bytes) -> None:
        """Keep the end of a log. A file that is absent is kept as nothing; a later, longer one takes its place."""
        limit = self._settings.file_bytes_max
        if isinstance(source, bytes):
            text = source[-limit:]
        else:
            try:
                # Not through a link: where the guest's user may write, a link could lead to anybody's file.
                with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                    text = _end_of(file, limit)
            except FileNotFoundError:
                return
        path = self.path(of, f"{what}.log")
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with self._opened(of, draft, os.O_TRUNC) as file:
            file.write(text)
        draft.replace(path)

    def prune(self, *, now_s: float | None = None) -> tuple[Path, ...]:
        """Remove what the settings say, oldest first, and return it."""
        settings = self._settings
        rule = Metrics(root=settings.dir, keep_days=settings.keep_days, user_bytes_max=settings.user_bytes_max)
        return prune(rule, now_s=now_s)

    def path(self, of: LogOf, name: str) -> Path:
        """Return where a log of this guest is, whether it is there or not."""
        for word in (of.user, of.run, of.guest):
            if not _COMPONENT.fullmatch(word):
                raise CarrelError(f"guest {of.guest!r} of {of.user!r}, run {of.run!r}: no name for a log's file")
        return self._root / of.user / of.run / f"{of.guest}.{name}"

    def _append(self, of: LogOf, name: str, line: str) -> None:
        with self._opened(of, self.path(of, name), os.O_APPEND) as file:
            file.write(line.encode())  # one write, so that lines of two processes do not mix

    def _opened(self, of: LogOf, path: Path, flags: int) -> BinaryIO:
        root = os.geteuid() == 0
        for _ in range(_TRIES):
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o400 if root else 0o600
                )
                if root and of.uid >= 0:
                    os.fchown(descriptor, of.uid, -1)
                return os.fdopen(descriptor, "wb")
        raise CarrelError(f"{path}: removed each time that it was made; is something else pruning {self._root}?")


class GuestLog:
    """The logs of one guest, for a daemon that follows it: what cannot be written costs no guest."""

    def __init__(self, logs: GuestLogs, of: LogOf) -> None:
        self._logs = logs
        self._of = of
        self._marked: set[Phase] = set()

    def kept_on(self, host: str) -> str:
        """Return where they are kept, as the end of a sentence; empty for a user of whom none are."""
        try:
            return f"; its logs are in {self._logs.path(self._of, 'timings').parent} on {host}"
        except CarrelError:
            return ""

    def say(self, sentence: str) -> None:
        self._try(lambda: self._logs.say(self._of, sentence))

    def mark(self, phase: Phase, *, now_s: float | None = None) -> None:
        """Note a phase; cheap where it was noted before."""
        if phase not in self._marked:
            self._marked.add(phase)
            self._try(lambda: self._logs.mark(self._of, phase, now_s=now_s))

    def keep(self, what: Tail, source: Path) -> None:
        self._try(lambda: self._logs.keep(self._of, what, source))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, CarrelError) as error:
            _LOG.warning("a log of guest %s is not written: %s", self._of.guest, error)


async def keep_pruned(settings: Settings) -> None:
    """Remove logs of guests that ended long ago, until cancelled."""
    logs = GuestLogs(settings)
    while True:
        try:
            await asyncio.to_thread(logs.prune)
        except (OSError, CarrelError) as error:
            _LOG.warning("old logs of guests stay for now: %s", error)
        await asyncio.sleep(PRUNE_PERIOD_S)


def _end_of(file: BinaryIO, limit: int) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - limit))
    return file.read(limit)
