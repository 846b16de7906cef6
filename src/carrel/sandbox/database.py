"""MariaDB and slurmdbd for one sandbox: a database in its directory, without a network and without a password.

The server runs as whoever starts the sandbox and knows its one user by the socket's peer.
"""

from carrel.process import run
from carrel.sandbox.children import Recipe, accepts, listens
from carrel.sandbox.slurmconf import Place

_INSTALL_TIMEOUT_S = 60.0
ACCOUNT = "demo"


def install(place: Place) -> None:
    """Create the database's files (about two seconds)."""
    where = place.layout.database
    where.mkdir(mode=0o755)
    run(
        [
            "mariadb-install-db",
            "--no-defaults",
            f"--user={place.user}",
            f"--datadir={where}/data",
            "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={place.user}",
            "--skip-test-db",
        ],
        timeout_s=_INSTALL_TIMEOUT_S,
    )


def server(place: Place) -> Recipe:
    layout = place.layout
    return Recipe(
        name="mariadbd",
        command=(
            "mariadbd",
            "--no-defaults",
            f"--user={place.user}",
            f"--datadir={layout.database}/data",
            f"--socket={layout.database_socket}",
            f"--pid-file={layout.database}/my.pid",
            "--skip-networking",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
        ),
        log=layout.log / "mariadbd.log",
        ready=listens(layout.database_socket),
    )


def create(place: Place) -> None:
    """Create the empty database that slurmdbd fills with its tables."""
    connect = ["mariadb", "--no-defaults", f"--socket={place.layout.database_socket}", f"--user={place.user}"]
    run([*connect, "--execute=create database if not exists slurm_acct_db"])


def daemon(place: Place) -> Recipe:
    layout = place.layout
    return Recipe(
        name="slurmdbd",
        command=("slurmdbd", "-D"),
        log=layout.log / "slurmdbd.stderr",
        ready=accepts("127.0.0.1", place.database_port),
        env={"SLURM_CONF": str(layout.slurm_conf), "MYSQL_UNIX_PORT": str(layout.database_socket)},
    )


def register(place: Place) -> None:
    """Make cluster, account and users known. Before slurmctld starts, which asks for its cluster once."""
    env = {"SLURM_CONF": str(place.layout.slurm_conf)}
    users = dict.fromkeys(["root", place.user, *place.spec.users])
    for words in (
        ["cluster", place.cluster],
        ["account", ACCOUNT, f"cluster={place.cluster}", "description=demo", "organization=carrel"],
        *(["user", user, f"account={ACCOUNT}", f"cluster={place.cluster}"] for user in users),
    ):
        run(["sacctmgr", "--immediate", "add", *words], env=env)
    if place.spec.bank:
        # Slurm's own account of root has no money.
        run(["sacctmgr", "--immediate", "modify", "user", "root", "set", f"DefaultAccount={ACCOUNT}"], env=env)
