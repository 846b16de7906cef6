"""A terminal with a patient typist: what a person does to an interactive job, and what they see.

It waits for what shall appear, never for a time, so that a slow machine only makes it slower.
"""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

READ_BYTES = 65536
TIMEOUT_S = 90.0


class Terminal:
    r"""A command on a terminal of its own.

    ::

        with Terminal(["srun", "--pty", "bash", "--norc"], rows=24, columns=80) as screen:
            screen.wait_for(r"\$ $")
            screen.type("exit 7\n")
            assert screen.status() == 7
    """

    def __init__(
        self, words: Sequence[str], *, rows: int, columns: int, env: Mapping[str, str] | None = None, cwd: str = "/"
    ) -> None:
        """Start the command as the terminal's session leader, as a login shell would be."""
        self._master, slave = pty.openpty()
        self._all = ""
        self._seen = 0
        self.resize(rows, columns)
        self._child = subprocess.Popen(
            words,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  # two system calls; nothing else makes it the controlling one
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        """Nothing more: the command runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up, as a closed window does, and leave no process."""
        os.close(self._master)
        try:
            self._child.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @property
    def screen(self) -> str:
        """All that was ever shown."""
        return self._all

    @property
    def is_raw(self) -> bool:
        """Whether keys go to the command as they are; ``srun --pty`` wants that once its task is launched."""
        flags = termios.tcgetattr(self._master)[3]
        return not flags & termios.ICANON

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the kernel tells whoever runs in its foreground."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        r"""Press keys: ``\n`` is Enter, ``\x03`` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, timeout_s: float = TIMEOUT_S) -> str:
        """Return what was shown up to the end of ``pattern``, after what an earlier call has returned.

        Raises:
            AssertionError: it did not appear, or the command ended first; says what did appear.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = re.search(pattern, self._all[self._seen :])
            if found:
                shown = self._all[self._seen : self._seen + found.end()]
                self._seen += found.end()
                return shown
            more = self._read(deadline)
            assert more, f"{pattern!r} did not appear in {timeout_s:g} s, but: {self._all[self._seen :]!r}"

    def status(self) -> int:
        """Return the command's exit status (negative: the signal), once everything it showed is read."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline):
            pass
        return self._child.wait(max(0.0, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Take what is shown next; false: nothing more came."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            part = os.read(self._master, READ_BYTES)
        except OSError:  # EIO: nobody has the terminal open any more
            return False
        self._all += part.decode(errors="replace")
        return bool(part)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
