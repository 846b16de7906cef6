"""Which host directories a guest sees: those the user named, and by default their home and working directory."""

import posixpath
from collections.abc import Sequence
from typing import Literal

from carrel.errors import UsageError
from carrel.model.guest import Mount

_SYSTEM_TREES = (
    *("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/proc", "/sys", "/dev", "/run", "/boot"),
)
"""Neither these nor anything below is mounted unasked: the guest has its own."""

_SYSTEM_DIRECTORIES = frozenset(
    {
        *("/", "/opt", "/tmp", "/var"),  # noqa: S108  # names to compare with, no file is opened
        *(f"/var/{name}" for name in ("cache", "lib", "local", "lock", "log", "mail", "opt", "run", "spool", "tmp")),
    }
)
"""These are not mounted unasked, but what a user has below them is."""

_KERNEL_TREES = ("/proc", "/sys", "/dev")


def parse_mount(text: str) -> Mount:
    """Return what ``SRC[:DST][:ro]`` asks for.

    Raises:
        UsageError: it is malformed; the sentence quotes the option.

    >>> parse_mount("/scratch/me:/data:ro")
    Mount(source='/scratch/me', target='/data', read_only=True)
    """
    source, *rest = text.split(":")
    read_only = len(rest) > 0 and not rest[-1].startswith("/")
    if read_only:
        flag = rest.pop()
        if flag != "ro":
            raise _malformed(text, f"'{flag}' is neither 'ro' nor an absolute path")
    if len(rest) > 1:
        raise _malformed(text, "too many parts, write SRC[:DST][:ro]")
    target = rest[0] if rest else source
    for name, path in (("source", source), ("target", target)):
        if not path.startswith("/"):
            raise _malformed(text, f"the {name} must be an absolute path")
        if ".." in path.split("/"):
            raise _malformed(text, f"the {name} must not contain '..'")
    mount = Mount(source=_clean(source), target=_clean(target), read_only=read_only)
    if mount.target == "/":
        raise _malformed(text, "the guest's root cannot be replaced, name a directory below it")
    if any(_within(mount.target, tree) for tree in _KERNEL_TREES):
        raise _malformed(text, f"{mount.target} belongs to the guest's kernel, choose another target")
    return mount


def default_mounts(kinds: Sequence[Literal["home", "workdir"]], *, home: str, cwd: str) -> tuple[Mount, ...]:
    """Return what is mounted unasked: each at its own path, none twice, no directory of the system.

    Whether a directory exists is for the caller to find out.

    >>> [mount.target for mount in default_mounts(("home", "workdir"), home="/home/ada", cwd="/home/ada/run")]
    ['/home/ada']
    """
    named = {"home": home, "workdir": cwd}
    paths = {_clean(named[kind]) for kind in kinds if named[kind].startswith("/")}
    fit = sorted(path for path in paths if not _is_system(path))
    return tuple(
        Mount(source=path, target=path)
        for path in fit
        if not any(path != other and _within(path, other) for other in fit)
    )


def merge_mounts(asked: Sequence[Mount], defaults: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return all mounts, parents before children; what was asked for wins over a default at or above its target.

    Raises:
        UsageError: two were asked for at one target.
    """
    by_target: dict[str, Mount] = {}
    for mount in asked:
        other = by_target.setdefault(mount.target, mount)
        if other != mount:
            raise UsageError(
                f"--guest-mount: both {other.source} and {mount.source} go to {mount.target}; give one another target"
            )
    kept = [mount for mount in defaults if not any(_within(mount.target, target) for target in by_target)]
    return tuple(sorted([*by_target.values(), *kept], key=lambda mount: mount.target))


def _malformed(text: str, why: str) -> UsageError:
    return UsageError(f"--guest-mount={text}: {why}")


def _clean(path: str) -> str:
    # POSIX keeps two leading slashes apart from one; Linux does not.
    return posixpath.normpath("/" + path.lstrip("/"))


def _within(path: str, tree: str) -> bool:
    return path == tree or path.startswith(tree.rstrip("/") + "/")


def _is_system(path: str) -> bool:
    return path in _SYSTEM_DIRECTORIES or any(_within(path, tree) for tree in _SYSTEM_TREES)
