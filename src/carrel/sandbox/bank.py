"""The bank of a sandbox: prices, an account with money in it, and the script by which slurmctld asks."""

import shutil
import socket

from carrel import config, paths
from carrel.bank.ledger import Ledger
from carrel.daemons.banking import open_store
from carrel.errors import CarrelError
from carrel.model.ledger import AnyCommand, Deposit, OpenAllocation, OpenProject, Refusal
from carrel.model.money import MICRO_SU_PER_SU
from carrel.sandbox import slurmconf
from carrel.sandbox.database import ACCOUNT
from carrel.sandbox.slurmconf import Place

SCRIPT = "job_submit.lua"
_ANSWER_TIMEOUT_S = 1.0


def install(place: Place) -> None:
    """Write its files and open the account; once only, so that a sandbox that starts again keeps its money."""
    layout = place.layout
    shutil.copyfile(paths.libexec() / SCRIPT, layout.etc / SCRIPT)
    book = layout.etc / "prices.toml"
    if not book.exists():
        book.write_text(slurmconf.prices_toml())
    layout.bank.mkdir(mode=0o755, exist_ok=True)
    amount = place.spec.deposit_su * MICRO_SU_PER_SU
    commands: list[AnyCommand] = [
        OpenProject(key="sandbox/project", project=ACCOUNT),
        OpenAllocation(key="sandbox/allocation", allocation=ACCOUNT, project=ACCOUNT),
    ]
    if amount:
        reason = "to begin with"
        commands.append(Deposit(key="sandbox/deposit", allocation=ACCOUNT, amount_micro_su=amount, reason=reason))
    with Ledger(open_store(config.load(layout.carrel_conf).bank)) as ledger:
        for command in commands:
            answer = ledger.call(command)
            if isinstance(answer, Refusal) and answer.why != "exists":
                raise CarrelError(f"the bank of the sandbox: {answer.sentence}")


def ready(place: Place) -> bool:
    """Tell whether the bank knows the cluster, so that it can price a job."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        try:
            sock.connect(str(place.layout.submit_socket))
            sock.sendall(b"ready\n")
            return sock.recv(64).startswith(b"ok")
        except OSError:
            return False
