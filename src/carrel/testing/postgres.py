"""Fixtures: a private, real PostgreSQL in a temporary directory, and an empty schema of it for each test.

It listens on a unix socket alone. As root it runs as the user ``postgres`` of the Debian package, since it refuses
to be root. Where the server is not installed, a test is skipped with the reason.
"""

import os
import pwd
import shutil
import signal
import subprocess  # a server that outlives the call
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from carrel.process import run

_USER = "postgres"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.05
_DIED_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_numbers = count(1)


def programs() -> Path | None:
    """Return the directory of the newest installed server's programs; Debian keeps them off the PATH."""
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if installed:
        return max(installed, key=lambda path: float(path.parent.name))
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


class Postgres:
    """A server in a directory of its own."""

    def __init__(self, where: Path, bin_dir: Path) -> None:
        """Create its files and start it (about two seconds)."""
        self._bin = bin_dir
        self._where = where
        self._base = f"host={where} user=carrel dbname=postgres"
        self._as: list[str] = []
        if os.getuid() == 0:
            user = pwd.getpwnam(_USER)
            os.chown(where, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data = str(where / "data")
        run(
            [*self._as, str(bin_dir / "initdb"), "-D", data, "-U", "carrel", "-A", "trust", "-E", "UTF8", "--no-locale"]
        )
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {"listen_addresses": "", "unix_socket_directories": str(self._where), "max_connections": "60"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [
            *self._as,
            *_DIED_WITH_PARENT,
            str(self._bin / "postgres"),
            "-D",
            str(self._where / "data"),
            *options,
        ]
        with (self._where / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        import psycopg  # noqa: PLC0415  # an extra: the plug-in of pytest loads without it

        # A bound on the wait for a socket that only the server makes; an early end of the server is heard at once.
        for _ in range(int(_START_TIMEOUT_S / _LOOK_EVERY_S)):
            with suppress(psycopg.OperationalError), psycopg.connect(self._base):
                return process
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY_S)
                break
        raise RuntimeError(f"postgres did not start: {(self._where / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End every process of the server at once, as a power cut does, and start it again."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = self._start()

    def down(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def schema(self) -> str:
        """Return a connection string for a new, empty schema."""
        import psycopg  # noqa: PLC0415  # an extra: the plug-in of pytest loads without it

        name = f"t{next(_numbers)}"
        with psycopg.connect(self._base, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self._base} options='-c search_path={name}'"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A real PostgreSQL, for the session."""
    pytest.importorskip("psycopg", reason="not installed: psycopg (carrel's extra postgresql)")
    bin_dir = programs()
    if bin_dir is None:
        pytest.skip("not installed: postgresql")
    where = Path(tempfile.mkdtemp(prefix="carrel-pg."))
    try:
        server = Postgres(where, bin_dir)
        try:
            yield server
        finally:
            server.down()
    finally:
        shutil.rmtree(where)


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """Connection string of an empty schema in a real PostgreSQL."""
    return postgres_server.schema()
