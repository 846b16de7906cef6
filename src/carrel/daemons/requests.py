"""From a message on carreld's socket to the nouns that the decisions take.

Anybody on the node may connect and say anything, and a step and a task become parts of paths that root makes and
removes: what Slurm itself could not have said is refused here, before anything is done with it.
"""

import math
import re

from carrel import wire
from carrel.errors import UsageError
from carrel.model.guest import GuestRequest
from carrel.model.task import Task

NUMBER_MAX = 2**32 - 1
"""Slurm's job ids, tasks and CPUs are 32 bits."""
BOOT_TIMEOUT_MAX_S = 86400.0

_STEP = re.compile(r"batch|interactive|[0-9]{1,10}")
_NUMBER = re.compile(r"[0-9]{1,10}")


def guest_request(message: wire.Message) -> GuestRequest:
    """Return what a job or a step asked for.

    Raises:
        UsageError: a value is not one of those that exist; the plug-in checks first, but anybody may connect.
    """
    per, clone = message.get("per"), message.get("clone")
    if per not in {"", "job", "task", "node"}:
        raise UsageError(f"--guest-per={per}: must be job, task or node")
    if clone not in {"", "auto", "instant", "linked", "full"}:
        raise UsageError(f"--guest-clone={clone}: must be instant, linked, full or auto")
    timeout = message.get("boot_timeout_s")
    return GuestRequest(
        image=_text(message.get("image")),
        per=per or None,  # type: ignore[arg-type]  # checked above
        clone=clone or None,  # type: ignore[arg-type]  # checked above
        driver=_text(message.get("driver")),
        mounts=tuple(_text(mount) for mount in message.all("mount") if mount),
        root=message.get("root") == "yes",
        boot_timeout_s=_seconds(timeout) if timeout else None,
    )


def task(message: wire.Message) -> Task:
    """Return the task at the door.

    Raises:
        UsageError: the step is none of Slurm's, or a number is none.
    """
    step = message.get("step", "0")
    if not _STEP.fullmatch(step):
        raise UsageError(f"step={step!a}: must be batch, interactive or a step's number")
    return Task(
        step=step,
        task=number(message, "task"),
        ntasks=number(message, "ntasks", 1),
        cpus_per_task=number(message, "cpus_per_task"),
        cwd=_text(message.get("cwd", "/")),
    )


def number(message: wire.Message, key: str, default: int = 0) -> int:
    """Return a whole number of a message.

    Raises:
        UsageError: it is none, or larger than any of Slurm's.
    """
    text = message.get(key)
    if not text:
        return default
    if not _NUMBER.fullmatch(text) or int(text) > NUMBER_MAX:
        raise UsageError(f"{key}={text[:20]!a}: must be a whole number, at most {NUMBER_MAX}")
    return int(text)


def _text(value: str) -> str:
    """Return what can be written as JSON: bytes that are not UTF-8 are spelt out, and name no file."""
    return value.encode(errors="backslashreplace").decode()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= BOOT_TIMEOUT_MAX_S:
        raise UsageError(f"--guest-boot-timeout={text}: must be seconds above 0, at most {BOOT_TIMEOUT_MAX_S:g}")
    return seconds
