"""What this machine's own apt knows: its mirrors, its proxies, its packages. Nothing here names a mirror."""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from carrel import process
from carrel.errors import CarrelError, RefusedError

_Found = TypeVar("_Found")
_TARGET_FIELDS = "$(CREATED_BY)|$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"


def package_of(meta_package: str) -> str:
    """Return ``name=version`` of the versioned package that a meta package stands for.

    Raises:
        CarrelError: apt knows none.
    """

    def look() -> str | None:
        try:
            shown = process.run(["apt-cache", "show", "--no-all-versions", meta_package])
        except process.CommandError:
            return None
        found = re.search(r"^Depends: .*?(linux-image-[0-9][^ ,]*) \(= ([^)]+)\)", shown, re.MULTILINE)
        return f"{found[1]}={found[2]}" if found else None

    found = _with_lists(look)
    if found is None:
        raise CarrelError(f"apt knows no package {meta_package}; are its lists current? see: apt-get update")
    return found


def sources(suite: str) -> list[str]:
    """Return source lines for a Debian suite from this machine's mirrors, whichever suite the machine runs.

    Raises:
        RefusedError: it uses no mirror of Debian.
    """
    found = _with_lists(
        lambda: mirrors(process.run(["apt-get", "indextargets", "--format", _TARGET_FIELDS]), suite=suite)
    )
    if not found:
        raise RefusedError("apt on this machine has no source of Debian; add one, then: apt-get update")
    return found


def mirrors(targets: str, *, suite: str) -> list[str]:
    """Turn what ``apt-get indextargets`` says into source lines for another suite of the same mirrors.

    >>> mirrors("Packages|Debian|trixie-security|http://m/security|trixie-security|main", suite="bookworm")
    ['deb http://m/security bookworm-security main']

    Sid is mended in place, and has nothing beside it:

    >>> mirrors("Packages|Debian|trixie-security|http://m/security|trixie-security|main", suite="sid")
    []
    """
    lines = []
    for target in targets.splitlines():
        created_by, origin, codename, uri, release, component = target.split("|")
        if created_by != "Packages" or origin != "Debian" or component != "main":
            continue
        if "backports" in release or "proposed" in release or (suite == "sid" and "-" in release):
            continue
        line = f"deb {uri.rstrip('/')} {release.replace(codename.split('-')[0], suite)} main"
        if line not in lines:
            lines.append(line)
    return lines


def proxies() -> str:
    """Return the proxies that apt uses, as lines of its configuration."""
    dump = process.run(["apt-config", "dump"])
    return "".join(f"{line}\n" for line in dump.splitlines() if re.match(r"Acquire::(https?|ftp)::[^ ]*Proxy", line))


def _with_lists(look: Callable[[], _Found]) -> _Found:
    """A bare machine has no package lists, and root may fetch them."""
    found = look()
    if found or os.geteuid() != 0:
        return found
    process.run(["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update"], timeout_s=600)
    return look()
