"""``--carrel-report``: what a job used, at the end of its output. Run by carreld when the samples are all there.

It becomes the job's user before it looks at any file, so the worst that a strange output file can do is what its owner
could. The job has ended by then: nothing waits for this, and whatever goes wrong costs the report alone.
"""

import argparse
import os
import pwd
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from carrel import config
from carrel.cli import output
from carrel.cli.report import lines
from carrel.config import Guests
from carrel.core import report
from carrel.errors import CarrelError
from carrel.sampling import reading

OTHERS_TIMEOUT_S = 30.0
"""How long the samples of the job's other nodes are waited for, where they come to the same directory."""
_POLL_S = 0.2
_PRIORITY = 19


def text(directory: Path, guests: Guests) -> str:
    """Return what is appended.

    Raises:
        CarrelError: there are no samples, or they are damaged.
    """
    return "".join(f"{line}\n" for line in _framed(directory, guests))


def _framed(directory: Path, guests: Guests) -> Iterator[str]:
    made = report.report(reading.summary(directory), guests)
    yield ""
    yield "---- what this job used (--carrel-report) ----"
    for line in lines(made):
        yield output.printable(line)
    yield ""
    yield f"more: carrel job plot {made.job_id}"


def append(path: Path, words: str) -> None:
    """Append to a file that is there. A device, a pipe, or a file that its owner has removed, is left alone.

    Raises:
        OSError: it cannot be written.
    """
    # Not created: a job that was started with --output=/dev/null, or moved its output away, wants none here.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(descriptor, "wb", closefd=False) as file:  # a descriptor has no path
                file.write(words.encode(errors="replace"))
    finally:
        os.close(descriptor)


def _become(uid: int) -> None:
    if os.geteuid() != 0 or uid == 0:
        return
    try:
        who = pwd.getpwuid(uid)
    except KeyError as error:
        raise CarrelError(f"there is no uid {uid} on this node") from error
    # Output files are often in directories that only a project's group may enter.
    os.initgroups(who.pw_name, who.pw_gid)
    os.setgid(who.pw_gid)
    os.setuid(uid)


def _wait_for_others(directory: Path) -> None:
    deadline_s = time.monotonic() + OTHERS_TIMEOUT_S
    while any(directory.glob("samples.*.seg")) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)  # nodes share nothing but the file system


def main() -> None:
    """Print one report."""
    parser = argparse.ArgumentParser(description="Append a job's report to its output.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--uid", type=int, required=True)
    arguments = parser.parse_args()
    os.nice(_PRIORITY)
    try:
        guests = config.load().guests
        _become(arguments.uid)
        _wait_for_others(arguments.directory)
        append(arguments.output, text(arguments.directory, guests))
    except FileNotFoundError:
        return
    except (CarrelError, OSError) as error:
        sys.exit(f"{arguments.output}: {error}")


if __name__ == "__main__":
    main()
