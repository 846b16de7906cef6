"""Who a job runs as, and what that person may reach on this host."""

import asyncio
import grp
import os
import pwd
import subprocess  # a check as another user, which carrel.process does not offer
from collections.abc import Sequence

from carrel.errors import NodeFaultError, RefusedError
from carrel.model.guest import Mount
from carrel.model.task import Person

CHECK_TIMEOUT_S = 10.0

# As the user: `stat` follows the path with the user's own rights; a directory must also let them in.
_REACH = 'for p; do if ! e=$(stat -L -- "$p" 2>&1 >/dev/null); then printf "%s\\0%s\\0" "$p" "$e"; \
elif [ -d "$p" ] && [ ! -x "$p" ]; then printf "%s\\0%s\\0" "$p" ": Permission denied"; fi; done'


async def person(uid: int) -> Person:
    """Return what the host's user database says of a uid.

    Raises:
        NodeFaultError: it does not know the uid; the job could not run here without a guest either.
    """
    return await asyncio.to_thread(_person, uid)


def _person(uid: int) -> Person:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError as error:
        raise NodeFaultError(f"this node knows no user with uid {uid}; see: getent passwd {uid}") from error
    groups = [(gid, _group_name(gid)) for gid in os.getgrouplist(entry.pw_name, entry.pw_gid)]
    return Person(
        user=entry.pw_name,
        uid=uid,
        gid=entry.pw_gid,
        groups=tuple(groups),
        home=entry.pw_dir,
        shell=entry.pw_shell or "/bin/sh",
    )


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


async def reachable(mounts: Sequence[Mount], who: Person, *, asked: Sequence[str]) -> tuple[Mount, ...]:
    """Return the mounts that ``who`` can reach. A default one that they cannot is left out without a word.

    Args:
        mounts: All that the guest would get.
        who: Checked with this user's own rights, not with root's.
        asked: Sources that the user named; one of them out of reach refuses the request.

    Raises:
        RefusedError: the first source out of reach that the user named.
    """
    if not mounts:
        return ()
    reasons = await asyncio.to_thread(_out_of_reach, [mount.source for mount in mounts], who)
    for mount in mounts:
        if mount.source in asked and mount.source in reasons:
            raise RefusedError(f"--guest-mount={mount.source}: {reasons[mount.source]}")
    return tuple(mount for mount in mounts if mount.source not in reasons)


def _out_of_reach(sources: list[str], who: Person) -> dict[str, str]:
    done = subprocess.run(  # a constant script; the paths are its arguments
        ["/bin/sh", "-c", _REACH, "sh", *sources],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        cwd="/",
        user=who.uid,
        group=who.gid,
        extra_groups=[gid for gid, _ in who.groups],
        timeout=CHECK_TIMEOUT_S,
        check=True,
    )
    fields = done.stdout.split("\0")[:-1]
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return {path: why.rpartition(": ")[2] for path, why in pairs}
