"""From a message on carreld's socket to the nouns that the decisions take."""

import math

from carrel import wire
from carrel.errors import UsageError
from carrel.model.guest import GuestRequest
from carrel.model.task import Task


def guest_request(message: wire.Message) -> GuestRequest:
    """Return what a job or a step asked for.

    Raises:
        UsageError: a value is not one of those that exist; the plug-in checks first, but anybody may connect.
    """
    per, clone = message.get("per"), message.get("clone")
    if per not in {"", "job", "task"}:
        raise UsageError(f"--guest-per={per}: must be job or task")
    if clone not in {"", "full", "linked"}:
        raise UsageError(f"--guest-clone={clone}: must be full or linked")
    timeout = message.get("boot_timeout_s")
    return GuestRequest(
        image=message.get("image"),
        per=per or None,  # type: ignore[arg-type]  # checked above
        clone=clone or None,  # type: ignore[arg-type]  # checked above
        driver=message.get("driver"),
        mounts=tuple(mount for mount in message.all("mount") if mount),
        root=message.get("root") == "yes",
        boot_timeout_s=_seconds(timeout) if timeout else None,
    )


def task(message: wire.Message) -> Task:
    """Return the task at the door.

    Raises:
        UsageError: a number is none.
    """
    return Task(
        step=message.get("step", "0"),
        task=number(message, "task"),
        ntasks=number(message, "ntasks", 1),
        cpus_per_task=number(message, "cpus_per_task"),
        cwd=message.get("cwd", "/"),
    )


def number(message: wire.Message, key: str, default: int = 0) -> int:
    """Return a whole number of a message.

    Raises:
        UsageError: it is none.
    """
    text = message.get(key)
    if not text:
        return default
    if not text.isdecimal():
        raise UsageError(f"{key}={text}: must be a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0 or math.isinf(seconds):
        raise UsageError(f"--guest-boot-timeout={text}: must be a number of seconds above 0")
    return seconds
