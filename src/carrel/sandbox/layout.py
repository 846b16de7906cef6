"""Where everything of a sandbox is: one directory, deleted with it."""

import os
import stat
import sys
from pathlib import Path

import msgspec

from carrel.errors import RefusedError, UsageError

_SOCKET_MAX_BYTES = 107
_DEEPEST_SOCKET = "spool/c50/c50_1234567.4294967291"
_DEEPEST_GUEST_SOCKET = "nodes/c50/guests/1234567.1700000000.0.1234567.12345/control.sock"


class Layout(msgspec.Struct, frozen=True):
    """Paths below ``root``."""

    root: Path

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def libexec(self) -> Path:
        return self.root / "libexec"

    @property
    def database(self) -> Path:
        return self.root / "db"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def carrel_conf(self) -> Path:
        return self.etc / "carrel.toml"

    @property
    def munge_socket(self) -> Path:
        return self.run / "munge.sock"

    @property
    def munge_key(self) -> Path:
        return self.etc / "munge.key"

    @property
    def harness_socket(self) -> Path:
        return self.run / "harness.sock"

    @property
    def facts(self) -> Path:
        """Return what the harness wrote down about itself, for when it is dead."""
        return self.run / "facts.json"

    @property
    def controller_socket(self) -> Path:
        return self.run / "carrelctld.sock"

    @property
    def bank(self) -> Path:
        """Return the directory of the ledger."""
        return self.root / "bank"

    @property
    def submit_socket(self) -> Path:
        return self.run / "submit.sock"

    @property
    def database_socket(self) -> Path:
        return self.database / "my.sock"

    def node(self, name: str) -> Path:
        """Return carreld's directory of a node."""
        return self.root / "nodes" / name

    def node_socket(self, name: str) -> Path:
        return self.node(name) / "carreld.sock"

    def tmp(self, name: str) -> Path:
        """Return a node's TmpFS: PMIx of two nodes must not meet in one /tmp."""
        return self.root / "tmp" / name

    def environment(self) -> dict[str, str]:
        """Return the variables by which a command finds this cluster and our own commands."""
        ours = str(Path(sys.executable).parent)
        rest = [part for part in os.environ.get("PATH", os.defpath).split(":") if part and part != ours]
        return {
            "SLURM_CONF": str(self.slurm_conf),
            "CARREL_CONFIG": str(self.carrel_conf),
            "CARREL_SANDBOX": str(self.root),
            "PATH": ":".join([ours, *rest]),
        }

    def check(self, *, guests: bool) -> None:
        """Refuse a place that cannot be a sandbox, or that holds something already.

        Raises:
            UsageError: the path is so long that unix sockets below it cannot be.
            RefusedError: it is not an empty directory, or another user's: they could replace what root starts.
        """
        deepest = _DEEPEST_GUEST_SOCKET if guests else _DEEPEST_SOCKET
        spare = _SOCKET_MAX_BYTES - len(deepest) - 1
        self._refuse_what_is_taken()
        if len(os.fsencode(self.root)) > spare:
            raise UsageError(f"--dir {self.root}: longer than {spare} bytes, no room for unix sockets below it")

    def _refuse_what_is_taken(self) -> None:
        try:
            found = self.root.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode) or any(self.root.iterdir()):
            raise RefusedError(
                f"{self.root}: not an empty directory; is a sandbox there? see: carrel sandbox down --dir {self.root}"
            )
        if found.st_uid != os.getuid():
            raise RefusedError(f"{self.root}: belongs to uid {found.st_uid}, not to you; choose another --dir")

    def make(self, nodes: tuple[str, ...]) -> None:
        """Create the directories; modes allow any user of the machine to be a user of the cluster."""
        self.root.mkdir(exist_ok=True)
        self.root.chmod(0o755)
        names = ["etc", "run", "log", "state", "libexec", "maps", "nodes", "spool", "tmp"]
        for path in [self.root / name for name in names] + [self.root / "spool" / node for node in nodes]:
            path.mkdir(mode=0o755)
            path.chmod(0o755)
        for node in nodes:
            self.node(node).mkdir(mode=0o755)
            self.tmp(node).mkdir()
            self.tmp(node).chmod(0o1777)
