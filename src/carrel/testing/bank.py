"""A bank in memory with one account: enough to test a controller's decisions, and to read what a lien promises."""

from carrel.errors import RefusedError
from carrel.model.job import JobKey
from carrel.model.lien import NONE, Lien


class FakeBank:
    """One account. Every verb is named by the run and may be repeated, also after the lien is resolved."""

    def __init__(self, *, deposit_micro_su: int = 0) -> None:
        """Open the account with this much in it."""
        self.journal: list[tuple[str, JobKey, int]] = []
        """What changed, in order: (``place`` | ``top_up`` | ``settle``, run, amount)."""
        self._deposits_micro_su = deposit_micro_su
        self._liens: dict[JobKey, Lien] = {}

    @property
    def available_micro_su(self) -> int:
        """What was deposited, less what is set aside, less what was charged."""
        return self._deposits_micro_su - sum(lien.amount_micro_su for lien in self._liens.values())

    def lien(self, run: JobKey) -> Lien:
        return self._liens.get(run, NONE)

    def runs(self) -> tuple[JobKey, ...]:
        return tuple(self._liens)

    def deposit(self, amount_micro_su: int) -> None:
        self._deposits_micro_su += amount_micro_su

    def place(self, run: JobKey, amount_micro_su: int) -> None:
        """Set money aside, once for each run.

        Raises:
            RefusedError: there is not enough.
        """
        if self.lien(run).state == "none":
            self._afford(amount_micro_su)
            self._write("place", run, Lien(state="open", amount_micro_su=amount_micro_su))

    def top_up(self, run: JobKey, amount_micro_su: int) -> None:
        """Raise an open lien to an amount; never lower it.

        Raises:
            RefusedError: there is not enough.
        """
        lien = self.lien(run)
        if lien.state == "open" and lien.amount_micro_su < amount_micro_su:
            self._afford(amount_micro_su - lien.amount_micro_su)
            self._write("top_up", run, Lien(state="open", amount_micro_su=amount_micro_su))

    def settle(self, run: JobKey, amount_micro_su: int) -> None:
        """Charge an open lien, also beyond its amount: what was used is owed."""
        if self.lien(run).state == "open":
            self._write("settle", run, Lien(state="resolved", amount_micro_su=amount_micro_su))

    def _afford(self, more_micro_su: int) -> None:
        if more_micro_su > self.available_micro_su:
            raise RefusedError(
                f"the account has {self.available_micro_su} micro-SU left, this job may need {more_micro_su} more"
            )

    def _write(self, what: str, run: JobKey, lien: Lien) -> None:
        self._liens[run] = lien
        self.journal.append((what, run, lien.amount_micro_su))
