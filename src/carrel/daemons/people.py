"""Who a job runs as, and what that person may reach on this host."""

import asyncio
import grp
import os
import pwd
from collections.abc import Sequence

from carrel import process
from carrel.errors import NodeFaultError, RefusedError
from carrel.model.guest import Mount
from carrel.model.task import Person

CHECK_TIMEOUT_S = 10.0
PATH = "/usr/bin:/bin"

# `stat` follows the path with the user's own rights; a directory must also let them in, a file be readable.
_REACH = """i=0
for path; do
    if ! why=$(stat -L -- "$path" 2>&1 >/dev/null); then printf "%s %s\\n" "$i" "$why"
    elif [ -d "$path" ]; then [ -x "$path" ] || printf "%s : Permission denied\\n" "$i"
    elif [ ! -f "$path" ]; then printf "%s : neither a directory nor a file\\n" "$i"
    elif [ ! -r "$path" ]; then printf "%s : Permission denied\\n" "$i"
    fi
    i=$((i + 1))
done"""


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


async def in_group(uid: int, name: str) -> bool:
    """Say whether the host's user database has a uid in a group; a group that does not exist has nobody."""
    return bool(name) and await asyncio.to_thread(_in_group, uid, name)


def _in_group(uid: int, name: str) -> bool:
    try:
        entry, group = pwd.getpwuid(uid), grp.getgrnam(name)
    except KeyError:
        return False
    return group.gr_gid in os.getgrouplist(entry.pw_name, entry.pw_gid)


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
    reasons = await _out_of_reach([mount.source for mount in mounts], who)
    for mount in mounts:
        if mount.source in asked and mount.source in reasons:
            raise RefusedError(f"--guest-mount={mount.source}: {reasons[mount.source]}")
    return tuple(mount for mount in mounts if mount.source not in reasons)


async def _out_of_reach(sources: list[str], who: Person) -> dict[str, str]:
    groups = ",".join(str(gid) for gid, _ in who.groups)
    # Nothing of carreld's own environment: for a moment this is the user's process, who may look into it.
    words = ["env", "-i", "--chdir=/", "LC_ALL=C", f"PATH={PATH}", "setpriv"]
    words += [f"--reuid={who.uid}", f"--regid={who.gid}"]
    words.append(f"--groups={groups}" if groups else "--clear-groups")
    command = [*words, "--", "/bin/sh", "-c", _REACH, "sh", *sources]
    try:
        said = await process.run_async(command, timeout_s=CHECK_TIMEOUT_S)
    except process.CommandError as error:
        # A file server that hangs, or a file system of the user's own that does so on purpose.
        raise RefusedError(
            f"cannot see within {CHECK_TIMEOUT_S:g} s whether {who.user} may read {', '.join(sources)}: {error.stderr}"
        ) from error
    lines = (line.partition(" ") for line in said.splitlines())
    return {sources[int(index)]: why.rpartition(": ")[2] for index, _, why in lines if index.isdecimal()}
