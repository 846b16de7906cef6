"""Settings of the vsphere driver, ``[drivers.vsphere]``, and the password for vCenter."""

import os
import re
import stat
from pathlib import Path

import msgspec

from carrel.errors import NodeFaultError

PASSWORD_VARIABLE = "CARREL_VCENTER_PASSWORD"  # noqa: S105  # the name of a variable
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[drivers.vsphere]``."""

    server: str = ""
    """Host name of vCenter, as it stands in its certificate."""
    port: int = 443
    user: str = ""
    password_file: str = ""
    """A file that its owner alone can read; empty: ``CARREL_VCENTER_PASSWORD`` of the environment."""
    ca_file: str = ""
    """Certificates (PEM) that vCenter's own must lead to; empty: those that this machine trusts."""
    owner: str = ""
    """Whose guests these are: the Slurm cluster's name. Two clusters at one vCenter must differ here."""
    datacenters: tuple[str, ...] = ()
    """Where guests may be; a template without ``datacenter`` is for the first."""
    folder: str = ""
    """Where guests are made, below ``vm`` of each datacenter; only there does vCenter's user need rights to change."""
    template_file: str = "/etc/carrel/guests.toml"
    request_timeout_s: float = 30.0
    """How long vCenter may take to answer one question. A clone is many."""
    connections: int = 4
    poll_period_s: float = 0.5
    """How often vCenter is asked whether a task of it is done, or a guest has its address."""


def refuse_incomplete(settings: Settings) -> None:
    """Refuse settings that lack what has no default.

    Raises:
        NodeFaultError: the sentence names the setting.
    """
    for key in ("server", "user", "owner", "datacenters", "folder"):
        if not getattr(settings, key):
            raise NodeFaultError(f"drivers.vsphere.{key} is not set; see docs/how-to/vsphere.md")
    if not _OWNER.fullmatch(settings.owner):
        raise NodeFaultError(
            f"drivers.vsphere.owner = {settings.owner!r}: use letters, digits, '_' and '-', at most 31 of them"
        )


def password(settings: Settings) -> str:
    """Return the password for vCenter.

    Raises:
        NodeFaultError: there is none, or others can read the file.
    """
    if not settings.password_file:
        if word := os.environ.get(PASSWORD_VARIABLE, ""):
            return word
        raise NodeFaultError(
            f"no password for {settings.user} at {settings.server}: set drivers.vsphere.password_file, "
            f"or {PASSWORD_VARIABLE} in the environment"
        )
    return _read(Path(settings.password_file))


def _read(path: Path) -> str:
    try:
        # The file that was looked at is the one that is read.
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            text = file.read().decode(errors="replace").rstrip("\r\n")
    except OSError as error:
        raise NodeFaultError(f"drivers.vsphere.password_file = {path}: {error.strerror}") from error
    if facts.st_uid not in {0, os.geteuid()}:
        raise NodeFaultError(f"drivers.vsphere.password_file = {path} belongs to uid {facts.st_uid}; chown it to root")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        mode = stat.S_IMODE(facts.st_mode)
        raise NodeFaultError(f"drivers.vsphere.password_file = {path} has mode {mode:04o}; run: chmod 600 {path}")
    if not text:
        raise NodeFaultError(f"drivers.vsphere.password_file = {path} is empty")
    return text
