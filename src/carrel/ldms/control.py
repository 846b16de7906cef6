"""Starting, telling and ending a site's real ``ldmsd``.

A sampler outlives the one who started it: it is found again by its record, and ended by a process number that cannot be
mistaken. Nothing of LDMS is bundled or linked: it is whatever the site has on its PATH.
"""

import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from carrel import process
from carrel.config import Ldms
from carrel.errors import CarrelError, UnreachableError
from carrel.ldms import plan
from carrel.process import Pid

CONTROLLER_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.02


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A sampler that was started."""

    place: plan.Place
    pid: Pid
    period_s: float


def program(name: str, settings: Ldms) -> str:
    """Return the path of one of LDMS's programs.

    Raises:
        CarrelError: it is not on PATH.
    """
    found = shutil.which(name, path=_environment(settings).get("PATH"))
    if found is None:
        raise CarrelError(f"{name} is not on PATH, and metrics.sampler = ldms needs it; is LDMS installed here?")
    return found


def start(place: plan.Place, settings: Ldms, directory: Path, *, period_s: float) -> Record:
    """Start a job's sampler, and remember it.

    Raises:
        CarrelError: ldmsd is missing.
        OSError: it cannot be written or started.
    """
    words = [program("ldmsd", settings), "-v", "ERROR"]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = directory / str(place.job.key)
    conf = base.with_name(f"{base.name}.conf")
    conf.write_text(plan.sampler(place, settings, period_s=period_s))
    words += ["-c", str(conf), "-l", f"{base}.log", "-r", f"{base}.pid"]
    # It outlives us, so there is no object that could wait for it; ``stop`` takes leave of it by number.
    quiet = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    number = os.posix_spawn(words[0], words, _environment(settings), file_actions=quiet, setsid=True)
    state = process.process_state(number)
    record = Record(place=place, pid=Pid(number, state[1] if state else 0), period_s=period_s)
    draft = base.with_name(f".{base.name}.draft")
    draft.write_bytes(msgspec.json.encode(record))
    draft.rename(base.with_name(f"{base.name}.json"))
    return record


def records(directory: Path) -> list[Record]:
    """Return all samplers that were started on this node, also those that have died."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Record))
        except (OSError, msgspec.MsgspecError):
            path.unlink(missing_ok=True)  # half of one is none
    return found


def stop(record: Record, directory: Path) -> None:
    """End a sampler and forget it. A second call does nothing."""
    record.pid.kill(signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while record.pid.alive and time.monotonic() < deadline_s:
        _reap(record.pid.number)
        time.sleep(_LOOK_EVERY_S)
    record.pid.kill(signal.SIGKILL)
    _reap(record.pid.number)
    for end in ("conf", "pid", "log", "json"):
        (directory / f"{record.place.job.key}.{end}").unlink(missing_ok=True)


def _reap(pid: int) -> None:
    """Take leave of a child of ours; a sampler that an earlier carreld started is init's."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def free_port(taken: Sequence[int], settings: Ldms) -> int:
    """Return a port of the node's row that no sampler has.

    Raises:
        CarrelError: all are taken.
    """
    for port in range(settings.port_first, settings.port_first + settings.port_count):
        if port not in taken:
            return port
    raise CarrelError(f"all {settings.port_count} ports for LDMS samplers are taken; raise ldms.port_count")


def tell(host: str, port: int, commands: Sequence[str], settings: Ldms) -> str:
    """Give commands to a running ldmsd and return what it says. What was done before is refused, and that is fine.

    Raises:
        UnreachableError: it does not answer.
    """
    words = [program("ldmsd_controller", settings), "-h", host, "-x", "sock", "-p", str(port)]
    if settings.auth != "none":
        words += ["-a", settings.auth, *(word for option in settings.auth_options for word in ("-A", option))]
    try:
        return process.run(words, stdin="\n".join(commands) + "\n", timeout_s=CONTROLLER_TIMEOUT_S, env=_more(settings))
    except CarrelError as error:
        raise UnreachableError(f"ldmsd at {host}:{port} does not answer: {error}") from error


def _more(settings: Ldms) -> Mapping[str, str]:
    return settings.environment


def _environment(settings: Ldms) -> dict[str, str]:
    return {**os.environ, **settings.environment}
