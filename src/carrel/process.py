"""The one way to start a command: a list, never a shell, with a bound on time; on failure, the line to paste.

And processes of others, named so that a later one of the same number is never taken for them.
"""

import contextlib
import glob
import os
import shlex
import signal
import subprocess  # the one place that may: everything else starts commands through this module
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from carrel.errors import CarrelError

_SBIN = ("/usr/sbin", "/sbin")


class CommandError(CarrelError):
    """A command failed. ``status`` is its exit status (negative: a signal), ``stderr`` what it said."""

    def __init__(self, command: Sequence[str], *, status: int, stderr: str) -> None:
        """Make the sentence: what failed, how, its last line, and how to run it again."""
        self.status = status
        self.stderr = stderr
        last = stderr.strip().splitlines()[-1:] or ["(it said nothing)"]
        super().__init__(f"{command[0]} exited with {status}: {last[0]}; to repeat: {shlex.join(command)}")


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> str:
    """Run ``command`` to its end and return its standard output.

    Args:
        command: The command and its arguments.
        timeout_s: The command is killed after this many seconds.
        env: Variables added to this process's environment.
        cwd: Directory to run it in.
        stdin: Text for its standard input; nothing by default.

    Raises:
        CommandError: it is missing, exited with a status other than 0, or ran out of time.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=_environment(env),
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandError(words, status=127, stderr=f"{error.filename}: not found; is it installed?") from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(words, status=-9, stderr=f"not done after {timeout_s:g} s") from error
    if done.returncode != 0:
        raise CommandError(words, status=done.returncode, stderr=done.stderr or done.stdout)
    return done.stdout


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Return this process's environment and more; an ordinary user's PATH lacks mke2fs and its like."""
    whole = {**os.environ, **(more or {})}
    have = whole.get("PATH") or os.defpath
    return {**whole, "PATH": os.pathsep.join([have, *(d for d in _SBIN if d not in have.split(os.pathsep))])}


async def run_async(
    command: Sequence[str | Path], *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None
) -> str:
    """Do what ``run`` does without blocking the loop."""
    import asyncio  # noqa: PLC0415  # a fifth of the time in which a short-lived process has begun

    words = [str(word) for word in command]
    try:
        child = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(env),
        )
    except FileNotFoundError as error:
        raise CommandError(words, status=127, stderr=f"{error.filename}: not found; is it installed?") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await child.communicate()
    except TimeoutError as error:
        raise CommandError(words, status=-9, stderr=f"not done after {timeout_s:g} s") from error
    finally:
        # Also when the caller was cancelled: nobody else would end the command.
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        text = (err or out).decode(errors="replace")
        raise CommandError(words, status=child.returncode or 0, stderr=text)
    return out.decode(errors="replace")


class Pid(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one of the same number."""

    number: int
    start: int
    """Field 22 of ``/proc/PID/stat``, in clock ticks since boot."""

    @property
    def alive(self) -> bool:
        state = process_state(self.number)
        return state is not None and state[0] != "Z" and state[1] == self.start

    def kill(self, signal_number: int) -> None:
        """Send a signal; nothing happens where the process is gone."""
        try:
            descriptor = os.pidfd_open(self.number)
        except OSError:
            return
        try:
            if self.alive:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal_number)
        finally:
            os.close(descriptor)


def process_state(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start time in ticks) of a process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # its name may hold any byte
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # a command's name may itself hold a parenthesis
    return fields[0], int(fields[19])


def children(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return the children of a process, of all its threads; of one that is gone, or goes meanwhile, none."""
    found: list[int] = []
    # Path.glob fails where a directory goes while it is looked through.
    for path in glob.iglob("task/*/children", root_dir=proc / str(pid)):  # noqa: PTH207  # see above
        with contextlib.suppress(OSError):
            found += map(int, (proc / str(pid) / path).read_text().split())
    return found
