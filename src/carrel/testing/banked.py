"""A sandbox with a bank, as its tests see it: what the ledger says, and what it should say by Slurm's accounting alone.

What a run should cost is computed here from what sacct prints, with none of the code that charges.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from carrel import config
from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.verify import verify
from carrel.core.billing import recompute
from carrel.daemons import prices
from carrel.daemons.banking import open_store
from carrel.model.ledger import Answer, AnyCommand, Balance, Break, Deposit, LienView
from carrel.sandbox.cluster import Sandbox
from carrel.testing.daemons import wait_for

ACCOUNT = "demo"
OPEN = ("unbound", "bound", "active", "unknown_end")
SETTLED_WITHIN_S = 60.0
_MICRO = 1_000_000


class Record(NamedTuple):
    """A run as sacct prints it."""

    job_id: int
    submit_s: int
    state: str
    partition: str
    elapsed_s: int
    cpus: int
    start_s: int
    end_s: int


class Banked:
    """A running sandbox with a bank, and the prices of a CPU-hour by partition, in SU."""

    def __init__(self, box: Sandbox, rates: Mapping[str, str] | None = None) -> None:
        """Give the sandbox these prices; by default those it has: 1 SU everywhere."""
        self.box = box
        self.settings = config.load(box.layout.carrel_conf)
        self.rates = {"main": "1", **(rates or {})}
        if rates:
            lists = "".join(
                f"[version.partition.{name}]\nrates = {{ cpu = {rate} }}\n" for name, rate in self.rates.items()
            )
            new = box.layout.etc / "prices.new"
            new.write_text(f'[[version]]\nname = "test"\nvalid_from = 2020-01-01\n{lists}')
            new.replace(box.layout.etc / "prices.toml")

    def sbatch(self, *options: str, user: str | None = None) -> int:
        """Submit and return the job's id."""
        done = self.try_sbatch(*options, user=user)
        assert done[0] == 0, done[1]
        return int(re.split(r"\D", done[1])[0])

    def try_sbatch(self, *options: str, user: str | None = None) -> tuple[int, str]:
        """Submit; return the status and what was said."""
        words = ["sbatch", "--parsable", "--chdir=/tmp", "--output=/dev/null", *options]
        done = self.box.run(words, user=user)
        return done.returncode, f"{done.stdout.strip()}\n{done.stderr.strip()}".strip()

    def gate(self) -> tuple[str, Path]:
        """Return a script that runs until a file is there, and that file: it ends when its test says so."""
        go = self.box.dir / f"go.{secrets.token_hex(4)}"
        return f"until [ -e {go} ]; do sleep 0.2; done", go

    def scontrol(self, *words: str, user: str | None = None) -> tuple[int, str]:
        done = self.box.run(["scontrol", *words], user=user)
        return done.returncode, done.stdout + done.stderr

    def state(self, job_id: int) -> str:
        """Return Slurm's word for a job; empty where it knows none."""
        return self.box.run(["squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%T"]).stdout.strip()

    def wait_state(self, job_id: int, *states: str) -> None:
        wait_for(lambda: self.state(job_id) in states, f"job {job_id} is {' or '.join(states)}", timeout_s=120)

    def liens(self, *states: str) -> list[LienView]:
        """Return the liens in these states, or all."""
        with closing(open_store(self.settings.bank)) as store:
            found: list[LienView] = []
            while page := queries.liens(store, states=states, after=found[-1].id if found else 0):  # type: ignore[arg-type]
                found += page
            return found

    def lien(self, job_id: int) -> LienView:
        """Return the only lien of a job, once it is bound to it."""
        wait_for(lambda: any(lien.job_id == job_id for lien in self.liens()), f"job {job_id} has a lien", timeout_s=60)
        (found,) = [lien for lien in self.liens() if lien.job_id == job_id]
        return found

    def balance(self) -> Balance:
        with closing(open_store(self.settings.bank)) as store:
            (found,) = queries.balances(store, project=ACCOUNT)
            return found

    def tell(self, *commands: AnyCommand) -> list[Answer]:
        """Have the ledger do something, beside the daemon."""
        with Ledger(open_store(self.settings.bank)) as ledger:
            return [ledger.call(command) for command in commands]

    def deposit(self, micro_su: int, key: str) -> None:
        self.tell(Deposit(key=key, allocation=ACCOUNT, amount_micro_su=micro_su, reason="for a test"))

    def wait_settled(self) -> None:
        """Return when no lien is open."""
        wait_for(lambda: not self.liens(*OPEN), "every lien is resolved", timeout_s=SETTLED_WITHIN_S)

    def broken(self) -> list[Break]:
        """Return the invariants that do not hold; charges are computed again from their stored inputs."""
        book = recompute(prices.load(self.settings))
        with closing(open_store(self.settings.bank)) as store:
            return verify(store, price=book)

    def records(self) -> list[Record]:
        """Return every run that sacct knows the end of."""
        fields = "JobIDRaw,Submit,State,Partition,ElapsedRaw,AllocTRES,Start,End"
        words = ["sacct", "-a", "-X", "-D", "-P", "-n", "--noconvert", "-S", "2020-01-01", "-o", fields]
        lines = self.box.run(words, env={"SLURM_TIME_FORMAT": "%s"}).stdout.splitlines()
        return [_record(line.split("|")) for line in lines if line.split("|")[-1].isdigit()]

    def wrong(self) -> list[str]:
        """Return where the ledger says something else than price times what sacct says, to the micro-SU."""
        due = {(each.job_id, each.submit_s): self.price(each) for each in self.records() if each.elapsed_s}
        charged: dict[tuple[int, int], int] = {}
        twice = []
        for lien in self.liens("settled", "part_refunded", "refunded"):
            job_id, submit_s, _ = lien.run.split(".")
            name = int(job_id), int(submit_s)
            twice += [f"{lien.run}: charged twice"] if name in charged else []
            charged[name] = lien.charged_micro_su
        names = sorted(due.keys() | {name for name, amount in charged.items() if amount})
        return twice + [
            f"{name}: charged {charged.get(name)}, sacct says {due.get(name)}"
            for name in names
            if charged.get(name) != due.get(name)
        ]

    def price(self, run: Record) -> int:
        exact = Fraction(self.rates[run.partition]) * run.cpus * run.elapsed_s * _MICRO / 3600
        return int(exact + Fraction(1, 2))


def _record(words: Sequence[str]) -> Record:
    job_id, submit, state, partition, elapsed, tres, start, end = words
    counts = dict(item.split("=") for item in tres.split(",") if item)
    began = int(start) if start.isdigit() else int(end)
    cpus = int(counts.get("cpu", 0))
    return Record(int(job_id), int(submit), state.split()[0], partition, int(elapsed), cpus, began, int(end))
