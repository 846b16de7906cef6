"""Who may charge which account, and with which QOS: Slurm's associations, read as a whole.

One question for all of them, kept by the caller: a submission cannot wait for slurmdbd.
"""

from collections import defaultdict

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.process import CommandError

_FIELDS = "Account,User,Partition,DefaultQOS,QOS"
_ANSWER_TIMEOUT_S = 30.0
_NORMAL = "normal"


class Associations:
    """What ``sacctmgr show assoc`` said."""

    def __init__(self, text: str) -> None:
        """Read the answer; empty: there is no accounting, and nobody is a stranger."""
        self._qos: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for line in text.splitlines():
            account, user, partition, default, allowed = f"{line}||||".split("|")[:5]
            if user:
                # Slurm takes the association's only QOS where it names no default, and "normal" where it names several.
                qos = default or (allowed if allowed and "," not in allowed else _NORMAL)
                self._qos[account, user].append((partition, qos))

    def __bool__(self) -> bool:
        """Whether there is any; none: a cluster without slurmdbd."""
        return bool(self._qos)

    def member(self, user: str, account: str) -> bool:
        return (account, user) in self._qos

    def accounts(self) -> set[str]:
        return {account for account, _ in self._qos}

    def default_qos(self, user: str, account: str, partitions: tuple[str, ...]) -> tuple[str, ...]:
        """Return the QOS that Slurm may give a job of this user that names none."""
        found = {qos for partition, qos in self._qos.get((account, user), ()) if partition in ("", *partitions)}
        return tuple(sorted(found))


async def read(slurm: Slurm, *, cluster: str) -> Associations:
    """Ask slurmdbd for all associations of a cluster.

    Raises:
        UnreachableError: it did not answer.
    """
    command = [f"{slurm.bin_dir}/sacctmgr", "-n", "-P", "show", "assoc", f"cluster={cluster}", f"format={_FIELDS}"]
    env = {"SLURM_CONF": slurm.conf} if slurm.conf else {}
    try:
        return Associations(await process.run_async(command, timeout_s=_ANSWER_TIMEOUT_S, env=env))
    except CommandError as error:
        raise UnreachableError(f"slurm's accounting did not answer: {error}") from error
